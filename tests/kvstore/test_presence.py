"""Locks of several processes for one writer; within one process every open file has a lock of its own, as there."""

import os
from pathlib import Path

import pytest

from cluster.errors import WorkerLost
from kvstore.presence import Presence, joined, lock_if_free, presence_path, present


@pytest.fixture
def arena(tmp_path: Path) -> Path:
    return tmp_path / "tandem-s-0.arena"


def test_a_writer_is_there_while_anybody_copies_for_it(arena: Path) -> None:
    presence = Presence(arena, "w")
    with joined(arena, "w"), joined(arena, "w"):
        presence.close()
        assert present(arena, "w"), "a shard of it still copies"
        assert presence_path(arena, "w").exists()
    assert not present(arena, "w")
    assert not presence_path(arena, "w").exists()


def test_copies_for_a_writer_that_has_gone_are_not_begun(arena: Path) -> None:
    with pytest.raises(WorkerLost), joined(arena, "w"):
        raise AssertionError("there never was one")
    presence = Presence(arena, "w")
    presence.close()
    assert not presence_path(arena, "w").exists()
    with pytest.raises(WorkerLost), joined(arena, "w"):
        raise AssertionError("it has gone")


def test_a_copy_is_not_begun_while_the_store_gives_the_memory_away(arena: Path) -> None:
    presence = Presence(arena, "w")
    os.close(presence._descriptor)  # as when its process dies
    descriptor = os.open(presence_path(arena, "w"), os.O_RDWR)
    assert lock_if_free(descriptor)
    with pytest.raises(WorkerLost), joined(arena, "w"):
        raise AssertionError("the store was faster")
    os.close(descriptor)
    with joined(arena, "w"):  # the file is still there, and so is the quarantine until the store looks again
        assert present(arena, "w")


def test_a_file_that_was_removed_after_it_was_opened_does_not_count(
    arena: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presence = Presence(arena, "w")
    os.close(presence._descriptor)
    really_open = os.open

    def slow_open(path: Path, flags: int) -> int:
        descriptor = really_open(path, flags)
        monkeypatch.setattr(os, "open", really_open)
        assert not present(arena, "w")  # the store comes in between
        return descriptor

    monkeypatch.setattr(os, "open", slow_open)
    with pytest.raises(WorkerLost), joined(arena, "w"):
        raise AssertionError("the memory has been given away")
