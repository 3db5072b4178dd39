"""The GPU's runner, on a CPU: the tokens of the CPU's, whatever the batch, and what it asks of its device."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import ModelError
from cluster.messages import Sampling
from kernels.paged_attention import CHUNK
from tests.workers import local_links
from tests.workers.gpu_engines import BLOCK, LIMITS, Counting, Sized, block_bytes, cpu_runner, crowded, gpu_runner
from tests.workers.tiny_models import build, generate, prompts, sequence
from workers.architecture import load_architecture, sizes
from workers.device import Device
from workers.gpu_profile import Limits
from workers.gpu_runner import GpuRunner
from workers.runner import Chunk
from workers.sequence import Sequence
from workers.shard import shards

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
SAMPLINGS = [
    GREEDY,
    Sampling(seed=1),
    Sampling(seed=2, temperature=0.8, top_p=0.9, top_k=30),
    Sampling(seed=3, min_p=0.05),
    Sampling(seed=4, repetition_penalty=1.3, frequency_penalty=0.2),
    Sampling(temperature=0.0, logit_bias=((5, 4.0), (9, -3.0))),
    Sampling(seed=6, min_tokens=30, stop_token_ids=(3, 4)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build("llama", directory, max_position_embeddings=1200)
    return directory


@pytest.mark.parametrize(
    "family", ["llama", "llama-tied-biased", "llama-multi-head", "mistral", "qwen2-window", "qwen3"]
)
def test_greedy_tokens_are_those_of_the_cpus_runner(family: str, tmp_path: Path) -> None:
    build(family, tmp_path)
    given = prompts([1, 15, 16, 17, 40])
    expected = generate(cpu_runner(tmp_path), given, 8, GREEDY)
    assert generate(gpu_runner(tmp_path), given, 8, GREEDY, largest_chunk=30) == expected


def test_chunks_prefix_hits_and_preemption_change_no_token(model: Path) -> None:
    lengths = [70, 5, 33, 90, 16, 64]
    here = crowded(gpu_runner(model, blocks=24, limits=Limits(64, 8, 256)), lengths, 90)
    there = crowded(cpu_runner(model), lengths, 90)
    assert here.tokens == there.tokens
    assert here.engine.scheduler.preemptions > 0
    assert there.engine.scheduler.preemptions == 0
    assert here.cached["s4"] == there.cached["s4"] == 64


def test_drawn_tokens_are_those_of_the_cpus_runner_penalties_included(model: Path) -> None:
    lengths = [20, 5, 33, 17, 16, 64]
    here = crowded(gpu_runner(model), lengths, 20, SAMPLINGS)
    assert here.tokens == crowded(cpu_runner(model), lengths, 20, SAMPLINGS).tokens


def test_a_context_of_several_chunks_of_keys(model: Path) -> None:
    given = prompts([CHUNK + 30, 2 * CHUNK - 3])
    expected = generate(cpu_runner(model), given, 6, GREEDY, largest_chunk=300)
    assert generate(gpu_runner(model), given, 6, GREEDY, largest_chunk=300) == expected


def test_steps_of_decodes_are_replayed_and_others_are_not(model: Path) -> None:
    device = Counting()
    runner = gpu_runner(model, device=device)
    assert device.captured == 4 * 2  # 1, 2, 4 and 8 rows of up to 512 and 1,536 keys
    made = [sequence(str(i), p, [*range(8 * i, 8 * i + 8)], GREEDY) for i, p in enumerate(prompts([20, 30, 40]))]
    steps = [[(s, s.gap) for s in made], [(s, 1) for s in made], [(made[0], 1), (made[1], 1)]]
    replayed = []
    for step in steps:
        for (s, _), token in zip(step, runner.run([Chunk(s, s.computed, take) for s, take in step]), strict=True):
            s.computed = len(s.tokens)
            assert token is not None
            s.tokens.append(token)
        replayed.append(device.replayed)
    assert replayed == [0, 1, 2]


def test_a_step_goes_on_from_tokens_that_the_host_has_not_seen(model: Path) -> None:
    runner = gpu_runner(model)
    given = prompts([20, 30, 9, 33])
    expected = generate(cpu_runner(model), given, 5, GREEDY)
    a, b, c, d = made = [sequence(str(i), p, [*range(8 * i, 8 * i + 8)], GREEDY) for i, p in enumerate(given)]
    steps: list[list[Chunk]] = []

    def submit(*parts: tuple[Sequence, int, int]) -> None:
        chunks = []
        for s, take, ahead in parts:
            chunks.append(Chunk(s, s.computed + s.in_flight, take, ahead))
            s.in_flight += take
        runner.submit(chunks)
        steps.append(chunks)

    def collect() -> None:
        for chunk, token in zip(steps.pop(0), runner.collect(), strict=True):
            chunk.sequence.computed += chunk.take
            chunk.sequence.in_flight -= chunk.take
            if token is not None:
                chunk.sequence.tokens.append(token)

    submit((a, 20, 0), (b, 30, 0), (c, 9, 0))
    submit((c, 1, 1), (a, 1, 1))  # a graph after a step that was none, in another order
    collect()
    submit((a, 1, 1), (b, 1, 0), (c, 1, 1))
    collect()
    submit((d, 20, 0), (c, 1, 1), (b, 1, 1), (a, 1, 1))  # and one that is none after a graph
    collect()
    submit((d, 13, 0), (a, 1, 1))
    collect()
    collect()
    assert [s.tokens[s.prompt_length :] for s in made] == [e[:n] for e, n in zip(expected, (5, 3, 4, 1), strict=True)]


def test_a_decode_that_ends_no_sequence_yields_no_token(model: Path) -> None:
    runner = gpu_runner(model)
    first, second = (sequence(str(i), p, [5 * i, 5 * i + 1], GREEDY) for i, p in enumerate(prompts([8, 8])))
    tokens = runner.run([Chunk(first, 0, 1), Chunk(second, 0, 8)])
    assert tokens[0] is None
    assert tokens[1] is not None


def test_what_cannot_be_captured_is_launched_instead_and_said_once(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(Device):
        def capture(self, run: object) -> object:  # type: ignore[override]
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    given = prompts([20, 9])
    runner = gpu_runner(model, device=Stubborn())
    assert generate(runner, given, 5, GREEDY) == generate(cpu_runner(model), given, 5, GREEDY)
    (said,) = [record.message for record in caplog.records if "kernel by kernel" in record.message]
    assert "not permitted when stream is capturing)" in said


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_shards_compute_the_tokens_of_one(model: Path, tp: int, pp: int) -> None:
    parts = shards(sizes(load_architecture(model)), tp, pp)
    links = local_links.links(tp, pp)
    limits = Limits(64, 4, 120)
    runners = local_links.together(
        [
            lambda shard=shard: gpu_runner(model, shard=shard, links=links[shard.rank], limits=limits)  # type: ignore[misc]
            for shard in parts
        ]
    )

    class Together:
        layout, num_blocks = runners[0].layout, runners[0].num_blocks

        def run(self, chunks: list[Chunk]) -> list[int | None]:
            found = local_links.together([lambda runner=runner: runner.run(chunks) for runner in runners])  # type: ignore[misc]
            last: list[int | None] = found[-1]
            return last

    given = prompts([1, 17, 40])
    for sampling in (GREEDY, SAMPLINGS[2], SAMPLINGS[4]):
        expected = generate(cpu_runner(model), given, 5, sampling)
        assert generate(Together(), given, 5, sampling) == expected


def test_the_cache_takes_what_the_largest_step_leaves(model: Path) -> None:
    block = block_bytes(model)
    total = 400 * block
    runner = GpuRunner.load(model, "float32", BLOCK, 0, LIMITS, None, Sized(total, 5 * block, 160 * block))
    assert runner.num_blocks == 360 - 160


def test_a_model_that_does_not_fit_is_refused_with_what_would(model: Path) -> None:
    block = block_bytes(model)
    total = 400 * block
    with pytest.raises(ModelError, match=r"lower max_context to 960 or share it among"):
        GpuRunner.load(model, "float32", BLOCK, 0, LIMITS, None, Sized(total, 5 * block, 300 * block))
    before = Sized(total, 390 * block, 0)
    with pytest.raises(ModelError, match="fewer than one sequence of 1200"):
        GpuRunner.load(model, "float32", BLOCK, 0, LIMITS, None, before)
    assert before.answers == [0], "refused before the weights were loaded"
    with pytest.raises(ModelError, match="set kv_memory"):
        GpuRunner.load(
            model, "float32", BLOCK, 0, LIMITS, None, Device(), shards(sizes(load_architecture(model)), 1, 2)[0]
        )


def test_a_step_that_does_not_fit_is_refused_with_what_to_lower(model: Path) -> None:
    class Full(Sized):
        def memory(self, run: Callable[[], None]) -> tuple[int, int]:
            if self.answers[0] == 0:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().memory(run)

    block = block_bytes(model)
    with pytest.raises(ModelError, match="64 tokens and 8 sequences does not fit"):
        GpuRunner.load(model, "float32", BLOCK, 0, LIMITS, None, Full(400 * block, block, 0))


def test_what_the_kernels_do_not_serve_is_refused_with_what_they_do(model: Path) -> None:
    with pytest.raises(ModelError, match="multiple of 16 up to 128"):
        GpuRunner.load(model, "float32", 8, 2**24, LIMITS, None, Device())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run it on one that has none")
def test_without_a_gpu_it_says_so(model: Path) -> None:
    with pytest.raises(ModelError, match="finds no GPU"):
        GpuRunner.load(model, "float32", BLOCK, 2**24, LIMITS)


def test_blocks_are_the_cpus_bytes(model: Path) -> None:
    (prompt,) = prompts([40])
    found = []
    for runner in (gpu_runner(model), cpu_runner(model)):
        made = sequence("a", prompt, [3, 9, 4], GREEDY)
        runner.run([Chunk(made, 0, 40)])
        found.append(np.stack([runner.block(index) for index in (3, 9)]).view(np.float32))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
