"""Generated traffic is what its text says, and always the same."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from loadtests.simulator.generators import KINDS, generate, help_text, read
from loadtests.simulator.trace import Trace

SHORT = {kind: f"{kind}:rate=2,seconds=200" for kind in KINDS}


def variation(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.mean(values)


def gaps(trace: Trace) -> list[float]:
    arrivals = [r.arrival_s for r in trace.requests]
    return [after - before for before, after in itertools.pairwise(arrivals)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_sound_trace_and_repeats(kind: str) -> None:
    trace = generate(SHORT[kind])
    assert trace == generate(SHORT[kind])
    assert trace != generate(SHORT[kind] + ",seed=1")
    assert [r.arrival_s for r in trace.requests] == sorted(r.arrival_s for r in trace.requests)
    for r in trace.requests:
        full, filled = r.prompt_tokens // trace.block_size, (r.prompt_tokens + r.output_tokens) // trace.block_size
        assert len(r.blocks) == -(-r.prompt_tokens // trace.block_size)
        assert len(r.output_blocks) == filled - full
        assert len(set(r.blocks + r.output_blocks)) == len(r.blocks) + len(r.output_blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_chained(kind: str) -> None:
    """Equal ids mean equal prefixes: no block follows two different ones."""
    before: dict[int, int] = {}
    trace = generate(SHORT[kind])
    for r in trace.requests:
        full = r.blocks[: r.prompt_tokens // trace.block_size] + r.output_blocks
        for parent, block in zip((-1, *full), full, strict=False):
            assert before.setdefault(block, parent) == parent


def test_poisson_has_the_rate_and_lengths_asked_for() -> None:
    trace = generate("poisson:rate=20,seconds=300,input=700,output=90")
    assert len(trace.requests) == pytest.approx(6000, rel=0.05)
    assert variation(gaps(trace)) == pytest.approx(1, abs=0.1)
    assert {(r.prompt_tokens, r.output_tokens) for r in trace.requests} == {(700, 90)}
    varied = [float(r.prompt_tokens) for r in generate("poisson:rate=20,seconds=300,input=700,spread=0.5").requests]
    assert statistics.mean(varied) == pytest.approx(700, rel=0.05)
    assert variation(varied) == pytest.approx(0.5, rel=0.1)


def test_gamma_bursts_vary_as_asked() -> None:
    trace = generate("gamma:rate=20,seconds=600,cv=4")
    assert trace.rate == pytest.approx(20, rel=0.15)
    assert variation(gaps(trace)) == pytest.approx(4, rel=0.2)


def test_a_square_wave_changes_rate_and_mix_at_once() -> None:
    trace = generate("square:rate=4,rate2=12,period=20,seconds=400,input=4000,output=50,input2=500,output2=400")
    first = [r for r in trace.requests if r.arrival_s % 20 < 10]
    second = [r for r in trace.requests if r.arrival_s % 20 >= 10]
    assert {(r.prompt_tokens, r.output_tokens) for r in first} == {(4000, 50)}
    assert {(r.prompt_tokens, r.output_tokens) for r in second} == {(500, 400)}
    assert len(second) / len(first) == pytest.approx(3, rel=0.15)
    silent = generate("square:rate=4,rate2=0,period=20,seconds=400")
    assert all(r.arrival_s % 20 < 10 for r in silent.requests)


def test_a_day_has_its_peak_in_the_middle() -> None:
    trace = generate("diurnal:rate=10,peak=1.8,period=1000,seconds=1000")
    thirds = [sum(a <= r.arrival_s < a + 200 for r in trace.requests) for a in (0, 400, 800)]
    assert trace.rate == pytest.approx(10, rel=0.1)
    assert thirds[1] > 3 * max(thirds[0], thirds[2])


def test_sessions_grow_by_answer_and_question() -> None:
    trace = generate("sessions:rate=1,seconds=400,turns=4,first=300,new=50,output=200,think=20,system=640")
    turns = {(r.session, r.turn): r for r in trace.requests}
    count = [sum(1 for session, _ in turns if session == s) for s in {s for s, _ in turns}]
    assert statistics.mean(count) == pytest.approx(4, rel=0.15)
    system = {r.blocks[:10] for r in trace.requests}
    assert len(system) == 1
    for (session, turn), r in turns.items():
        if (session, turn + 1) in turns:
            following = turns[session, turn + 1]
            assert following.prompt_tokens == r.prompt_tokens + r.output_tokens + 50
            said = r.blocks[: r.prompt_tokens // 64] + r.output_blocks
            assert following.blocks[: len(said)] == said
    thought = [r.think_s for r in trace.requests if r.think_s is not None]
    assert statistics.mean(thought) == pytest.approx(20, rel=0.1)
    assert len(thought) == sum(r.turn > 0 for r in trace.requests)


def test_system_prompts_are_shared_by_skew() -> None:
    trace = generate("shared:rate=20,seconds=300,prompts=4,skew=1,system=640,input=1000")
    groups: dict[tuple[int, ...], int] = {}
    for r in trace.requests:
        groups[r.blocks[:10]] = groups.get(r.blocks[:10], 0) + 1
    sizes = sorted(groups.values(), reverse=True)
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.15)


def test_agents_repeat_about_half_of_what_they_say() -> None:
    trace = generate("agents:seconds=600")
    seen: set[int] = set()
    hits = 0
    for r in trace.requests:
        hits += sum(block in seen for block in r.blocks)
        seen.update(r.blocks + r.output_blocks)
    assert 0.5 < hits / sum(len(r.blocks) for r in trace.requests) < 0.65


def test_read_takes_a_file_or_a_text(tmp_path: Path) -> None:
    row = '{"arrival_ms": 0, "prompt_tokens": 16, "output_tokens": 3, "blocks": [0]}'
    (tmp_path / "trace.jsonl").write_text(f'{{"tandem_trace": 1, "block_size": 16}}\n{row}\n')
    assert len(read(str(tmp_path / "trace.jsonl")).requests) == 1
    assert read("poisson:seconds=10") == generate("poisson:seconds=10")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("nothing.jsonl", "no such file"),
        ("poisson:speed=5", "poisson has no 'speed'; it takes rate"),
        ("poisson:rate=fast", "no number"),
        ("poisson:rate=0", "rate cannot be 0"),
        ("poisson:rate=-1", "rate cannot be -1"),
        ("poisson:rate=nan", "rate cannot be nan"),
        ("poisson:input=inf", "input cannot be inf"),
        ("poisson:rate=1e9", "more than"),
        ("poisson:rate=0.001,seconds=1", "nothing arrives"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(text: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        read(text)


def test_the_help_names_every_kind_and_parameter() -> None:
    assert all(f"{kind}:" in help_text() for kind in KINDS)
    assert "think=30.0" in help_text()
