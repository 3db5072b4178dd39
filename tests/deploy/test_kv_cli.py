"""`tandem kv` against a router with real block stores: what it prints and how it exits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from tests.router.store_site import PROMPT, Site, site

TEXT = "hello world, hello there " * 9


@pytest.fixture
def kv(model_directory: Path, tmp_path: Path) -> Iterator[Site]:
    with site(model_directory, tmp_path / "disk", operator_key="operator-key") as made:
        made.api.http.headers["authorization"] = "Bearer operator-key"
        yield made


def run(kv: Site, *arguments: str, key: str = "operator-key") -> Result:
    command = ["kv", *arguments, "--url", kv.api.url]
    return CliRunner().invoke(app, command, env={"TANDEM_OPERATOR_KEY": key, "COLUMNS": "200"})


def test_stats_and_ls(kv: Site) -> None:
    hashes = kv.write(0)
    stats = run(kv, "stats")
    assert stats.exit_code == 0
    for word in ("memory", "disk", "s0", "s1", "tenants: "):
        assert word in stats.stdout
    listed = run(kv, "ls")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in hashes)
    one = run(kv, "ls", hashes[2][:12])
    assert hashes[2] in one.stdout
    assert hashes[1] not in one.stdout


def test_pin_unpin_drop(kv: Site) -> None:
    kv.api.complete(prompt=TEXT, max_tokens=1)
    hashes = kv.write(0, list(kv.api.workers["b1"].generations[-1].prompt))
    count = len(hashes)
    assert f"s0: {count} of {count} blocks pinned" in run(kv, "pin", TEXT).stdout
    assert ", pinned" in run(kv, "ls").stdout
    assert run(kv, "unpin", TEXT).exit_code == 0
    assert ", pinned" not in run(kv, "ls").stdout
    assert "s0: 1 of 1 blocks dropped" in run(kv, "drop", "--hash", hashes[-1]).stdout
    assert f"s0: {count - 1} of {count} blocks dropped" in run(kv, "drop", TEXT).stdout
    kv.write(1, PROMPT)
    assert "s1: 5 blocks dropped" in run(kv, "drop", "--all").stdout


def test_a_system_message_and_its_options_reach_the_router(kv: Site) -> None:
    plain, system = run(kv, "pin", TEXT), run(kv, "pin", TEXT, "--system", "--cache-salt", "x")
    assert plain.exit_code == system.exit_code == 0
    unknown = run(kv, "pin", TEXT, "--tenant", "nobody")
    assert unknown.exit_code == 1
    assert "GET /kv lists them" in unknown.stderr


def test_verify_exits_with_1_when_something_was_corrupt(kv: Site, tmp_path: Path) -> None:
    kv.write(0)
    clean = run(kv, "verify")
    assert clean.exit_code == 0, clean.output
    file = max((tmp_path / "disk").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    with file.open("r+b") as block:
        block.seek(-1, os.SEEK_END)
        last = block.read(1)
        block.seek(-1, os.SEEK_END)
        block.write(bytes([last[0] ^ 1]))
    corrupt = run(kv, "verify")
    assert corrupt.exit_code == 1
    assert "1 blocks were corrupt" in corrupt.stderr
    assert run(kv, "verify").exit_code == 0


@pytest.mark.parametrize("arguments", [("drop",), ("drop", "text", "--all"), ("drop", "--all", "--hash", "00")])
def test_drop_wants_to_be_told_what_in_one_way(kv: Site, arguments: tuple[str, ...]) -> None:
    result = run(kv, *arguments)
    assert result.exit_code == 1
    assert "in one way" in result.stderr


def test_what_the_router_refuses_is_its_own_words_and_exit_1(kv: Site) -> None:
    for arguments in (("stats",), ("ls",), ("pin", TEXT), ("drop", "--all"), ("verify",)):
        result = run(kv, *arguments, key="wrong")
        assert result.exit_code == 1
        assert "send the operator key" in result.stderr
        assert "wrong" not in result.output
    short = run(kv, "pin", "hi")
    assert short.exit_code == 1
    assert "less than one block" in short.stderr


def test_a_store_that_is_gone_is_exit_1_after_what_the_others_said(kv: Site) -> None:
    kv.write(0)
    kv.api.run(kv.servers.pop().stop())
    for arguments in (("stats",), ("ls",), ("drop", "--all"), ("verify",)):
        result = run(kv, *arguments)
        assert result.exit_code == 1
        assert "s1" in result.stderr
        assert "s0" in result.stdout


def test_nobody_there_is_one_line_and_exit_1() -> None:
    result = CliRunner().invoke(app, ["kv", "stats", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "is `tandem serve` running?" in result.stderr
