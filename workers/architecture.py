"""What a model is, read from its Hugging Face `config.json`: sizes, options, rotary scaling, end-of-sequence ids.

One frozen `Architecture` describes every supported family, so that one decoder definition serves them all. A config
this file does not understand is refused here, with the reason, before any weight is read. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from cluster.errors import ModelError
from kvstore.layout import Layout
from workers.shard import Sizes

FAMILIES = {
    "LlamaForCausalLM": "llama",  # Llama 2 and 3.x, SmolLM2
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",  # Qwen2 and Qwen2.5
    "Qwen3ForCausalLM": "qwen3",
}
ITEMSIZE = {"float32": 4, "bfloat16": 2}
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. Fields a kind does not use keep their neutral value."""

    kind: RopeKind
    theta: float
    factor: float = 1.0  # how far the context is stretched
    original_context: int = 0  # tokens the model was trained on before stretching
    low_frequency: float = 1.0  # llama3: slower wavelengths than original_context / this are stretched
    high_frequency: float = 4.0  # llama3: faster ones than original_context / this are kept
    beta_fast: float = 32.0  # yarn: rotations over the original context above which a dimension is kept
    beta_slow: float = 1.0  # yarn: rotations below which it is stretched
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    truncate: bool = True  # yarn: round the bounds of the ramp to whole dimensions


@dataclass(frozen=True, slots=True)
class Architecture:
    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope: Rope
    max_context: int  # tokens, rotary stretching included
    windows: tuple[int, ...]  # layer -> tokens a query sees, itself included; 0: all before it
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head (Qwen3)
    tied: bool  # the output projection is the embedding
    eos_token_ids: tuple[int, ...]


def load_architecture(directory: Path) -> Architecture:
    """Raises ModelError when the directory or its config.json is missing, broken or describes an unsupported model."""
    if not directory.is_dir():
        raise ModelError(
            f"{directory} is not a directory; pass a Hugging Face model directory with a config.json in it"
        )
    config = _read_json(directory / "config.json")
    if config is None:
        raise ModelError(
            f"{directory} has no config.json; pass a Hugging Face model directory (or convert the GGUF file)"
        )
    generation = _read_json(directory / "generation_config.json") or {}
    try:
        return parse_architecture(config, generation)
    except KeyError as error:
        raise ModelError(f"{directory / 'config.json'} lacks {error}; is the download complete?") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'} does not make sense: {error}") from None


def parse_architecture(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Architecture:
    """The model that a config.json and a generation_config.json describe. Defaults are those of transformers.

    Raises ModelError for what is not supported, KeyError for a missing size.
    """
    names = config.get("architectures") or ["(none)"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise ModelError(f"architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    _refuse_unsupported(config)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    attention_bias = bool(config.get("attention_bias", False))
    layers, trained_context = int(config["num_hidden_layers"]), int(config["max_position_embeddings"])
    rope = _rope(config, trained_context)
    return Architecture(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        max_context=_max_context(rope, trained_context),
        windows=_windows(config, family, layers),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=_eos(config, generation),
    )


def layout(architecture: Architecture, dtype: str, block_size: int, kv_dtype: str = "") -> Layout:
    """The shape of this model's KV blocks. `kv_dtype`: int8 or float8_e4m3fn, where KV is kept in 8 bits; empty: in
    `dtype`. Raises ModelError for a dtype the engine does not compute in."""
    if dtype not in ITEMSIZE:
        raise ModelError(f"dtype {dtype} is not supported; use one of {', '.join(ITEMSIZE)}")
    return Layout(
        heads=architecture.num_kv_heads,
        layers=architecture.num_layers,
        tokens=block_size,
        dim=architecture.head_dim,
        dtype=kv_dtype or dtype,
        itemsize=1 if kv_dtype else ITEMSIZE[dtype],
    )


def sizes(architecture: Architecture) -> Sizes:
    """What of it tensor and pipeline parallelism divide."""
    a = architecture
    return Sizes(a.num_heads, a.num_kv_heads, a.num_layers, a.intermediate_size, a.vocab_size)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; download the model again")
    return value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise ModelError("quantized checkpoints are not supported; use the model's float or bfloat16 weights")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {config['hidden_act']} is not supported; only silu is")


def _rope(config: Mapping[str, Any], trained_context: int) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_scaling` with `rope_theta` (before)."""
    parameters: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(f"rotary scaling {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("partial rotary embeddings are not supported")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope("default", theta)
    original = trained_context
    if kind in ("llama3", "yarn"):
        outer = config.get("original_max_position_embeddings")
        original = int(outer or parameters.get("original_max_position_embeddings") or trained_context)
    factor = float(parameters.get("factor") or trained_context / original)
    return Rope(
        kind=cast(RopeKind, kind),
        theta=theta,
        factor=factor,
        original_context=original,
        low_frequency=float(parameters.get("low_freq_factor", 1.0)),
        high_frequency=float(parameters.get("high_freq_factor", 4.0)),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
        truncate=bool(parameters.get("truncate", True)),
    )


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature (arXiv:2309.00071, section 3.4), with DeepSeek's two-sided variant."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return temperature(above) / temperature(below) if above and below else temperature(1.0)


def _max_context(rope: Rope, trained_context: int) -> int:
    """`max_position_embeddings` counts the stretched context for llama3; for the others it may be either one."""
    if rope.kind in ("linear", "dynamic", "yarn"):
        return max(trained_context, int(rope.original_context * rope.factor))
    return trained_context


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int, ...]:
    if family == "mistral":
        return (int(config.get("sliding_window", 4096) or 0),) * layers
    if family == "llama" or not config.get("use_sliding_window", False):
        return (0,) * layers
    window = int(config.get("sliding_window", 4096) or 0)
    kinds = config.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        raise ModelError(f"config.json names {len(kinds)} layer_types for {layers} layers; download the model again")
    first = int(config.get("max_window_layers", 28))
    slides = [kind == "sliding_attention" for kind in kinds] if kinds else [layer >= first for layer in range(layers)]
    return tuple(window if slide else 0 for slide in slides)


def _eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Of both files, because fine-tuned chat models often add their end-of-turn id to only one of them."""
    found: dict[int, None] = {}
    for source in (generation, config):
        value = source.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        found |= {int(token): None for token in ids}
    return tuple(found)
