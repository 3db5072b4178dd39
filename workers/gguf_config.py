"""config.json and generation_config.json of the model inside a GGUF file.

The file's metadata names sizes; which tensors are there tells the rest (biases, tied embeddings, Llama 3's stretched
rotary frequencies). What cannot be said in a Hugging Face config is refused, never dropped: a model that ignores half
of its settings still talks, only worse. Reads no weights except `rope_freqs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ModelError
from workers.gguf_tensors import BF16, ROPE_FREQUENCIES

Metadata = Mapping[str, Any]
Config = dict[str, Any]

# general.architecture -> (model_type, transformers class); "llama" is also what Mistral and SmolLM2 files say
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# The only variant ever published (Llama 3.1 to 3.3); rope_freqs holds its result, not its parameters.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_ORIGINAL = 1.0, 4.0, 8192


def model_config(metadata: Metadata, tensors: Mapping[str, Any]) -> Config:
    """config.json. `tensors` maps GGUF names to gguf.ReaderTensor.

    Raises ModelError for what is not supported, KeyError for a missing size.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(f"GGUF architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    model_type, cls = ARCHITECTURES[name]
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    if values.get("expert_count", 0):
        raise ModelError("mixture-of-experts GGUF files are not supported; use a dense model")
    heads, kv_heads = _scalar(values, "attention.head_count"), _scalar(values, "attention.head_count_kv")
    hidden = _scalar(values, "embedding_length")
    head_dim = int(values.get("attention.key_length") or hidden // heads)
    if (
        values.get("rope.dimension_count", head_dim) != head_dim
        or values.get("attention.value_length", head_dim) != head_dim
    ):
        raise ModelError("a GGUF file whose rotary, key and value sizes differ is not supported; use another model")
    config: Config = {
        "architectures": [cls],
        "model_type": model_type,
        "dtype": "bfloat16" if any(t.tensor_type == BF16 for t in tensors.values()) else "float32",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": _scalar(values, "feed_forward_length"),
        "num_hidden_layers": _scalar(values, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _scalar(values, "context_length"),
        "rms_norm_eps": _shortest(values["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": _rope(values, tensors.get(ROPE_FREQUENCIES), head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return config | _biases(name, tensors) | _window(name, values)


def token_ids(metadata: Metadata, end_ids: list[int]) -> Config:
    """What generation_config.json says; config.json repeats it with a single end of sequence."""
    named = {"bos_token_id": "bos", "pad_token_id": "padding"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in named.items()}
    return {key: value for key, value in found.items() if value is not None} | {"eos_token_id": end_ids}


def _scalar(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if isinstance(value, list):  # one per layer
        if len(set(value)) != 1:
            raise ModelError(f"GGUF files with a different {key} per layer are not supported; use another model")
        value = value[0]
    return int(value)


def _shortest(value: float) -> float:
    """A float32 that was read as a double, as it was once written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _biases(name: str, tensors: Collection[str]) -> Config:
    """Qwen2 has query, key and value biases by definition; for the others they are an option."""
    if name == "qwen2":
        return {}
    found: Config = {"attention_bias": "blk.0.attn_q.bias" in tensors}
    return found | {"mlp_bias": "blk.0.ffn_gate.bias" in tensors} if name == "llama" else found


def _window(name: str, values: Mapping[str, Any]) -> Config:
    window = values.get("attention.sliding_window") or None
    if name == "llama" and window:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if window:
        raise ModelError(f"sliding-window attention in {name} GGUF files is not supported; use the original model")
    return {}


def _rope(values: Mapping[str, Any], frequencies: Any | None, head_dim: int) -> Config:
    theta = _shortest(values.get("rope.freq_base", 10_000.0))
    kind = values.get("rope.scaling.type", "none")
    if frequencies is not None:
        return _llama3(frequencies.data, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rotary scaling {kind!r} in GGUF files is not supported; use the original model")
    rope: Config = {"rope_type": kind, "rope_theta": theta, "factor": _shortest(values["rope.scaling.factor"])}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(values["rope.scaling.original_context_length"])
        if "rope.scaling.attn_factor" in values:
            rope["attention_factor"] = _shortest(values["rope.scaling.attn_factor"])
    return rope


def _llama3(frequencies: npt.NDArray[np.float32], theta: float, head_dim: int) -> Config:
    """The parameters whose result `frequencies` [head_dim / 2] is: what the base frequencies are divided by.

    Raises ModelError when they are not Llama 3's.
    """
    factor = float(frequencies.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((LLAMA3_ORIGINAL / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if expected.shape != frequencies.shape or not np.allclose(expected, frequencies, rtol=1e-3):
        raise ModelError(
            "the GGUF file scales rotary frequencies in a way that is not Llama 3's; use the original model"
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_ORIGINAL,
    }
