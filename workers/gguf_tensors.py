"""The tensors of a GGUF file under their Hugging Face names, in Hugging Face's row order, as float32 or bfloat16.

`plan` says what will be there without reading weights; each planned tensor dequantizes itself when it is written.
A tensor that is unknown, missing or one too many is an error: weights are never guessed and never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from cluster.errors import ModelError
from workers.safetensors_writer import Planned

BF16 = gguf.GGMLQuantizationType.BF16
ROPE_FREQUENCIES = "rope_freqs.weight"  # not a weight: becomes part of config.json

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def plan(tensors: Mapping[str, Any], config: Mapping[str, Any], permuted: bool) -> dict[str, Planned]:
    """Hugging Face name -> tensor to write. `tensors` maps GGUF names to gguf.ReaderTensor.

    `permuted`: query and key rows are in llama.cpp's order. Raises ModelError for a tensor that no supported model has.
    """
    permuted_heads = {}
    if permuted:
        permuted_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    planned: dict[str, Planned] = {}
    for name, tensor in tensors.items():
        if name == ROPE_FREQUENCIES:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        dtype = "BF16" if tensor.tensor_type == BF16 else "F32"
        heads = next((heads for part, heads in permuted_heads.items() if f".{part}." in name), 0)
        planned[_hugging_face_name(name)] = Planned(shape, dtype, partial(_values, tensor, shape, heads))
    return planned


def check_complete(names: set[str], config: Mapping[str, Any]) -> None:
    """Raises ModelError unless `names` are exactly the tensors of the model that `config` describes."""
    parts = {f"{part}.weight" for part in _LAYER.values()}
    if config["model_type"] == "qwen3":
        parts |= {f"{part}.weight" for part in _HEAD_NORMS.values()}
    if config["model_type"] == "qwen2" or config["attention_bias"]:
        parts |= {f"self_attn.{part}_proj.bias" for part in "qkv"}
    if config.get("attention_bias"):
        parts.add("self_attn.o_proj.bias")
    if config.get("mlp_bias"):
        parts |= {f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")}
    expected = {f"model.layers.{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in parts}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        expected.add("lm_head.weight")
    if missing := sorted(expected - names):
        raise ModelError(f"the GGUF file lacks {missing[0]} and {len(missing) - 1} other tensors; download it again")
    if extra := sorted(names - expected):
        raise ModelError(f"the GGUF file has {extra[0]}, which its model does not use; use the original model")


def _hugging_face_name(name: str) -> str:
    if match := _NAME.fullmatch(name):
        layer, part, kind = match["layer"], match["part"], match["kind"]
        if layer is None and part in _WHOLE:
            return f"{_WHOLE[part]}.{kind}"
        if layer is not None and part in _LAYER | _HEAD_NORMS:
            return f"model.layers.{layer}.{(_LAYER | _HEAD_NORMS)[part]}.{kind}"
    raise ModelError(f"GGUF tensor {name!r} belongs to no supported model; use the original model")


def _values(tensor: Any, shape: tuple[int, ...], heads: int) -> npt.NDArray[Any]:
    """The numbers [shape], bfloat16 ones as their bits; `heads` > 0 undoes llama.cpp's row order."""
    values: npt.NDArray[Any]
    if tensor.tensor_type == BF16:
        values = tensor.data.view(np.uint16).reshape(shape)
    else:
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
        except NotImplementedError:
            raise ModelError(
                f"GGUF type {tensor.tensor_type.name} is not supported; use another quantization"
            ) from None
    if not heads:
        return values
    # llama.cpp rotates neighbouring rows of a head (0,1), (2,3)...; Hugging Face its halves (0,d/2), (1,d/2+1)...
    pairs = values.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.swapaxes(1, 2).reshape(shape)
