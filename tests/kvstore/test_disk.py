"""The disk tier by itself, on a real file system: what comes back is what was written, or nothing."""

import asyncio
import logging
import os
import resource
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cluster.errors import Corrupt, StartupError
from cluster.store_messages import BlockKey
from kvstore import disk as disk_module
from kvstore.block_file import MAGIC, Header, file_bytes, header_bytes, pack, unpack
from kvstore.copying import checksums
from kvstore.disk import DiskTier
from kvstore.layout import Layout
from tests.kvstore.rig import LAYOUT, Block, block_of, keys_for

OTHER = Layout(heads=3, layers=2, tokens=4, dim=8, dtype="float32", itemsize=4)  # of the same size
LARGE = Layout(
    heads=3, layers=30, tokens=16, dim=64, dtype="float32", itemsize=4
)  # more cells than a header's first page
KEYS = keys_for(80)  # 20 blocks


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


@asynccontextmanager
async def opened(folder: Path, blocks: int = 100, layout: Layout = LAYOUT) -> Any:
    tier = DiskTier(folder, "ns", layout, blocks * file_bytes(layout))
    await tier.open()
    try:
        yield tier
    finally:
        tier.close()


def header_of(number: int, layout: Layout = LAYOUT) -> Header:
    return Header(KEYS[number], "a tenant", checksums(block_of(number, layout), layout))


async def put(tier: DiskTier, *numbers: int) -> list[bool]:
    return [await tier.write(header_of(n), block_of(n), pinned=False) for n in numbers]


async def get(tier: DiskTier, *numbers: int) -> list[int]:
    """Which of these blocks come back, each checked byte by byte."""
    blocks: list[Block] = [np.zeros(LAYOUT.block_bytes, np.uint8) for _ in numbers]
    found = await tier.read([(KEYS[n].hash, block) for n, block in zip(numbers, blocks, strict=True)], 10**18)
    good = []
    for number, block, header in zip(numbers, blocks, found, strict=True):
        if header is not None:
            assert header == header_of(number)
            assert (block == block_of(number)).all()
            good.append(number)
    return good


def path_of(tier: DiskTier, number: int) -> Path:
    name = KEYS[number].hash.hex()
    return tier.path / name[:2] / name


def here(tier: DiskTier, *numbers: int) -> list[int]:
    return [n for n in numbers if KEYS[n].hash in tier]


def test_a_block_comes_back_with_everything_about_it_also_after_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            assert await put(tier, 0, 1, 2) == [True] * 3
            assert await get(tier, 2, 0, 1) == [2, 0, 1]
            assert (tier.writes, tier.reads, tier.errors, len(tier)) == (3, 3, 0, 3)
        async with opened(tmp_path) as tier:
            assert sorted(tier.names()) == sorted(key.hash for key in KEYS[:3])
            assert await get(tier, 0, 1, 2) == [0, 1, 2]
            assert await tier.headers([KEYS[1].hash]) == [header_of(1)]
            assert await tier.check([key.hash for key in KEYS[:4]]) == set()

    run(body())


def test_a_block_that_is_not_there_is_a_miss_and_no_error(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0)
            path_of(tier, 0).unlink()
            assert await get(tier, 0, 1) == []
            assert (here(tier, 0), tier.errors) == ([], 0)

    run(body())


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


SIZE, HEAD = file_bytes(LAYOUT), header_bytes(LAYOUT)
damage = pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda p: flip(p, 0), id="magic"),
        pytest.param(lambda p: flip(p, 9), id="crc of the header"),
        pytest.param(lambda p: flip(p, 25), id="hash"),
        pytest.param(lambda p: flip(p, 100), id="tokens"),
        pytest.param(lambda p: flip(p, HEAD - 1), id="padding"),
        pytest.param(lambda p: flip(p, HEAD), id="first byte"),
        pytest.param(lambda p: flip(p, SIZE - 1, 7), id="last bit"),
        pytest.param(lambda p: cut(p, 0), id="empty"),
        pytest.param(lambda p: cut(p, HEAD - 1), id="half a header"),
        pytest.param(lambda p: cut(p, SIZE - 1), id="one byte short"),
    ],
)


@damage
def test_a_damaged_file_is_a_miss_and_gone(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0, 1)
            tier.take_changed()
            harm(path_of(tier, 0))
            assert await get(tier, 0, 1) == [1]
            assert not path_of(tier, 0).exists()
            assert (here(tier, 0, 1), tier.errors, tier.corrupt) == ([1], 1, 1)
            assert tier.take_changed() == [KEYS[0].hash]

    run(body())


@damage
def test_checking_finds_the_damage_too(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0, 1)
            harm(path_of(tier, 0))
            assert await tier.check([KEYS[0].hash, KEYS[1].hash, KEYS[2].hash]) == {KEYS[0].hash}
            assert here(tier, 0, 1) == [1]

    run(body())


def test_a_file_under_another_blocks_name_or_of_another_layout_is_a_miss_and_gone(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0, 1)
            path_of(tier, 0).write_bytes(path_of(tier, 1).read_bytes())
            foreign = Header(KEYS[1], "", checksums(block_of(1, OTHER), OTHER))
            path_of(tier, 1).write_bytes(pack(foreign, OTHER) + block_of(1, OTHER).tobytes())
            assert await get(tier, 0, 1) == []
            assert not path_of(tier, 0).exists()
            assert not path_of(tier, 1).exists()
            assert tier.corrupt == 2

    run(body())


def test_a_block_whose_tokens_are_not_its_names_is_found_by_checking(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            wrong = BlockKey(KEYS[0].hash, 4, KEYS[0].parent, KEYS[1].ids)
            await tier.write(Header(wrong, "", checksums(block_of(0), LAYOUT)), block_of(0), pinned=False)
            assert await tier.check([KEYS[0].hash]) == {KEYS[0].hash}
            assert here(tier, 0) == []

    run(body())


def test_what_was_not_whole_is_removed_at_the_start_and_strangers_files_are_left_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0, 1)
        half = tier.path / "writing" / KEYS[2].hash.hex()
        half.write_bytes(b"half")
        cut(path_of(tier, 1), 5000)
        stranger = path_of(tier, 0).with_name("notes.txt")
        stranger.write_text("mine")
        async with opened(tmp_path) as tier:
            assert here(tier, 0, 1, 2) == [0]
            assert (half.exists(), path_of(tier, 1).exists(), stranger.exists()) == (False, False, True)
            assert tier.errors == 1

    run(body())


def test_two_stores_never_share_a_folder(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path):
            second = DiskTier(tmp_path, "ns", LAYOUT, 2**20)
            with pytest.raises(StartupError, match="folder of its own"):
                await second.open()
            second.close()
            async with opened(tmp_path, layout=LARGE):
                pass  # another model's blocks lie elsewhere
        async with opened(tmp_path):
            pass

    run(body())


def test_a_folder_that_cannot_be_and_a_size_that_holds_nothing_are_refused(tmp_path: Path) -> None:
    async def body() -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StartupError, match="choose another"):
            await DiskTier(tmp_path / "file", "ns", LAYOUT, 2**20).open()
        with pytest.raises(StartupError, match="raise it"):
            await DiskTier(tmp_path, "ns", LAYOUT, 100).open()

    run(body())


def test_nobody_else_can_read_what_is_in_the_folder(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path / "new") as tier:
            assert tier.path.stat().st_mode & 0o777 == 0o700

    run(body())


def test_the_folder_never_grows_beyond_its_size_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path, blocks=3) as tier:
            await put(tier, 0, 1, 2)
            tier.touch([KEYS[1].hash, KEYS[0].hash])
            await put(tier, 3)
            assert here(tier, 0, 1, 2, 3) == [0, 1, 3]
            tier.pin(KEYS[1].hash, True)
            await put(tier, 4, 5)
            assert here(tier, 0, 1, 2, 3, 4, 5) == [1, 4, 5]
            files = [path for path in tier.path.rglob("*") if path.is_file() and path.name != "lock"]
            assert len(files) == 3
            assert sum(path.stat().st_size for path in files) <= tier.limit_bytes

    run(body())


def test_the_order_of_use_survives_a_restart_tail_first(tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 5, 4, 3, 2, 1, 0)
            assert await get(tier, 4, 5) == [4, 5]  # used at a time given by `get`, before those written today
        async with opened(tmp_path, blocks=4) as tier:
            assert here(tier, *range(6)) == [0, 1, 2, 3]
        async with opened(tmp_path, blocks=4) as tier:
            blocks = [(KEYS[n].hash, np.zeros(LAYOUT.block_bytes, np.uint8)) for n in range(4)]
            await tier.read(blocks, 2 * 10**18 + 10**17)
        async with opened(tmp_path, blocks=2) as tier:
            assert here(tier, *range(4)) == [0, 1], "the tail of a chain goes before its head"

    run(body())


def test_a_disk_that_cannot_be_written_costs_one_line_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with opened(tmp_path) as tier:
            await put(tier, 0)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD + 10, hard))
            try:
                assert await put(tier, 1, 2) == [False, False]
                assert (tier.errors, tier.writable) == (2, False)
                monkeypatch.setattr(disk_module, "PAUSE_S", 0.0)
                tier._paused_until = 0.0
                assert await put(tier, 1) == [False]
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert list((tier.path / "writing").iterdir()) == []
            assert await put(tier, 1) == [True]
            assert await get(tier, 0, 1, 2) == [0, 1]

    with caplog.at_level(logging.INFO):
        run(body())
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
    assert len([r for r in caplog.records if "can be written again" in r.message]) == 1


keys = st.builds(
    BlockKey,
    st.binary(min_size=32, max_size=32),
    st.integers(0, 4),
    st.sampled_from([b"", b"p" * 32]),
    st.sampled_from([b"", b"i" * 16]),
)


@given(keys, st.text(max_size=16), st.binary(min_size=24, max_size=24), st.integers(0, 8 * HEAD - 1))
@settings(deadline=None, max_examples=200)
def test_a_header_says_everything_and_no_flipped_bit_goes_unnoticed(
    key: BlockKey, tenant: str, crcs: bytes, bit: int
) -> None:
    header = Header(key, tenant, crcs)
    packed = pack(header, LAYOUT)
    assert len(packed) == HEAD
    assert packed.startswith(MAGIC)
    assert unpack(packed, key.hash, LAYOUT) == header
    damaged = bytearray(packed)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Corrupt):
        unpack(bytes(damaged), key.hash, LAYOUT)
