"""What the driver says of this machine's GPUs, as labels for Ray, by which `deploy/hardware.py` places workers.

    role-label.sh | python -m deploy.gpu_labels    ─►   tandem.role=prefill,tandem.gpu-memory=140,tandem.nvlink=8

Prints the labels on its standard input and adds its own; without a driver it adds none, and never fails for that. The
type of the GPUs is not among them: Ray finds that out by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pynvml

from deploy.node_roles import MEMORY_LABEL, NVLINK_LABEL


def labels(nvml: ModuleType = pynvml) -> dict[str, str]:
    """Memory is the smallest GPU's, in whole GiB. `nvml`: the driver's library as nvidia-ml-py shows it."""
    try:
        nvml.nvmlInit()
        devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        if not devices:
            return {}
        memory = min(int(nvml.nvmlDeviceGetMemoryInfo(device).total) for device in devices)
        group = largest_group(len(devices), lambda one, other: _linked(nvml, devices[one], devices[other]))
    except nvml.NVMLError:
        return {}
    return {MEMORY_LABEL: str(memory // 2**30), NVLINK_LABEL: str(group)}


def largest_group(count: int, linked: Callable[[int, int], bool]) -> int:
    """How many of them are all linked with each other: from each on, whoever comes next and is linked with all so far.
    Exact for what machines have: switches that link everything, pairs with a bridge."""
    most = 0
    for first in range(count):
        group = [first]
        for other in range(count):
            if other not in group and all(linked(member, other) for member in group):
                group.append(other)
        most = max(most, len(group))
    return most


def _linked(nvml: ModuleType, one: object, other: object) -> bool:
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError_NotSupported:
        return False
    return bool(status == nvml.NVML_P2P_STATUS_OK)


def main() -> None:
    given = sys.stdin.read().strip()
    added = [f"{name}={value}" for name, value in labels().items()]
    sys.stdout.write(",".join([given, *added] if given else added) + "\n")


if __name__ == "__main__":
    main()
