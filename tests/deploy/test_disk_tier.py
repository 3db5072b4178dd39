"""The disk tier's folder at the door: usable or one line of what to do, and a secret that outlives a restart."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cluster.config import MIB, Config
from cluster.errors import StartupError
from deploy.disk_tier import cluster_secret, folder, store_folder


def test_without_a_disk_there_is_no_folder_and_every_start_has_another_secret() -> None:
    assert folder(Config()) is None
    assert store_folder(None, 0) is None
    first, second = cluster_secret(Config(), None), cluster_secret(Config(), None)
    assert first != second
    assert len(first) == 64


def test_the_folder_is_made_and_absolute_and_each_store_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = folder(Config(disk="kv/tier", disk_memory=MIB))
    assert made == tmp_path / "kv" / "tier"
    assert made.is_dir()
    assert list(made.iterdir()) == []
    assert [store_folder(made, index) for index in range(2)] == [made / "0", made / "1"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"the disk tier cannot use .*file.*correct `disk`"):
        folder(Config(disk=str(tmp_path / "file"), disk_memory=MIB))
    with pytest.raises(StartupError, match="cannot use"):
        folder(Config(disk="/proc/nowhere", disk_memory=MIB))


def test_more_than_is_free_is_refused_unless_it_is_there_already(tmp_path: Path) -> None:
    wanted = psutil.disk_usage(str(tmp_path)).free + 64 * MIB
    with pytest.raises(StartupError, match="MiB free; lower disk_memory"):
        folder(Config(disk=str(tmp_path), disk_memory=wanted))
    (tmp_path / "0").mkdir()
    with (tmp_path / "0" / "block").open("wb") as file:
        file.truncate(2 * 1024 * MIB)  # sparse: it counts as used and takes nothing
    assert folder(Config(disk=str(tmp_path), disk_memory=wanted)) == tmp_path


def test_the_secret_stays_with_the_disk(tmp_path: Path) -> None:
    first = cluster_secret(Config(), tmp_path)
    assert cluster_secret(Config(), tmp_path) == first
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"], "no draft is left"
    given = "sixteen letters and more"
    assert cluster_secret(Config(secret=given), tmp_path) == given


def test_two_that_start_at_once_have_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: cluster_secret(Config(), tmp_path), range(32)))) == 1


def test_a_secret_that_others_can_read_or_that_is_none_is_one_line(tmp_path: Path) -> None:
    secret = cluster_secret(Config(), tmp_path)
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(StartupError, match="chmod 600") as caught:
        cluster_secret(Config(), tmp_path)
    assert secret not in caught.value.message
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "secret").write_text("short\n")
    with pytest.raises(StartupError, match="delete it"):
        cluster_secret(Config(), tmp_path)
