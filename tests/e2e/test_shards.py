"""Workers of several shards, as a user has them: any pairing of prefill and decode, the tokens of one process.

One deployment after the other shares a disk tier, each cut differently: what one has written is a hit for the next.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.e2e.oracle import CODE, ENGLISH, MIXED, greedy
from tests.serving import Served, marked, serving

Grid = tuple[int, int]  # tp, pp
PAIRINGS: list[tuple[Grid, Grid]] = [((2, 1), (1, 2)), ((1, 3), (3, 1))]
BLOCK = 16
NEW = 16
TOKEN_BYTES = 46_080  # 30 layers x 2 x 3 heads x 64 x 4 bytes
LENGTHS = {5: CODE, 17: MIXED, 129: CODE, 520: ENGLISH}  # tokens of a prompt -> what it says
LONG = 100  # tokens of a prompt that no worker prefers to compute
MEMORY = 2**28
SETTINGS = {
    "TANDEM_KV_MEMORY": str(MEMORY), "TANDEM_STORE_MEMORY": str(MEMORY), "TANDEM_DISK_MEMORY": str(MEMORY),
    "TANDEM_TOKEN_BUDGET": "128",  # the longest prompt is several chunks
}  # fmt: skip


def prompts(model: Path, number: int) -> list[list[int]]:
    """Of one deployment. None shares its first block with another."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = []
    for length, text in LENGTHS.items():
        ids = tokenizer.encode(f"{number} {length} " + 20 * text, add_special_tokens=False).ids[:length]
        assert len(ids) == length
        found.append(ids)
    return found


def flags(prefill: Grid, decode: Grid) -> list[str]:
    given = {"prefill-tp": prefill[0], "prefill-pp": prefill[1], "decode-tp": decode[0], "decode-pp": decode[1]}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def ask(served: Served, model: Path, cases: list[list[int]]) -> list[int]:
    """All at once; the tokens have to be right. Returns how many tokens of each prompt were cached."""
    with ThreadPoolExecutor(len(cases)) as pool:
        results = list(pool.map(lambda prompt: served.complete(prompt, NEW, True, ignore_eos=True), cases))
    for prompt, done in zip(cases, results, strict=True):
        assert done.tokens == greedy(model, tuple(prompt), NEW), f"a prompt of {len(prompt)} tokens"
    return [done.usage["prompt_tokens_details"]["cached_tokens"] for done in results]


def full(prompts: list[list[int]]) -> list[int]:
    """Tokens that can be cached: the last one is always computed."""
    return [(len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts]


def check_processes(served: Served, prefill: Grid, decode: Grid) -> None:
    """What `/status` says of shards is what runs."""
    workers = {w["role"]: w for w in served.status()["workers"]}
    for role, grid in (("prefill", prefill), ("decode", decode)):
        worker = workers[role]
        assert (worker["tp"], worker["pp"]) == grid
        assert len(set(worker["shard_pids"])) == math.prod(grid)
        assert worker["shard_pids"][0] == worker["pid"]
        assert set(worker["shard_pids"]) <= {process.pid for process in marked(served.mark)}


@pytest.mark.timeout(600)
def test_every_pairing_gives_the_same_tokens_and_finds_what_others_have_written(smollm2: Path, tmp_path: Path) -> None:
    written: list[list[int]] = []  # long ones, by the deployments before
    for number, (prefill, decode) in enumerate(PAIRINGS):
        new = prompts(smollm2, number)
        arguments = [str(smollm2), "--dtype", "float32", "--max-context", "1024", *flags(prefill, decode)]
        arguments += ["--placement", "least_loaded"]  # by time, short prompts would be computed where they are decoded
        with serving(*arguments, TANDEM_DISK=str(tmp_path), **SETTINGS) as served:
            check_processes(served, prefill, decode)
            assert ask(served, smollm2, new) == [0] * len(new)
            assert served.metric("tandem_handoff_bytes_total") == sum(map(len, new)) * TOKEN_BYTES
            assert ask(served, smollm2, new) == full(new)
            if written:
                assert ask(served, smollm2, written) == full(written)
            served.assert_no_leaks()
        written += [prompt for prompt in new if len(prompt) >= LONG]
