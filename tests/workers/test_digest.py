"""The digest follows every byte that decides what a model computes, and its cache never lies."""

import json
import os
from pathlib import Path

import pytest

from cluster.errors import ModelError
from workers.digest import weights_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "one.safetensors").write_bytes(b"1" * 100)
    (directory / "two.safetensors").write_bytes(b"2" * 100)
    return directory


def test_the_same_bytes_elsewhere_have_the_same_digest(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "digests.json"
    first = weights_digest(model, cache)
    assert len(first) == 32
    assert weights_digest(model, cache) == first
    assert weights_digest(model.rename(tmp_path / "elsewhere"), tmp_path / "other.json") == first


@pytest.mark.parametrize("name", ["config.json", "one.safetensors", "two.safetensors"])
def test_every_file_counts(model: Path, name: str, tmp_path: Path) -> None:
    before = weights_digest(model, tmp_path / "digests.json")
    (model / name).write_bytes((model / name).read_bytes()[:-1] + b"?")
    assert weights_digest(model, tmp_path / "digests.json") != before


def test_swapped_shards_count(model: Path, tmp_path: Path) -> None:
    before = weights_digest(model, tmp_path / "digests.json")
    (model / "one.safetensors").rename(model / "spare")
    (model / "two.safetensors").rename(model / "one.safetensors")
    (model / "spare").rename(model / "two.safetensors")
    assert weights_digest(model, tmp_path / "digests.json") != before


def test_unchanged_files_are_not_read_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    before = weights_digest(model, cache)
    path = model / "one.safetensors"
    status = path.stat()
    path.write_bytes(b"x" * 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the one change that the cache cannot see
    assert weights_digest(model, cache) == before


@pytest.mark.parametrize("broken", ["{", "[]", ""])
def test_a_broken_cache_is_replaced(model: Path, broken: str, tmp_path: Path) -> None:
    cache = tmp_path / "digests.json"
    expected = weights_digest(model, tmp_path / "other.json")
    cache.write_text(broken)
    assert weights_digest(model, cache) == expected
    assert len(json.loads(cache.read_text())) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(model: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert weights_digest(model, blocked / "digests.json") == weights_digest(model, tmp_path / "digests.json")


def test_missing_files_are_model_errors(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match="config"):
        weights_digest(model, tmp_path / "digests.json")
