"""Every trace format is read for what it says, and what is wrong with a file is named by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from loadtests.simulator.trace import Trace, TraceRequest, load

SESSIONS = "session,turn,input_total,new_user_tokens,cached_prefix_tokens,output_tokens\n"


def mooncake(*rows: tuple[float, int, int, list[int]]) -> str:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)


def own(*rows: dict[str, object], block_size: int = 16) -> str:
    return "".join(json.dumps(row) + "\n" for row in ({"tandem_trace": 1, "block_size": block_size}, *rows))


def written(folder: Path, text: str, name: str = "some.jsonl") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_mooncake_rows_become_requests(tmp_path: Path) -> None:
    trace = load(written(tmp_path, mooncake((0, 600, 10, [0, 1]), (1500, 1024, 20, [0, 2]))))
    assert trace == Trace("some", 512, (TraceRequest(0.0, 600, 10, (0, 1)), TraceRequest(1.5, 1024, 20, (0, 2))))
    assert (trace.seconds, trace.rate) == (1.5, 2 / 1.5)


def test_a_compressed_file_is_the_same_trace(tmp_path: Path) -> None:
    text = mooncake((0, 600, 10, [0, 1]), (1500, 1024, 20, [0, 2]))
    (tmp_path / "some.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert load(tmp_path / "some.jsonl.gz") == load(written(tmp_path, text))


def test_ticks_of_three_seconds_are_spread_evenly_and_always_the_same_way(tmp_path: Path) -> None:
    path = written(tmp_path, mooncake(*((3000.0 * tick, 100, 10, [0]) for tick in range(50) for _ in range(20))))
    trace = load(path)
    assert trace == load(path)
    arrivals = [r.arrival_s for r in trace.requests]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) == 1000
    assert all(0 <= arrival < 150 for arrival in arrivals)
    assert [sum(second <= a % 3 < second + 1 for a in arrivals) for second in range(3)] == pytest.approx([333] * 3, 0.2)


def test_timestamps_that_are_no_ticks_are_left_alone(tmp_path: Path) -> None:
    trace = load(written(tmp_path, mooncake(*((250.0 * i, 100, 10, [0]) for i in range(100)))))
    assert [r.arrival_s for r in trace.requests] == [0.25 * i for i in range(100)]


def test_azure_rows_have_no_prefix_in_common(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,130,44\n2023-11-16 18:15:50.9305900,64,1\n2023-11-16 18:17:00.6805900,0,0\n"
    )
    trace = load(written(tmp_path, text, "azure.csv"))
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 4.25, 74.0])
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.requests] == [(130, 44), (64, 1), (1, 1)]
    assert [r.blocks for r in trace.requests] == [(0, 1, 2), (3,), (4,)]


def test_a_sessions_turns_begin_with_what_was_said(tmp_path: Path) -> None:
    trace = load(written(tmp_path, SESSIONS + "7,1,100,100,0,60\n7,2,200,40,160,10\n8,1,64,64,0,64\n", "s.csv"))
    first, second = (r for r in trace.requests if r.session == 7)
    (other,) = (r for r in trace.requests if r.session == 8)
    # 64 tokens a block: the prompt fills one, prompt and answer fill two, of which the next turn has both
    assert (len(first.blocks), len(first.output_blocks)) == (2, 1)
    assert second.blocks[:2] == (first.blocks[0], first.output_blocks[0])
    assert first.blocks[1] not in second.blocks  # it was partial when it was said
    assert set(other.blocks + other.output_blocks).isdisjoint(first.blocks + second.blocks + first.output_blocks)
    assert (first.turn, first.think_s, second.turn) == (0, None, 1)
    assert second.think_s is not None
    assert second.arrival_s > first.arrival_s + second.think_s


def test_our_own_format_carries_tenant_and_priority(tmp_path: Path) -> None:
    rows = [
        {"arrival_ms": 1500.0, "prompt_tokens": 20, "output_tokens": 3, "blocks": [0, 1], "tenant": 4, "priority": -1},
        {"arrival_ms": 250.0, "prompt_tokens": 16, "output_tokens": 3, "blocks": [0], "ttft_ms": 8.5},
    ]
    trace = load(written(tmp_path, own(*rows)))
    assert trace.block_size == 16
    assert trace.requests == (
        TraceRequest(0.25, 16, 3, (0,)),
        TraceRequest(1.5, 20, 3, (0, 1), tenant="4", priority=-1),
    )


def test_files_of_several_routers_can_be_put_together(tmp_path: Path) -> None:
    row = {"arrival_ms": 10.0, "prompt_tokens": 16, "output_tokens": 3, "blocks": [0]}
    assert len(load(written(tmp_path, own(row) + own(row | {"arrival_ms": 5.0}))).requests) == 2


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        (mooncake((0, 600, 10, [0, 1])) + "{oops\n", 2, "not JSON"),
        (mooncake((0, 600, 10, [0, 1])) + "[]\n", 2, "not a JSON object"),
        (mooncake((0, 600, 10, [0, 1]), (5, 600, 10, [0])), 2, "2 blocks of 512, but it names 1"),
        (mooncake((-5, 600, 10, [0, 1])), 1, "before the trace begins"),
        (mooncake((0, 600.5, 10, [0, 1])), 1, "input_length"),  # type: ignore[arg-type]
        (mooncake((float("nan"), 600, 10, [0, 1])), 1, "timestamp"),
        (mooncake((0, 600, -1, [0, 1])), 1, "output_length"),
        ('{"hash_ids": [0], "timestamp": 0, "output_length": 1}\n', 1, "input_length is missing"),
        ('{"hash_ids": ["a"], "timestamp": 0, "input_length": 9, "output_length": 1}\n', 1, "hash_ids"),
        (own({"arrival_ms": 1, "prompt_tokens": 20, "output_tokens": 3}), 2, "blocks"),
        ('{"tandem_trace": 1}\n', 1, "block_size"),
        (own() + own(block_size=32), 2, "another size"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", 2, "TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", 2, "2 fields"),
        (SESSIONS + "1,1,many,2,3,4\n", 2, "input_total"),
        ("a,b\n1,2\n", 1, "none of"),
        ('{"prompt": "text"}\n', 1, "none of"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path: Path, text: str, line: int, cause: str) -> None:
    with pytest.raises(ConfigError, match=rf"line {line}: .*{cause}"):
        load(written(tmp_path, text))


def test_files_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty"):
        load(written(tmp_path, "\n\n"))
    with pytest.raises(ConfigError, match="no request"):
        load(written(tmp_path, own()))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "nothing.jsonl")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:-10])
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "cut.gz")
