"""The trace on disk: what a line holds, what a slow or broken disk costs."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from kvstore.hashing import ModelKey, extend, salt
from router import recorder as recorder_module
from router.recorder import Recorded, Recorder, block_ids

LINE = Recorded(1.5, 40, 3, (7, 8, 9), 5, 0, 20.0, 2.0, 16, "p1", "d1")
KEY = ModelKey(b"weights", b"tokenizer", "float32", 16)


def chain(tokens: list[int], tenant: str) -> tuple[bytes, ...]:
    hashes: list[bytes] = []
    extend(hashes, KEY.root(salt("secret", tenant, "")), tokens, 16)
    return tuple(hashes)


def record(recorder: Recorder, *lines: Recorded) -> None:
    async def run() -> None:
        await recorder.start()
        for line in lines:
            recorder.record(line)
        await recorder.close()

    asyncio.run(run())


def test_a_file_per_router_with_a_header(tmp_path: Path) -> None:
    record(Recorder(str(tmp_path / "new"), "router-1", 16), LINE, LINE)
    record(Recorder(str(tmp_path / "new"), "router-2", 16))
    first, second = sorted((tmp_path / "new").iterdir())
    header, *lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert header == {"tandem_trace": 1, "block_size": 16}
    assert (
        lines
        == [
            {
                "arrival_ms": 1.5,
                "prompt_tokens": 40,
                "output_tokens": 3,
                "blocks": [7, 8, 9],
                "tenant": 5,
                "priority": 0,
                "ttft_ms": 20.0,
                "itl_ms": 2.0,
                "cached_tokens": 16,
                "prefill": "p1",
                "decode": "d1",
            }
        ]
        * 2
    )
    assert json.loads(second.read_text()) == header


def test_equal_prefixes_of_a_tenant_have_equal_numbers() -> None:
    system = list(range(32))
    one = block_ids(chain([*system, 1, 2], "a"), 34, 16)
    two = block_ids(chain([*system, 3], "a"), 33, 16)
    other = block_ids(chain([*system, 1, 2], "b"), 34, 16)
    assert len(one) == len(two) == 3
    assert one[:2] == two[:2]
    assert one[2] != two[2]  # of a partial block nothing is known
    assert not set(one) & set(other)
    assert len(block_ids(chain(system, "a"), 32, 16)) == 2
    assert all(0 <= number < 2**53 for number in one)


def test_what_does_not_fit_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder_module, "LIMIT", 2)
    with caplog.at_level(logging.WARNING):
        record(Recorder(str(tmp_path), "r", 16), LINE, LINE, LINE)
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1 + 2
    assert "1 requests are not recorded" in caplog.text


def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        record(Recorder(str(tmp_path / "file"), "r", 16), LINE)
    assert "1 requests are not recorded" in caplog.text
