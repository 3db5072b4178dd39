"""A deployment that keeps KV in int8: approximate requests reuse it, exact ones are never touched by it."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.oracle import greedy
from tests.serving import Served, serving, wait_until

BLOCK = 16
FULL = 25  # blocks of the prompt
PROMPT = [random.Random(8).randrange(10, 400) for _ in range(FULL * BLOCK + 7)]


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def kept(served: Served, kind: str) -> int:
    """Blocks that the stores of that kind hold for whoever asks."""
    return sum(store["slabs"]["cached"] for store in served.status()["stores"] if store["id"].startswith(kind))


def connected(served: Served, worker: str) -> bool:
    return any(w["id"] == worker and w["connected"] for w in served.status()["workers"])


@pytest.mark.timeout(180)
def test_int8_blocks_outlive_their_worker_and_exact_requests_do_not_see_them(tiny: Path, tmp_path: Path) -> None:
    right = greedy(tiny, tuple(PROMPT), 16)
    int8 = {"TANDEM_KV_QUANTIZATION": "int8", "TANDEM_DISK": str(tmp_path), "TANDEM_DISK_MEMORY": str(64 * 2**20)}
    # the default would have the decode worker, which has all of it, compute the prompt's end
    flags = ("--dtype", "float32", "--prefill", "2", "--placement", "least_loaded")
    with serving(str(tiny), *flags, **int8) as served:
        first = served.complete(PROMPT, 16, ignore_eos=True)
        assert (first.tokens, cached(first.usage)) == (right, 0)  # handoffs are exact
        wait_until(lambda: kept(served, "tier-") >= FULL, 20, lambda: str(served.status()))
        assert kept(served, "store-") == 0
        stores = httpx.get(f"{served.url}/kv", timeout=10).json()["stores"]
        sizes = {store["store"].split("-")[0]: store["block_bytes"] for store in stores}
        assert sizes["tier"] * 64 == sizes["store"] * 20  # a scale per 16 values

        os.kill(served.pid("prefill-0"), signal.SIGKILL)  # of two idle workers it was placed first
        wait_until(lambda: not connected(served, "prefill-0"), 20)
        again = served.complete(PROMPT, 16, ignore_eos=True)
        assert len(again.tokens) == 16
        assert cached(again.usage) == FULL * BLOCK
        assert served.metric("tandem_fetched_tokens_total") == FULL * BLOCK

        for expected in (0, FULL * BLOCK):  # nothing approximate is of use; then the exact blocks of the first time
            exact = served.complete(PROMPT, 16, ignore_eos=True, exact_kv=True)
            assert (exact.tokens, cached(exact.usage)) == (right, expected)
            wait_until(lambda: kept(served, "store-") >= FULL, 20, lambda: str(served.status()))
        served.assert_no_leaks()
    shards = ("--prefill-tp", "2", "--decode-pp", "2")
    with serving(str(tiny), "--dtype", "float32", *shards, **int8) as served:  # everything was restarted, and cut anew
        for exact in (True, False):
            tokens = served.metric("tandem_fetched_tokens_total")
            disk = served.complete(PROMPT, 16, ignore_eos=True, exact_kv=exact)
            assert cached(disk.usage) == FULL * BLOCK
            assert served.metric("tandem_fetched_tokens_total") == tokens + FULL * BLOCK
            assert disk.tokens == right or not exact
        served.assert_no_leaks()
