"""config.json in all its spellings, and a clear no for what the decoder would get wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ModelError
from workers.architecture import Architecture, layout, load_architecture, parse_architecture

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


def parsed(generation: dict[str, Any] | None = None, **changes: Any) -> Architecture:
    return parse_architecture({**LLAMA, **changes}, generation or {})


def test_defaults_are_those_of_transformers() -> None:
    a = parsed()
    assert (a.head_dim, a.norm_epsilon, a.rope.kind, a.rope.theta, a.tied) == (8, 1e-6, "default", 10_000.0, False)
    assert a.windows == (0, 0, 0, 0)
    assert [a.qkv_bias, a.output_bias, a.mlp_bias, a.qk_norm] == [False] * 4


def test_without_grouped_heads_every_head_has_its_own_keys() -> None:
    assert parsed(num_key_value_heads=None).num_kv_heads == 8


@pytest.mark.parametrize(
    "theta", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]
)
def test_rope_theta_in_both_spellings(theta: dict[str, Any]) -> None:
    assert parsed(**theta).rope.theta == 5e5


SCALINGS = [
    ({"factor": 8.0}, "linear", 16_384),
    ({"factor": 2.0}, "dynamic", 4096),
    (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        "llama3",
        2048,
    ),
    ({"factor": 4.0, "original_max_position_embeddings": 2048}, "yarn", 8192),
]


@pytest.mark.parametrize(("parameters", "kind", "max_context"), SCALINGS)
def test_rope_scaling_in_all_spellings(parameters: dict[str, Any], kind: str, max_context: int) -> None:
    newest = parsed(rope_parameters={**parameters, "rope_type": kind, "rope_theta": 5e5})
    newer = parsed(rope_scaling={**parameters, "rope_type": kind}, rope_theta=5e5)
    oldest = parsed(rope_scaling={**parameters, "type": kind}, rope_theta=5e5)
    assert newest == newer == oldest
    assert (newest.rope.kind, newest.rope.factor, newest.max_context) == (kind, parameters["factor"], max_context)


def test_end_of_sequence_ids_come_from_both_files() -> None:
    assert parsed(generation={"eos_token_id": [128_001, 128_009]}, eos_token_id=128_001).eos_token_ids == (
        128_001,
        128_009,
    )
    assert parsed(generation={"eos_token_id": 7}).eos_token_ids == (7, 2)
    assert parsed(eos_token_id=None).eos_token_ids == ()


def test_sliding_windows() -> None:
    assert parsed(architectures=["MistralForCausalLM"], sliding_window=100).windows == (100,) * 4
    assert parsed(architectures=["MistralForCausalLM"], sliding_window=None).windows == (0,) * 4
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 50, "max_window_layers": 3}
    assert parsed(**qwen).windows == (0,) * 4
    assert parsed(**qwen, use_sliding_window=True).windows == (0, 0, 0, 50)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    assert parsed(**qwen, use_sliding_window=True, layer_types=kinds).windows == (50, 0, 50, 0)


def test_families_differ_where_they_differ() -> None:
    qwen2, qwen3 = (parsed(architectures=[name]) for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 8)
    assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM, MistralForCausalLM, Qwen2.*Qwen3"),
        ({"architectures": None}, "not supported"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"num_key_value_heads": 3}, "evenly"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        parsed(**changes)


def test_loading_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    assert load_architecture(tmp_path) == parsed(generation={"eos_token_id": [3]})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "no config.json"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({**LLAMA, "hidden_size": "wide"}), "does not make sense"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"}), "lacks 'vocab_size'"),
    ],
)
def test_a_broken_directory_says_what_is_wrong(config: str | None, reason: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=reason):
        load_architecture(tmp_path)


def test_a_missing_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a directory"):
        load_architecture(tmp_path / "nothing")


def test_layout_of_a_block() -> None:
    shape = layout(parsed(), "bfloat16", 16)
    assert (shape.heads, shape.layers, shape.tokens, shape.dim, shape.block_bytes) == (
        2,
        4,
        16,
        8,
        2 * 4 * 2 * 16 * 8 * 2,
    )
    with pytest.raises(ModelError, match="float32, bfloat16"):
        layout(parsed(), "float16", 16)
