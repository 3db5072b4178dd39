"""From safetensors files to the tensors a decoder multiplies with.

Streams layer by layer out of memory-mapped files: convert, fuse (q|k|v and gate|up), pack, forget. Every tensor that
the architecture calls for must come exactly once and in its shape, and nothing else may be there: a checkpoint that
needs more than we compute is refused, not served wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import ModelError
from kernels.linear import Linear
from workers.architecture import Architecture
from workers.checkpoint import weight_files

FLOATS = ("F64", "F32", "F16", "BF16")
DERIVED = ("rotary_emb.inv_freq",)  # older checkpoints carry buffers that follow from config.json


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: Tensor  # [hidden]
    qkv: Linear  # hidden -> (Hq + 2 Hkv) * D
    qk_norm: Tensor | None  # [Hq + Hkv, D]
    output: Linear  # Hq * D -> hidden
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden -> 2 * intermediate
    down: Linear  # intermediate -> hidden


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    logits: Linear  # hidden -> vocab


def load_weights(
    directory: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,  # called with the fraction done, ending with 1.0
) -> Weights:
    """Raises ModelError, naming the file or tensor at fault."""
    with ExitStack() as stack:
        reader = _Reader([(path, stack.enter_context(_open(path))) for path in weight_files(directory)], dtype, device)
        embedding = reader.take("model.embed_tokens.weight", architecture.vocab_size, architecture.hidden_size)
        layers = []
        for index in range(architecture.num_layers):
            layers.append(_layer(reader, f"model.layers.{index}", architecture))
            if progress is not None:
                progress((index + 1) / (architecture.num_layers + 1))
        norm = reader.take("model.norm.weight", architecture.hidden_size)
        # a tied checkpoint may carry the same matrix twice
        head = reader.take("lm_head.weight", *embedding.shape) if not architecture.tied else embedding
        reader.refuse_rest(ignore="lm_head.weight" if architecture.tied else None)
        weights = Weights(embedding, tuple(layers), norm, Linear(head))
    if progress is not None:
        progress(1.0)
    return weights


def _layer(reader: _Reader, name: str, a: Architecture) -> LayerWeights:
    hidden, intermediate = a.hidden_size, a.intermediate_size
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim

    def linear(inputs: int, bias: bool, *parts: tuple[str, int]) -> Linear:
        """Projections that read the same input, as one; `parts` are (name, outputs)."""
        weight = torch.cat([reader.take(f"{name}.{part}.weight", outputs, inputs) for part, outputs in parts])
        biases = [reader.take(f"{name}.{part}.bias", outputs) for part, outputs in parts] if bias else []
        return Linear(weight, torch.cat(biases) if bias else None)

    def head_norm(part: str, heads: int) -> Tensor:
        return reader.take(f"{name}.self_attn.{part}.weight", a.head_dim).expand(heads, -1)

    return LayerWeights(
        attention_norm=reader.take(f"{name}.input_layernorm.weight", hidden),
        qkv=linear(hidden, a.qkv_bias, ("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)),
        qk_norm=torch.cat((head_norm("q_norm", a.num_heads), head_norm("k_norm", a.num_kv_heads)))
        if a.qk_norm
        else None,
        output=linear(q, a.output_bias, ("self_attn.o_proj", hidden)),
        mlp_norm=reader.take(f"{name}.post_attention_layernorm.weight", hidden),
        gate_up=linear(hidden, a.mlp_bias, ("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)),
        down=linear(intermediate, a.mlp_bias, ("mlp.down_proj", hidden)),
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); download it again") from None


class _Reader:
    """Hands out each tensor once, in the dtype and on the device wanted, and knows what is left."""

    def __init__(self, files: list[tuple[Path, Any]], dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._left: dict[str, tuple[Path, Any]] = {}  # tensor name -> file that has it
        for path, file in files:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in self._left:
                    raise ModelError(f"{name} is in both {self._left[name][0]} and {path}; download the model again")
                self._left[name] = path, file

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._left:
            raise ModelError(f"the weights lack {name}, which config.json calls for; is the download complete?")
        path, file = self._left.pop(name)
        header = file.get_slice(name)
        if header.get_dtype() not in FLOATS:
            raise ModelError(f"{name} in {path} has type {header.get_dtype()}; quantized weights are not supported")
        if tuple(header.get_shape()) != shape:
            raise ModelError(f"{name} in {path} has shape {header.get_shape()} where config.json implies {[*shape]}")
        # a copy, since a view would keep the file mapped and fault if it were ever truncated
        tensor: Tensor = file.get_tensor(name).to(device=self._device, dtype=self._dtype, copy=True)
        return tensor

    def refuse_rest(self, ignore: str | None) -> None:
        rest = [name for name in self._left if name != ignore and not name.endswith(DERIVED)]
        if rest:
            raise ModelError(
                f"{self._left[rest[0]][0]} has {rest[0]}, which config.json does not call for; is it this model's?"
            )
