"""The folder of the disk tier as the launcher sees it: fit for use, and home of the secret that names its blocks.

    <disk>/secret    shared by everything that reads these blocks: a restart with another one would not find them
    <disk>/0, /1...  one folder per block store of a node, in the layout of kvstore/disk.py
    <disk>/int8-0... the same for the stores of approximate KV

Checked on the machine that starts the deployment; on other nodes the stores check for themselves.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

import psutil

from cluster.config import MIB, SECRET_CHARACTERS, Config
from cluster.errors import StartupError

SECRET_FILE = "secret"


def folder(config: Config) -> Path | None:
    """The disk tier's folder, absolute, there and writable; None without one. Raises StartupError."""
    if not config.disk:
        return None
    path = Path(config.disk).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StartupError(
            f"the disk tier cannot use {path} ({error.strerror}); correct `disk` or its permissions"
        ) from None
    free = psutil.disk_usage(str(path)).free
    if config.disk_memory > free and config.disk_memory > free + _size(path):
        raise StartupError(
            f"disk_memory is {config.disk_memory // MIB} MiB and {path} has {free // MIB} MiB free; lower disk_memory"
        )
    return path


def store_folder(disk: Path | None, index: int, kind: str = "") -> Path | None:
    """Where the store of that index on its node keeps its blocks: the same after every restart."""
    return disk / f"{kind}{index}" if disk is not None else None


def cluster_secret(config: Config, disk: Path | None) -> str:
    """The configured secret, else the one kept beside the disk tier, else a random one. Raises StartupError."""
    if config.secret:
        return config.secret
    if disk is None:
        return secrets.token_hex(32)
    path = disk / SECRET_FILE
    try:
        _create_once(path)
        mode, secret = stat.S_IMODE(path.stat().st_mode), path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot use the cluster secret in {path} ({error}); delete it to have a new one") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StartupError(f"others can read the cluster secret; run chmod 600 {path}")
    if len(secret) < SECRET_CHARACTERS:
        raise StartupError(f"{path} holds no secret of {SECRET_CHARACTERS} characters; delete it to have a new one")
    return secret


def _create_once(path: Path) -> None:
    """Whole or not at all, and only one of two that start at once gets to write it."""
    if path.exists():
        return
    draft = path.with_name(f"{SECRET_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return  # the other one's is as good
    finally:
        draft.unlink()


def _size(path: Path) -> int:
    """Bytes of the files below: what an earlier start left there will be used again, not added to."""
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a store that is still stopping may be evicting
                total += (Path(parent) / name).stat().st_size
    return total
