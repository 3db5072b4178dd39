"""What the driver says of this node's GPUs: how busy they are, their memory, their power.

All GPUs of the node, whoever uses them: the driver does not know which worker is whose, and whoever reads the figures
knows them by their UUIDs. Reading never fails: without a driver, or with one that has gone away, there are none. It
neither chooses nor configures a GPU.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pynvml

from cluster.messages import Gpu

READ_S = 1.0
log = logging.getLogger(__name__)


def read(nvml: ModuleType = pynvml) -> tuple[Gpu, ...]:
    """`nvml` is the driver's library as nvidia-ml-py shows it, initialized."""
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        busy = _asked(nvml, nvml.nvmlDeviceGetUtilizationRates, device)
        power_mw = _asked(nvml, nvml.nvmlDeviceGetPowerUsage, device)
        found.append(
            Gpu(
                id=nvml.nvmlDeviceGetUUID(device),
                name=nvml.nvmlDeviceGetName(device),
                utilization=busy.gpu / 100 if busy is not None else 0.0,
                memory_used=int(memory.used),
                memory_total=int(memory.total),
                power_w=power_mw / 1000 if power_mw is not None else 0.0,
            )
        )
    return tuple(found)


async def watch(tell: Callable[[tuple[Gpu, ...]], None], nvml: ModuleType = pynvml) -> None:
    """Tell what there is every second until cancelled; return when there is no driver to ask."""
    try:
        await asyncio.to_thread(nvml.nvmlInit)
        while True:
            tell(await asyncio.to_thread(read, nvml))
            await asyncio.sleep(READ_S)
    except nvml.NVMLError as error:
        log.info("this node's GPUs are not watched: %s", error)
        tell(())


def _asked(nvml: ModuleType, question: Callable[[Any], Any], device: Any) -> Any:
    """None: this GPU, or part of one, does not say."""
    try:
        return question(device)
    except nvml.NVMLError_NotSupported:
        return None
