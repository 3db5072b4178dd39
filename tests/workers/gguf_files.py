"""Writes small GGUF files: a transformers model under llama.cpp's names and row order, or a vocabulary alone.

An inverse of workers/gguf.py written from llama.cpp's side, so that the two check each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

F32, F16, BF16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))
VOCAB_SIZE = 320
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WORDS = (
    "the", "there", "then", "other", "hello", "world", "token", "tokens", "block", "blocks", "decode", "prefill",
    "straße", "naïve", "日本語",
)  # fmt: skip


def random_model(model_type: str, **changes: Any) -> Any:
    """A transformers model in fp32, every parameter random."""
    settings = {**SIZES, **changes}
    if model_type == "qwen2":
        del settings["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def byte_vocabulary(size: int = VOCAB_SIZE, pre: str = "smollm") -> dict[str, Any]:
    """A "gpt2" vocabulary: three control tokens, the bytes, two merges, padding."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    types = [3, 3, 3] + [1] * (len(tokens) - 3) + [5] * (size - len(tokens))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def sentence_piece_vocabulary(**changes: Any) -> dict[str, Any]:
    """A "llama" vocabulary: control tokens, bytes, a user-defined token and every piece of a few words."""
    words = [f"▁{word}" for word in WORDS]
    pieces = {
        word[start:end] for word in words for start in range(len(word)) for end in range(start + 1, len(word) + 1)
    }
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<|tool|>",
        *sorted(pieces, key=_rank),
    ]
    specials = [2, 3, 3] + [6] * 256 + [4]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": specials + [1] * (len(texts) - len(specials)),
        "tokenizer.ggml.scores": [0.0] * len(specials) + [-float(i) for i in range(len(texts) - len(specials))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | changes


def _rank(piece: str) -> tuple[bool, int, str]:
    """Merged pieces first, short before long, as training finds them; single characters score lowest."""
    return len(piece) == 1, len(piece), piece


def metadata_of(model: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for this model."""
    config = model.config
    name = "llama" if config.model_type == "mistral" else config.model_type
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if config.model_type != "qwen2":
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.model_type == "mistral":
        values["attention.sliding_window"] = config.sliding_window
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def tensors_of(model: Any) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF name -> values, query and key rows permuted where llama.cpp permutes them."""
    config = model.config
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = value.numpy()
        if config.model_type in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        tensors[_gguf_name(name)] = values
    return tensors


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in NAMES:
        return f"{NAMES[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, npt.NDArray[Any]], kind: gguf.GGMLQuantizationType = F32
) -> Path:
    """Matrices are stored as `kind`, vectors as float32, as llama.cpp does."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, values in tensors.items():
        stored = kind if values.ndim == 2 else F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    kind = getattr(gguf.GGUFValueType, types[type(value)])
    element = None
    if isinstance(value, list):
        element = (
            gguf.GGUFValueType.INT32
            if isinstance(value[0], int)
            else getattr(gguf.GGUFValueType, types[type(value[0])])
        )
    writer.add_key_value(key, value, kind, sub_type=element)
