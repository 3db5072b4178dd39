"""The engine on the GPU path, every kernel in Triton's interpreter: the tokens that transformers generates."""

from pathlib import Path

import pytest
import torch

from cluster.messages import Sampling
from tests.workers.gpu_engines import Counting, crowded, gpu_runner
from tests.workers.tiny_models import build, generate, prompts, reference
from workers.device_blocks import DeviceBlocks
from workers.gpu_profile import Limits

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
NEW = 3


@pytest.mark.parametrize("family", ["qwen2-window", "qwen3"])
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    """Random batches of decodes, chunks and both, in shuffled blocks of a cache full of NaN."""
    model = build(family, tmp_path, num_hidden_layers=2)
    given = prompts([1, 16, 25])
    expected = [reference(model, prompt, NEW) for prompt in given]
    assert generate(gpu_runner(tmp_path, limits=Limits(64, 3, 64)), given, NEW, GREEDY, largest_chunk=14) == expected


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_with_kv_in_8_bits_too(kv_dtype: str, tmp_path: Path) -> None:
    model, given = build("llama", tmp_path, num_hidden_layers=2), prompts([1, 20])
    expected = [reference(model, prompt, NEW, kv_dtype) for prompt in given]
    runner = gpu_runner(tmp_path, 12, limits=Limits(64, 2, 64), kv_dtype=kv_dtype)
    assert generate(runner, given, NEW, GREEDY, largest_chunk=14) == expected


def test_prefix_hits_preemption_and_replayed_decodes_change_no_token(tmp_path: Path) -> None:
    model = build("llama", tmp_path, num_hidden_layers=1)
    device = Counting()
    lengths, new = [17, 15, 14], 17
    run = crowded(gpu_runner(tmp_path, 4, device, limits=Limits(64, 2, 64)), lengths, new)
    given = prompts(lengths, seed=5)
    given.append([*given[0], 7, 8])
    assert run.tokens == {f"s{index}": reference(model, prompt, new) for index, prompt in enumerate(given)}
    assert run.engine.scheduler.preemptions > 0
    assert run.cached["s3"] == 16
    assert device.replayed > 5


@pytest.mark.parametrize("kv_dtype", ["", "int8"])
def test_blocks_leave_and_come_back_byte_for_byte(kv_dtype: str, tmp_path: Path) -> None:
    build("llama", tmp_path, num_hidden_layers=2)
    runner = gpu_runner(tmp_path, 12, limits=Limits(64, 1, 64), kv_dtype=kv_dtype)
    for index in range(runner.num_blocks):
        runner.block(index)[:] = torch.randint(0, 256, (runner.layout.block_bytes,), dtype=torch.uint8).numpy()
    blocks = DeviceBlocks(runner.device_cache, runner.layout, runner.shard)
    ids = [7, 2, 11, 0]
    taken = torch.from_numpy(blocks.gather(ids).copy())
    assert [row.numpy().tobytes() for row in taken] == [runner.block(index).tobytes() for index in ids]
    before = runner.block(2).tobytes()
    blocks.scatter([3, 4, 5, 6], taken)
    assert [runner.block(index).tobytes() for index in (3, 4, 5, 6)] == [row.numpy().tobytes() for row in taken]
    assert runner.block(2).tobytes() == before
