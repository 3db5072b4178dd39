"""The runner behind its protocol: sizes, block bytes, and tokens that do not depend on company or place."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.messages import Sampling
from tests.workers.tiny_models import BLOCK, VOCAB, build, generate, load, prompts, sequence
from workers.architecture import load_architecture, sizes
from workers.model_runner import ModelRunner
from workers.runner import Chunk, Stage
from workers.sequence import Sequence
from workers.shard import shards

GREEDY = Sampling(temperature=0.0, max_tokens=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build("llama", directory)
    return directory


def advance(runner: Stage, sequences: list[Sequence], takes: list[int] | None = None) -> None:
    """One step; without `takes`, everything that is missing."""
    chunks = [
        Chunk(s, s.computed, take) for s, take in zip(sequences, takes or [s.gap for s in sequences], strict=True)
    ]
    for chunk, token in zip(chunks, runner.run(chunks), strict=True):
        chunk.sequence.computed += chunk.take
        if token is not None:
            chunk.sequence.tokens.append(token)


def test_it_is_a_runner_of_the_size_asked_for(model: Path) -> None:
    runner: Stage = ModelRunner.load(model, "bfloat16", BLOCK, 1_000_000, 100)
    assert runner.num_blocks == 1_000_000 // runner.layout.block_bytes
    assert runner.layout.block_bytes == 2 * 3 * 2 * BLOCK * 16 * 2
    assert runner.vocab_size == VOCAB


def test_a_context_that_cannot_be_is_refused_with_what_can(model: Path) -> None:
    with pytest.raises(ModelError, match=r"exceeds.*at most 128"):
        ModelRunner.load(model, "float32", BLOCK, 2**24, 129)
    block_bytes = load(model).layout.block_bytes
    with pytest.raises(ModelError, match=rf"holds 124 tokens.*{32 * block_bytes} bytes"):
        ModelRunner.load(model, "float32", BLOCK, 32 * block_bytes - 1, 128)
    assert ModelRunner.load(model, "float32", BLOCK, 31 * block_bytes, 124).max_context == 124
    assert ModelRunner.load(model, "float32", BLOCK, 32 * block_bytes, 0).max_context == 128


def test_all_shards_have_as_many_blocks_as_the_worker_has_memory_for(model: Path) -> None:
    """2 KV heads on 3 tensor ranks: one of them is held twice."""
    one = load(model).layout.block_bytes
    parts = shards(sizes(load_architecture(model)), 3, 2)
    runners = [ModelRunner.load(model, "float32", BLOCK, 60 * one, 100, shard=shard) for shard in parts]
    assert [runner.num_blocks for runner in runners] == [40] * 6
    assert {runner.layout.block_bytes for runner in runners} == {one}
    for runner, shard in zip(runners, parts, strict=True):
        assert len(runner.block(39)) == shard.part(runner.layout).block_bytes
    with pytest.raises(ModelError, match=rf"set kv_memory to {25 * one * 3 // 2} bytes"):
        ModelRunner.load(model, "float32", BLOCK, 25 * one, 100, shard=parts[5])


def test_a_block_is_a_writable_view_in_the_canonical_order(model: Path) -> None:
    runner = load(model)
    (prompt,) = prompts([BLOCK])
    made = sequence("a", prompt, [5, 6], GREEDY)
    advance(runner, [made])
    block = runner.block(5)
    assert block.nbytes == runner.layout.block_bytes
    layout = runner.layout
    cells = block.view(np.float32).reshape(layout.heads, layout.layers, 2, layout.tokens, layout.dim)
    assert np.isfinite(cells).all()
    # the first token's value in layer 0 does not depend on its position or neighbours: it is the same in another block
    other = sequence("b", [prompt[3], prompt[0]], [9], GREEDY)
    advance(runner, [other])
    again = runner.block(9).view(np.float32).reshape(cells.shape)
    np.testing.assert_allclose(again[:, 0, 1, 1], cells[:, 0, 1, 0], rtol=1e-5, atol=1e-6)
    block[:] = 0
    assert not runner.block(5).any()


def test_copied_blocks_continue_the_sequence_in_another_runner(model: Path) -> None:
    prefill, decode = load(model), load(model)
    (prompt,) = prompts([10])
    here = sequence("a", prompt, [3, 1, 7, 8, 9, 10], GREEDY)
    advance(prefill, [here])
    there = sequence("a", prompt, [20, 2, 11, 4, 5, 6], GREEDY)
    for source, target in zip(here.block_table[:3], there.block_table[:3], strict=True):
        decode.block(target)[:] = prefill.block(source)
    there.computed, there.tokens = 10, list(here.tokens)
    for _ in range(8):
        advance(prefill, [here])
        advance(decode, [there])
    assert here.tokens == there.tokens


def test_sequences_share_prefix_blocks(model: Path) -> None:
    runner = load(model)
    (prompt,) = prompts([11])
    first = sequence("a", prompt, [0, 1, 2, 3, 4], GREEDY)
    advance(runner, [first])
    second = sequence("b", prompt, [0, 1, 12, 13, 14], GREEDY)
    second.computed = 2 * BLOCK
    advance(runner, [second, first])
    advance(runner, [second])
    assert second.tokens == first.tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(seed=4, temperature=0.8, top_p=0.9, top_k=30)])
def test_tokens_do_not_depend_on_batch_chunks_or_blocks(model: Path, sampling: Sampling) -> None:
    runner = load(model, blocks=160)
    given = prompts([1, 6, 13, 21, 8, 17])
    alone = [generate(runner, [prompt], 12, sampling)[0] for prompt in given]
    for seed in range(3):
        assert generate(runner, given, 12, sampling, seed=seed, largest_chunk=5 + 9 * seed) == alone


def test_a_resumed_generation_continues_with_the_same_tokens(model: Path) -> None:
    runner = load(model)
    (prompt,) = prompts([9])
    sampling = Sampling(seed=11, repetition_penalty=1.2, frequency_penalty=0.3)
    (whole,) = generate(runner, [prompt], 10, sampling)
    resumed = sequence("a", prompt, [*range(5)], sampling)
    resumed.generation = replace(resumed.generation, output=tuple(whole[:4]))
    resumed = Sequence(resumed.generation, "router", b"", 0.0, block_table=[*range(5)])
    while resumed.new_tokens < 10:
        advance(runner, [resumed])
    assert resumed.tokens[9:] == whole


def test_a_chunk_that_leaves_a_gap_yields_no_token(model: Path) -> None:
    runner = load(model)
    made = [
        sequence(str(index), prompt, [3 * index, 3 * index + 1, 3 * index + 2], GREEDY)
        for index, prompt in enumerate(prompts([8, 8]))
    ]
    tokens = runner.run([Chunk(made[0], made[0].computed, 1), Chunk(made[1], made[1].computed, 8)])
    assert tokens[0] is None
    assert tokens[1] is not None
