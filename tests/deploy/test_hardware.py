"""GPUs as NVML tells of them; here by a stand-in for NVIDIA's library, whose answers are those of its documentation."""

from types import SimpleNamespace
from typing import Any, ClassVar

from deploy.hardware import Gpu, gpus, missing, nvlink_groups

GIB = 2**30


class NvmlError(Exception):
    pass


class Nvml:
    """Four H100: 0 and 1 linked, 2 behind an NVSwitch that is nobody's GPU, 3 an older card that tells little."""

    NVMLError = NvmlError
    NVML_NVLINK_MAX_LINKS = 18
    links: ClassVar = {(0, 0): "bus-1", (1, 0): "bus-0", (2, 0): "switch"}
    open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA T4" if handle == 3 else "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=80 * GIB, used=(handle + 1) * GIB)

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"bus-{handle}")

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=25, memory=5)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle == 3:
            raise NvmlError("Not Supported")
        return 350_500

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if handle == 3:
            raise NvmlError("Not Supported")
        return int((handle, link) in self.links)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        return SimpleNamespace(busId=self.links[handle, link])


def test_what_is_there_and_what_it_is_linked_to() -> None:
    nvml = Nvml()
    first, second, third, last = gpus(nvml)
    assert first == Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, GIB, 0.25, 350.5, frozenset({1}))
    assert (second.nvlink_peers, third.nvlink_peers) == ({0}, frozenset())
    assert (last.power_w, last.nvlink_peers, last.utilisation) == (None, frozenset(), 0.25)
    assert nvml.open == 0


def test_a_machine_without_a_driver_has_none() -> None:
    class NoDriver(Nvml):
        def nvmlInit(self) -> None:
            raise NvmlError("NVML Shared Library Not Found")

    assert gpus(NoDriver()) == []


def test_the_real_library_answers_here_whatever_there_is() -> None:
    assert all(gpu.memory_bytes > 0 for gpu in gpus())


def test_groups_are_linked_all_to_all_and_of_one_kind() -> None:
    assert nvlink_groups(gpus(Nvml())) == [[0, 1], [2], [3]]
    line = [linked(0, {1}), linked(1, {0, 2}), linked(2, {1})]
    assert nvlink_groups(line) == [[0, 1], [2]]
    assert nvlink_groups([]) == []


def test_what_is_missing_is_named() -> None:
    devices = gpus(Nvml())
    assert missing(devices, 3, "h100", 80 * GIB) == ""
    assert missing(devices, 1, "", 0) == ""
    text = missing(devices, 4, "H100", 80 * GIB)
    assert "4 GPUs H100 of 80 GiB are wanted, 3 fit" in text
    assert "NVIDIA T4 (80 GiB)" in text
    assert missing([], 1, "H100", GIB).endswith("there are: none")


def linked(index: int, peers: set[int]) -> Gpu:
    return Gpu(index, "A", GIB, 0, None, None, frozenset(peers))
