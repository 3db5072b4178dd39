"""Checkpoints whole, sharded and broken."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ModelError
from cluster.messages import Sampling
from tests.workers.shard_processes import ShardProcesses, State
from tests.workers.tiny_models import build, generate, load, prompts, reference
from workers.architecture import load_architecture, sizes
from workers.safetensors_writer import Planned, write_shards
from workers.shard import Shard, shards, whole
from workers.weights import Weights, load_weights, shapes

Tensors = dict[str, torch.Tensor]
CONSTANT_BYTES = 12 * 2**20  # of code that runs for the first time, and the buffer of one read
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


def read(directory: Path, progress: Callable[[float], None] | None = None) -> Weights:
    architecture = load_architecture(directory)
    return load_weights(
        directory, architecture, whole(sizes(architecture)), torch.float32, torch.device("cpu"), progress
    )


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
    weights = read(tmp_path)
    assert weights.embedding is not None
    assert weights.norm is not None
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
    architecture = load_architecture(tmp_path)
    for other in shards(sizes(architecture), 1, 3)[::2]:  # the fault is in another stage's layer
        with pytest.raises(ModelError, match=reason):
            load_weights(tmp_path, architecture, other, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("name", "pp"), [("llama", 1), ("llama", 2), ("llama-tied-biased", 2)])
def test_shards_share_out_the_vocabulary(name: str, pp: int, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    architecture = load_architecture(tmp_path)
    rows = []
    for shard in shards(sizes(architecture), 3, pp):
        weights = load_weights(tmp_path, architecture, shard, torch.float32, torch.device("cpu"))
        assert len(weights.layers) == shard.layers[1] - shard.layers[0]
        assert (weights.embedding is not None) == shard.first_stage
        assert (weights.logits is not None) == (weights.norm is not None) == shard.last_stage
        rows += [] if weights.embedding is None else [weights.embedding]
    assert torch.equal(torch.cat(rows), model.get_input_embeddings().weight)


def test_a_rank_never_holds_more_than_its_share(processes: ShardProcesses, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6,
        "num_attention_heads": 8, "vocab_size": 16000, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = load_architecture(tmp_path)
    planned = {
        name: Planned(shape, "F32", partial(np.ones, shape, np.float32)) for name, shape in shapes(architecture).items()
    }
    write_shards(tmp_path, planned, lambda _: None)
    share = sum(tensor.nbytes for tensor in planned.values()) / 2
    assert share > 4 * CONSTANT_BYTES
    parts = shards(sizes(architecture), 2, 1) + shards(sizes(architecture), 1, 2)
    # each in a process that had no large weights before, whose memory it might use
    for growth in processes.all(growth_while_loading, [(tmp_path, shard) for shard in parts]):
        assert share < growth < share * 1.15 + CONSTANT_BYTES


def growth_while_loading(state: State, directory: Path, shard: Shard) -> int:
    """Bytes by which this process exceeded what it had before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = _memory("VmRSS")
    with torch.inference_mode():
        weights = load_weights(directory, load_architecture(directory), shard, torch.float32, torch.device("cpu"))
    assert weights.layers
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


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
