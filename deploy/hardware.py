"""The GPUs of this machine as NVML sees them, and which of them belong together. No GPU is no error.

Reads, changes nothing, and keeps nothing open. What a driver does not tell (a laptop's power, NVLink on a PCIe card) is
None or empty, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. `index` is NVML's, which is that of nvidia-smi and not always CUDA's."""

    index: int
    name: str
    memory_bytes: int
    memory_used_bytes: int
    utilisation: float | None  # part of the last sample period in which a kernel ran, 0..1
    power_w: float | None
    nvlink_peers: frozenset[int]  # indexes of the devices at the other ends of its active links, switches left out


def gpus(nvml: Any = pynvml) -> list[Gpu]:
    """By index; empty without GPUs or without NVIDIA's driver. `nvml`: a module with pynvml's functions."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        buses = {nvml.nvmlDeviceGetPciInfo(handle).busId: index for index, handle in enumerate(handles)}
        return [_gpu(nvml, index, handle, buses) for index, handle in enumerate(handles)]
    finally:
        nvml.nvmlShutdown()


def nvlink_groups(devices: Sequence[Gpu]) -> list[list[int]]:
    """Indexes of GPUs of one name that are all linked to each other: where tensor ranks exchange sums fastest. Largest
    groups first; a GPU is in one group."""
    groups: list[list[Gpu]] = []
    for gpu in devices:
        for group in groups:
            if all(gpu.index in other.nvlink_peers and gpu.name == other.name for other in group):
                group.append(gpu)
                break
        else:
            groups.append([gpu])
    return sorted(([gpu.index for gpu in group] for group in groups), key=len, reverse=True)


def missing(devices: Sequence[Gpu], count: int, name: str, memory_bytes: int) -> str:
    """Why a wish for so many GPUs with `name` in theirs and at least that memory each is not met; empty: it is."""
    named = [gpu for gpu in devices if name.lower() in gpu.name.lower()]
    fitting = [gpu for gpu in named if gpu.memory_bytes >= memory_bytes]
    if len(fitting) >= count:
        return ""
    have = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in devices) or "none"
    return f"{count} GPUs {name} of {memory_bytes / 2**30:.0f} GiB are wanted, {len(fitting)} fit; there are: {have}"


def _gpu(nvml: Any, index: int, handle: Any, buses: dict[Any, int]) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    utilisation = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    power = _told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    peers = _peers(nvml, handle, buses)
    return Gpu(index, nvml.nvmlDeviceGetName(handle), memory.total, memory.used, utilisation, power, peers)


def _peers(nvml: Any, handle: Any, buses: dict[Any, int]) -> frozenset[int]:
    found = set()
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        with suppress(nvml.NVMLError):  # fewer links than that, or none at all
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                found.add(buses.get(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
    return frozenset(index for index in found if index is not None)


def _told(nvml: Any, ask: Callable[[], Value]) -> Value | None:
    with suppress(nvml.NVMLError):
        return ask()
    return None
