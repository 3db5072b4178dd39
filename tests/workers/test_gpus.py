"""What the driver says of GPUs, from a driver of the test's own, and from this machine's where there is one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from cluster.messages import Gpu
from workers import gpus


class Refused(Exception):
    pass


class NotSupported(Refused):
    pass


def driver(**replaced: Any) -> Any:
    """One GPU, as nvidia-ml-py shows it."""

    def unsupported(_: Any) -> Any:
        raise NotSupported

    calls = {
        "NVMLError": Refused,
        "NVMLError_NotSupported": NotSupported,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda device: f"GPU-{device}",
        "nvmlDeviceGetName": lambda _: "H200",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=3, total=10),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=45, memory=1),
        "nvmlDeviceGetPowerUsage": unsupported,
    }
    return SimpleNamespace(**(calls | replaced))


def told(nvml: Any, times: int) -> list[tuple[Gpu, ...]]:
    """What `watch` says, until it ends or has said that much."""
    said: list[tuple[Gpu, ...]] = []

    async def body() -> None:
        enough = asyncio.Event()

        def tell(seen: tuple[Gpu, ...]) -> None:
            said.append(seen)
            if len(said) == times:
                enough.set()

        task = asyncio.create_task(gpus.watch(tell, nvml))
        async with asyncio.timeout(20):
            await asyncio.wait({task, asyncio.create_task(enough.wait())}, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(body())
    return said


def test_figures_are_in_plain_units_and_what_is_not_said_is_zero() -> None:
    assert gpus.read(driver()) == (Gpu("GPU-0", "H200", 0.45, 3, 10, 0.0),)
    (gpu,) = gpus.read(driver(nvmlDeviceGetPowerUsage=lambda _: 123_456))
    assert gpu.power_w == pytest.approx(123.456)


def test_gpus_are_told_of_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "READ_S", 0.001)
    assert [[gpu.id for gpu in seen] for seen in told(driver(), 3)] == [["GPU-0"]] * 3


def test_a_driver_that_is_not_there_or_goes_away_leaves_no_gpus() -> None:
    def absent() -> None:
        raise Refused("no driver")

    assert told(driver(nvmlInit=absent), 9) == [()]
    assert told(driver(nvmlDeviceGetCount=absent), 9) == [()]


def test_this_machines_gpus() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"there is no NVIDIA driver here ({error}); run this on a machine with a GPU")
    for gpu in gpus.read():
        assert gpu.id.startswith("GPU-")
        assert 0 <= gpu.utilization <= 1
        assert 0 < gpu.memory_used <= gpu.memory_total
        assert gpu.power_w > 0
