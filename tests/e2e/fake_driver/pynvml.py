"""Stands in for nvidia-ml-py in the processes of a test: the GPUs of a driver that no machine needs to have.

It goes before the real one on their PYTHONPATH. The GPUs are those of the JSON file that FAKE_GPUS names, one object
each, as they are when asked; without that file the node has none. Of the library it has what `workers/gpus.py` uses.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FILE = "FAKE_GPUS"


H200 = {"uuid": "GPU-1", "name": "H200", "used": 2**36, "total": 2**37, "busy_percent": 20, "power_mw": 150_000}


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


def environment(path: Path) -> dict[str, str]:
    """Of a deployment that is to see the GPUs of that file."""
    return {"PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}", FILE: str(path)}


def write(path: Path, gpus: list[dict[str, Any]]) -> None:
    """For the test: from now on these are there. Whoever reads meanwhile sees those before or these."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(gpus))
    new.replace(path)


def _gpus() -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(Path(os.environ[FILE]).read_text())
    except FileNotFoundError:
        return []
    return found


def nvmlInit() -> None:
    if FILE not in os.environ:
        raise NVMLError("no driver")


def nvmlDeviceGetCount() -> int:
    return len(_gpus())


def nvmlDeviceGetHandleByIndex(index: int) -> dict[str, Any]:
    return _gpus()[index]


def nvmlDeviceGetUUID(device: dict[str, Any]) -> str:
    return str(device["uuid"])


def nvmlDeviceGetName(device: dict[str, Any]) -> str:
    return str(device["name"])


def nvmlDeviceGetMemoryInfo(device: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(used=device["used"], total=device["total"])


def nvmlDeviceGetUtilizationRates(device: dict[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(gpu=device["busy_percent"])


def nvmlDeviceGetPowerUsage(device: dict[str, Any]) -> int:
    return int(device["power_mw"])
