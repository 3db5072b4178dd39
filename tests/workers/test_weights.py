"""Checkpoints whole, sharded and broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError
from cluster.messages import Sampling
from tests.workers.tiny_models import build, generate, load, prompts, reference
from workers.architecture import load_architecture
from workers.weights import load_weights

Tensors = dict[str, torch.Tensor]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def rewrite(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shard(directory: Path, tensors: Tensors, both: str | None = None) -> None:
    """Write the tensors as three shards; `both` goes into two of them."""
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index in range(3):
        part = {name: tensors[name] for name in names[index::3]} | ({both: tensors[both]} if both and index else {})
        save_file(part, directory / f"model-{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{index}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(directory: Path, progress: Callable[[float], None] | None = None) -> None:
    load_weights(directory, load_architecture(directory), torch.float32, torch.device("cpu"), progress)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    model = build("llama", tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"))
    given = prompts([9, 4])
    assert generate(load(tmp_path), given, 6, Sampling(temperature=0.0)) == [reference(model, p, 6) for p in given]


def test_progress_rises_to_one(tmp_path: Path) -> None:
    build("llama", tmp_path)
    seen: list[float] = []
    read(tmp_path, seen.append)
    assert seen == sorted(seen)
    assert (len(seen), seen[-1]) == (4, 1.0)


def test_a_half_precision_checkpoint_is_converted(tmp_path: Path) -> None:
    build("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    weights = load_weights(tmp_path, load_architecture(tmp_path), torch.float32, torch.device("cpu"))
    assert weights.embedding.dtype is torch.float32
    assert torch.equal(weights.norm, load_file(tmp_path / "model.safetensors")["model.norm.weight"].float())


def test_a_tied_checkpoint_may_carry_its_output_matrix_too(tmp_path: Path) -> None:
    build("llama-tied-biased", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    read(tmp_path)


def test_derived_buffers_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    build("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    read(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(K_PROJ), f"lack {K_PROJ}"),
        (lambda t: t.pop("lm_head.weight"), "lack lm_head.weight"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].T.contiguous()}), f"{K_PROJ} in .* has shape .* implies"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.int8)}), "type I8; quantized"),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.bias": torch.zeros(32)}),
            "k_proj.bias, which config.json does not",
        ),
    ],
)
def test_a_tensor_at_fault_is_named(change: Callable[[Tensors], None], reason: str, tmp_path: Path) -> None:
    build("llama", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ModelError, match=reason):
        read(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    build("llama", tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"), both=K_PROJ)
    with pytest.raises(ModelError, match=f"{K_PROJ} is in both"):
        read(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_a_truncated_file_is_named(size: int, tmp_path: Path) -> None:
    build("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file.*download it again"):
        read(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    build("llama", tmp_path)
    shard(tmp_path, load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-1\.safetensors"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="not a safetensors index"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="neither"):
        read(tmp_path)
