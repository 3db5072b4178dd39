"""Real files: who may map them, who owns them, and what happens to those of the dead."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import EpochMismatch, LayoutMismatch, NoSpace, StartupError, StoreError
from kvstore.arena import SHARED_MEMORY, Arena, remove_stale
from kvstore.layout import Layout
from kvstore.presence import Presence, present
from tests.kvstore.rig import LAYOUT, memory_for

OTHER = Layout(3, 2, 4, 8, "float32", 4)


def test_what_the_owner_writes_others_read(tmp_path: Path) -> None:
    owner = Arena.create("s", LAYOUT, memory_for(3), 7, [tmp_path])
    other = Arena.attach(owner.path, LAYOUT, 7)
    owner.commit(range(3))
    for index in range(3):
        owner.slab(index)[:] = index + 1
        owner.set_generation(index, 2**40 + index)
    assert [other.slab(i).tolist() for i in range(3)] == [[i + 1] * LAYOUT.block_bytes for i in range(3)]
    assert [other.generation(i) for i in range(3)] == [2**40, 2**40 + 1, 2**40 + 2]
    assert (other.slabs, other.epoch) == (3, 7)
    other.close()
    owner.close()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_may_write_and_a_reader_not(tmp_path: Path) -> None:
    owner = Arena.create("s", LAYOUT, memory_for(1), 7, [tmp_path])
    owner.commit([0])
    writer, reader = Arena.attach(owner.path, LAYOUT, 7, writable=True), Arena.attach(owner.path, LAYOUT, 7)
    writer.slab(0)[:] = 5
    assert (owner.slab(0) == 5).all()
    with pytest.raises(ValueError, match="read-only"):
        reader.slab(0)[:] = 6


def test_views_outlive_close(tmp_path: Path) -> None:
    owner = Arena.create("s", LAYOUT, memory_for(1), 7, [tmp_path])
    view = owner.slab(0)
    assert not owner.removed
    owner.close()
    view[:] = 3
    assert int(view.sum()) == 3 * LAYOUT.block_bytes


def test_only_the_arena_that_was_meant_is_mapped(tmp_path: Path) -> None:
    owner = Arena.create("s", LAYOUT, memory_for(1), 7, [tmp_path])
    with pytest.raises(EpochMismatch):
        Arena.attach(owner.path, LAYOUT, 8)
    with pytest.raises(LayoutMismatch):
        Arena.attach(owner.path, OTHER, 7)
    with pytest.raises(FileNotFoundError):
        Arena.attach(tmp_path / "none", LAYOUT, 7)
    (tmp_path / "other").write_bytes(bytes(8192))
    with pytest.raises(StoreError, match="not an arena"):
        Arena.attach(tmp_path / "other", LAYOUT, 7)


def test_it_is_private_and_its_name_cannot_be_guessed(tmp_path: Path) -> None:
    arenas = [Arena.create("s", LAYOUT, memory_for(1), 7, [tmp_path]) for _ in range(2)]
    assert len({arena.path for arena in arenas}) == 2
    assert all(stat.S_IMODE(arena.path.stat().st_mode) == 0o600 for arena in arenas)


def test_its_size_is_what_was_asked_for(tmp_path: Path) -> None:
    for memory in (20_000, 50_000, 500_000):
        arena = Arena.create("s", LAYOUT, memory, 7, [tmp_path])
        assert memory - 2 * 4096 - LAYOUT.block_bytes - 64 <= arena.path.stat().st_size <= memory
        arena.close()


def test_too_little_and_too_much_memory_name_the_knob(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="store_memory"):
        Arena.create("s", LAYOUT, 100, 7, [tmp_path])
    with pytest.raises(StartupError, match="lower store_memory"):
        Arena.create("s", LAYOUT, 2**60, 7, [tmp_path])
    assert list(tmp_path.iterdir()) == []


def test_the_next_folder_is_used_when_the_first_is_too_small(tmp_path: Path) -> None:
    free = os.statvfs(SHARED_MEMORY)
    if os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < (
        wanted := free.f_bavail * free.f_frsize + 2**20
    ):
        pytest.skip("the disk is no bigger than the shared memory")
    arena = Arena.create("s", LAYOUT, wanted, 7, [SHARED_MEMORY, tmp_path])
    assert arena.path.parent == tmp_path
    arena.close()


def test_memory_the_kernel_refuses_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    arena = Arena.create("s", LAYOUT, memory_for(1), 7, [tmp_path])
    with pytest.raises(NoSpace, match="lower store_memory"):
        arena.commit([2**40])  # a petabyte from here
    arena.commit([0])


def test_the_arena_of_a_killed_owner_is_removed_at_the_next_start(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from kvstore.arena import Arena
from kvstore.presence import Presence
from tests.kvstore.rig import LAYOUT, memory_for
arena = Arena.create("dead", LAYOUT, memory_for(1), 7, [Path({str(tmp_path)!r})])
presence = Presence(arena.path, "writer")
print(arena.path, flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    path = Path(child.stdout.readline().strip())
    mapped = Arena.attach(path, LAYOUT, 7)
    remove_stale(tmp_path)
    assert path.exists(), "its owner lives"
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    assert path.exists(), "nobody has cleaned up yet"
    living = Arena.create("next", LAYOUT, memory_for(1), 8, [tmp_path])
    assert list(tmp_path.iterdir()) == [living.path]
    assert mapped.removed
    assert np.count_nonzero(mapped.slab(0)) == 0, "what is mapped stays readable"


def test_presence_ends_with_its_process_and_not_before(tmp_path: Path) -> None:
    arena = tmp_path / "x.arena"
    assert not present(arena, "w")
    presence = Presence(arena, "w")
    assert present(arena, "w")
    assert not present(arena, "another")
    presence.close()
    assert not present(arena, "w")
    assert list(tmp_path.iterdir()) == []


def test_what_dead_writers_of_vanished_stores_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "tandem-s-0.arena.dead").touch()
    (tmp_path / "another").touch()
    living = Presence(tmp_path / "tandem-s-0.arena", "living")
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tandem-s-0.arena.living", "another"}
    living.close()
