"""GGUF conversion: the demo model against transformers' own reader, every family against the weights it was made of."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cluster.errors import ModelError
from deploy.models import demo_file
from tests.workers.gguf_files import BF16, F16, Q8_0, byte_vocabulary, metadata_of, random_model, tensors_of, write_gguf
from tests.workers.gguf_files import sentence_piece_vocabulary as sentence_pieces
from workers.architecture import load_architecture
from workers.gguf import convert
from workers.model_cache import cache_root

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An empty cache for every test. The demo model's own is resolved before this hides it."""
    if "smollm2" in request.fixturenames:
        request.getfixturevalue("smollm2")
        request.getfixturevalue("demo_gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root()


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    return demo_file()


def silent(fraction: float) -> None:
    pass


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def written(path: Path, model: Any, metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    """The model as a GGUF file."""
    return write_gguf(path, metadata_of(model) | byte_vocabulary() | (metadata or {}), tensors_of(model), **options)


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"] if cache.exists() else []


# -------------------------------------------------------------------------------------------------------- real model
def test_the_demo_model_computes_what_transformers_reads_from_the_same_file(smollm2: Path, demo_gguf: Path) -> None:
    # from_pretrained(gguf_file=...) does the same but wants the accelerate package
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(load_gguf_checkpoint(demo_gguf)["config"])).eval()
    tensors = load_gguf_checkpoint(demo_gguf, return_tensors=True, model_to_load=theirs)["tensors"]
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    ours = load(smollm2)
    ids = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-4)
    assert ours.config.max_position_embeddings == 8192
    assert ours.generation_config.eos_token_id == [2, 0]


# ---------------------------------------------------------------------------------------------------------- families
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_exactly(name: str, tmp_path: Path) -> None:
    model_type, changes = FAMILIES[name]
    model = random_model(model_type, **changes)
    directory = convert(written(tmp_path / "model.gguf", model), silent)
    loaded = load(directory)
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    ids = list(range(3, 60))  # longer than mistral's window
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=0)
    assert load_architecture(directory).eos_token_ids == (2, 0)


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0], ids=lambda kind: kind.name)
def test_stored_types_keep_the_values_they_have(kind: Any, tmp_path: Path) -> None:
    model = random_model("llama", tie_word_embeddings=True)
    expected = {
        name: values for name, values in tensors_of(model).items() if name == "token_embd.weight" or ".ffn_" in name
    }
    loaded = load(convert(written(tmp_path / "model.gguf", model, kind=kind), silent)).state_dict()
    embedding = dequantize(quantize(expected["token_embd.weight"], kind), kind)
    np.testing.assert_array_equal(loaded["model.embed_tokens.weight"].numpy(), embedding)
    gate = dequantize(quantize(expected["blk.1.ffn_gate.weight"], kind), kind)
    np.testing.assert_array_equal(loaded["model.layers.1.mlp.gate_proj.weight"].numpy(), gate)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    directory = convert(written(tmp_path / "model.gguf", random_model("qwen3"), kind=BF16), silent)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_llama3_scaling_is_recovered_from_its_frequencies(tmp_path: Path) -> None:
    model = random_model("llama", rope_parameters=LLAMA3)
    converted = convert(write_gguf(tmp_path / "model.gguf", *with_frequencies(model, frequencies(model))), silent)
    assert load(converted).config.rope_parameters == LLAMA3
    ids = list(range(3, 90))
    torch.testing.assert_close(logits(load(converted), ids), logits(model, ids), rtol=0, atol=0)


def test_other_frequency_scaling_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", rope_parameters=LLAMA3)
    path = write_gguf(tmp_path / "model.gguf", *with_frequencies(model, frequencies(model) + 0.5))
    with pytest.raises(ModelError, match="not Llama 3's"):
        convert(path, silent)


def frequencies(model: Any) -> npt.NDArray[np.float32]:
    """What llama.cpp stores: by how much each rotary frequency is divided."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1 / LLAMA3["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    return (plain / scaled).numpy().astype(np.float32)


def with_frequencies(model: Any, values: npt.NDArray[np.float32]) -> tuple[dict[str, Any], dict[str, Any]]:
    return metadata_of(model) | byte_vocabulary(), tensors_of(model) | {"rope_freqs.weight": values}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none"}, {"rope_type": "default", "rope_theta": 50_000.0}),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_declared_scaling_reaches_the_config(scaling: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    metadata = {f"qwen2.rope.scaling.{key}": value for key, value in scaling.items()}
    directory = convert(written(tmp_path / "model.gguf", random_model("qwen2"), metadata), silent)
    assert json.loads((directory / "config.json").read_text())["rope_parameters"] == expected
    assert load_architecture(directory).rope.kind == expected["rope_type"]


def test_a_sentencepiece_model_comes_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    vocabulary = sentence_pieces() | {"tokenizer.chat_template": "{{ messages }}"}
    model = random_model("llama", vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "model.gguf", metadata_of(model) | vocabulary, tensors_of(model))
    directory = convert(path, silent)
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((directory / "tokenizer_config.json").read_text())["unk_token"] == "<unk>"
    assert json.loads((directory / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2]}


def test_large_models_are_split_into_indexed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.safetensors_writer.SHARD_BYTES", 100_000)
    model = random_model("llama")
    directory = convert(written(tmp_path / "model.gguf", model), silent)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    assert not (directory / "model.safetensors").exists()
    assert all(path.stat().st_size < 110_000 for path in files)
    ids = [5, 6, 7]
    torch.testing.assert_close(logits(load(directory), ids), logits(model, ids), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- cache
def test_the_second_conversion_is_a_cache_hit(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "model.gguf", random_model("llama"))
    fractions: list[float] = []
    first = convert(path, fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) > 10
    inode, fractions[:] = (first / "model.safetensors").stat().st_ino, []
    copy = path.with_name("renamed.gguf")
    copy.write_bytes(path.read_bytes())
    assert convert(copy, fractions.append) == first
    assert fractions == [1.0]
    assert (first / "model.safetensors").stat().st_ino == inode
    assert leftovers(cache) == [first.name]


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "model.gguf", random_model("llama"))
    die = "lambda fraction: fraction > 0.5 and os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(converting(path, die), timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert all(name.endswith(".partial") for name in leftovers(cache))
    directory = convert(path, silent)
    assert leftovers(cache) == [directory.name]


def test_processes_that_convert_at_once_do_it_once(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "model.gguf", random_model("llama"))
    both = [subprocess.Popen(converting(path, "print"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert min(len(output) for output in outputs) == 1  # one converted, the other found the result
    assert max(len(output) for output in outputs) > 10
    assert len(leftovers(cache)) == 1


def converting(path: Path, progress: str) -> list[str]:
    imports = "import os, signal, sys; from pathlib import Path; from workers.gguf import convert"
    code = f"{imports}; convert(Path(sys.argv[1]), {progress})"
    return [sys.executable, "-c", code, str(path)]


# ------------------------------------------------------------------------------------------------------------ errors
def test_a_file_that_is_not_gguf(tmp_path: Path, cache: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 a zip file"):
        (tmp_path / "model.gguf").write_bytes(content)
        with pytest.raises(ModelError, match="is not a GGUF file; give"):
            convert(tmp_path / "model.gguf", silent)
    with pytest.raises(ModelError, match="No such file"):
        convert(tmp_path / "missing.gguf", silent)
    assert leftovers(cache) == []


def test_a_truncated_file_at_any_length(tmp_path: Path, cache: Path) -> None:
    whole = written(tmp_path / "model.gguf", random_model("llama")).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [4, 8, 20, 40, *np.linspace(64, len(whole) - 1, 25, dtype=int)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"damaged or incomplete|lacks"):
            convert(cut, silent)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma3"}, "architecture 'gemma3' is not supported"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 8}, "rotary, key and value sizes differ"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.block_count": 3}, r"lacks model\.layers\.2\."),
        ({"llama.block_count": 1}, r"has model\.layers\.1\."),
        ({"llama.attention.head_count": [4, 2]}, "different attention.head_count per layer"),
        ({"split.count": 2}, "llama-gguf-split"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'"),
    ],
)
def test_what_is_not_supported_is_named(metadata: dict[str, Any], message: str, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match=message):
        convert(written(tmp_path / "model.gguf", random_model("llama"), metadata), silent)
    assert leftovers(cache) == []


def test_tensors_must_be_exactly_those_of_the_model(tmp_path: Path) -> None:
    model = random_model("llama")
    metadata, tensors = metadata_of(model) | byte_vocabulary(), tensors_of(model)
    unknown = {"blk.0.ssm_conv1d.weight": np.zeros((4, 4), np.float32)}
    with pytest.raises(ModelError, match=r"'blk\.0\.ssm_conv1d\.weight' belongs to no supported model"):
        convert(write_gguf(tmp_path / "unknown.gguf", metadata, tensors | unknown), silent)
    del tensors["blk.1.attn_norm.weight"]
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.input_layernorm\.weight"):
        convert(write_gguf(tmp_path / "missing.gguf", metadata, tensors), silent)


def test_a_missing_size_is_named(tmp_path: Path) -> None:
    model = random_model("llama")
    metadata = metadata_of(model) | byte_vocabulary()
    del metadata["llama.embedding_length"]
    with pytest.raises(ModelError, match="lacks 'embedding_length'"):
        convert(write_gguf(tmp_path / "model.gguf", metadata, tensors_of(model)), silent)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.gguf", random_model("llama"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME moves it"):
        convert(path, silent)
