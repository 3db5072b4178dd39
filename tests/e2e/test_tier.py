"""KV blocks that outlive the worker that computed them: its death, the end of a turn, a restart of everything."""

import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.oracle import greedy
from tests.serving import Served, command, environment, serving, wait_until

BLOCK = 16


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def fetched(served: Served, source: str) -> float:
    """Prompt tokens that workers fetched from there."""
    samples = served.metrics().items()
    name, label = "tandem_fetched_tokens_total", f'source="{source}"'
    return sum(value for sample, value in samples if sample.startswith(name) and label in sample)


def computed(served: Served) -> float:
    return served.metric("tandem_prompt_tokens_total")


def prompt_of(length: int, seed: int, low: int = 10, high: int = 400) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(low, high) for _ in range(length)]


@pytest.mark.timeout(300)
def test_a_killed_workers_blocks_are_used_by_another(tiny: Path) -> None:
    prompt = prompt_of(2007, seed=1)
    # the default would have the decode worker, which has all of it, compute the prompt's end
    flags = ("--dtype", "float32", "--prefill", "2", "--placement", "least_loaded")
    with serving(str(tiny), *flags) as served:
        before = computed(served)
        first = served.complete(prompt, 16, ignore_eos=True)
        assert cached(first.usage) == 0
        assert computed(served) - before == len(prompt)
        victim = served.pid("prefill-0")  # of two idle workers it is placed first
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not connected(served, "prefill-0"), 20)
        before = computed(served)
        again = served.complete(prompt, 16, True, ignore_eos=True)
        assert again.tokens == first.tokens
        assert cached(again.usage) == len(prompt) // BLOCK * BLOCK
        assert computed(served) - before == len(prompt) % BLOCK
        assert fetched(served, "memory") == len(prompt) // BLOCK * BLOCK
        served.assert_no_leaks()
    assert first.tokens == greedy(tiny, tuple(prompt), 16)


def connected(served: Served, worker: str) -> bool:
    return any(w["id"] == worker and w["connected"] for w in served.status()["workers"])


@pytest.mark.timeout(300)
def test_a_restart_of_everything_finds_its_blocks_on_disk(tiny: Path, tmp_path: Path) -> None:
    prompt = prompt_of(1000, seed=4)
    disk = {"TANDEM_DISK": str(tmp_path / "tier"), "TANDEM_DISK_MEMORY": str(64 * 2**20)}
    with serving(str(tiny), "--dtype", "float32", **disk) as served:
        first = served.complete(prompt, 16, ignore_eos=True)
        assert cached(first.usage) == 0
    with serving(str(tiny), "--dtype", "float32", **disk) as served:
        again = served.complete(prompt, 16, ignore_eos=True)
        assert cached(again.usage) == len(prompt) // BLOCK * BLOCK
        assert fetched(served, "disk") == len(prompt) // BLOCK * BLOCK
        verify = subprocess.run(
            command("kv", "verify", "--url", served.url), env=environment(served.mark), capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert verify.returncode == 0, verify.stdout + verify.stderr
        served.assert_no_leaks()
    assert first.tokens == again.tokens == greedy(tiny, tuple(prompt), 16)


def test_one_tenants_blocks_are_no_hit_for_another(small: Served, tiny: Path) -> None:
    """The same prompt under two salts: nothing is shared, and a miss costs the same work whether the other has it."""
    prompt = prompt_of(400, seed=5)
    fresh = prompt_of(400, seed=6)

    def work(tokens: list[int], salt: str) -> tuple[int, float, float, float]:
        names = [f"tandem_{n}_total" for n in ("prompt_tokens", "fetched_tokens", "fetch_failures")]
        before = [small.metric(name) for name in names]
        done = small.complete(tokens, 8, ignore_eos=True, cache_salt=salt)
        assert done.tokens == greedy(tiny, tuple(tokens), 8)
        after = [small.metric(name) for name in names]
        return cached(done.usage), *(b - a for a, b in zip(before, after, strict=True))

    assert work(prompt, "a")[0] == 0
    assert work(prompt, "a")[0] == 400 - 16  # the last token is always computed
    assert work(prompt, "b") == work(fresh, "b") == (0, 400, 0, 0)


def test_operators_list_drop_and_count_blocks(small: Served) -> None:
    prompt = prompt_of(64, seed=7)
    small.complete(prompt, 2, ignore_eos=True)
    small.assert_no_leaks()  # nobody uses a block any more, so all can be dropped
    listed = httpx.get(f"{small.url}/kv/blocks", params={"limit": 4096}, timeout=10).json()
    assert len(listed["blocks"]) >= 4
    dropped = small.post("/kv/drop", {"prompt": prompt}).json()
    assert sum(store["dropped"] for store in dropped["stores"]) == 4
    left = httpx.get(f"{small.url}/kv/blocks", params={"limit": 4096}, timeout=10).json()
    assert len(left["blocks"]) == len(listed["blocks"]) - 4
    shown = subprocess.run(
        command("kv", "stats", "--url", small.url), env=environment(small.mark), capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "store" in shown.stdout
    small.assert_no_leaks()
