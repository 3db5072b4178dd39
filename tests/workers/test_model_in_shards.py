"""A model cut into shards, each a process: the tokens of transformers, for every way to cut it."""

from pathlib import Path
from typing import Any

import pytest

from cluster.messages import Sampling
from tests.workers.shard_processes import ShardProcesses, worker
from tests.workers.tiny_models import build, generate, load, prompts, reference, sequence
from workers.runner import Chunk

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
LENGTHS = [1, 5, 14, 23]
NEW_TOKENS = 6
ALL = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
MODELS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {  # family or changes to it -> tp x pp
    "llama": ({}, ALL),  # 6 query heads on 2 KV heads: tp=3 and 4 replicate KV heads; 3 layers on 2 stages
    "llama-multi-head": ({"num_key_value_heads": 6}, [(2, 1), (2, 2), (4, 1)]),
    "llama-yarn": ({"num_key_value_heads": 1, "intermediate_size": 53}, [(2, 1), (3, 1), (2, 2)]),
    "llama-tied-biased": ({}, ALL),  # 3 KV heads: 2 + 1
    "mistral": ({}, [(2, 2)]),
    "qwen2": ({"tie_word_embeddings": True}, [(3, 1), (2, 2)]),
    "qwen2-window": ({}, [(1, 2), (1, 3), (2, 2)]),
    "qwen3": ({}, [(2, 1), (1, 2), (3, 1)]),
    "qwen3-tied": ({}, [(2, 2)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name: str, processes: ShardProcesses, tmp_path: Path) -> None:
    changes, grids = MODELS[name]
    model = build(name, tmp_path, **changes)
    given = prompts(LENGTHS)
    expected = [reference(model, prompt, NEW_TOKENS) for prompt in given]
    for tp, pp in grids:
        with worker(processes, tmp_path, tp, pp) as runner:
            assert generate(runner, given, NEW_TOKENS, GREEDY) == expected, (tp, pp)


def test_drawn_tokens_equal_those_of_one_shard(processes: ShardProcesses, tmp_path: Path) -> None:
    build("llama", tmp_path)
    given = prompts(LENGTHS)
    alone = load(tmp_path)
    for sampling in (Sampling(seed=1), Sampling(seed=2, top_p=0.8, repetition_penalty=1.2), Sampling(seed=3, top_k=9)):
        expected = generate(alone, given, NEW_TOKENS, sampling)
        with worker(processes, tmp_path, 3, 1) as runner:
            assert generate(runner, given, NEW_TOKENS, sampling) == expected


def test_steps_follow_each_other_through_the_stages(processes: ShardProcesses, tmp_path: Path) -> None:
    """As many steps in flight as stages: chunks of one prompt, then two sequences in turns."""
    model = build("llama", tmp_path)
    given = prompts([17, 9])
    expected = [reference(model, prompt, NEW_TOKENS) for prompt in given]
    with worker(processes, tmp_path, 1, 3) as runner:
        made = [sequence(str(i), prompt, [*range(9 * i, 9 * i + 9)], GREEDY) for i, prompt in enumerate(given)]
        first, second = made
        steps = [(first, 0, 6), (first, 6, 6), (first, 12, 5), (second, 0, 9)]
        in_flight: list[Chunk] = []
        while steps or in_flight:
            while steps and len(in_flight) < 3:
                in_flight.append(Chunk(*steps.pop(0)))
                runner.submit([in_flight[-1]])
            (token,) = runner.collect()
            chunk = in_flight.pop(0)
            chunk.sequence.computed += chunk.take
            if token is not None:
                chunk.sequence.tokens.append(token)
                if chunk.sequence.new_tokens < NEW_TOKENS:
                    steps.append((chunk.sequence, chunk.sequence.computed, 1))
    assert [s.tokens[s.prompt_length :] for s in made] == expected
