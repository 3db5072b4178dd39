"""The labels that a node gets from its driver, which is made up here: no machine of ours has one."""

import io
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.label_utils import parse_node_labels_string

from deploy import gpu_labels
from deploy.gpu_labels import labels, largest_group
from deploy.node_roles import MEMORY_LABEL, NVLINK_LABEL, Node


class NvmlError(Exception):
    pass


class NotSupported(NvmlError):
    pass


def driver(memory: list[int], linked: set[frozenset[int]], supported: bool = True) -> Any:
    """NVML of a machine whose GPUs have that many bytes; `linked`: pairs that NVLink connects."""

    def status(one: int, other: int, index: int) -> int:
        if not supported:
            raise NotSupported
        assert index == 2
        return 0 if frozenset((one, other)) in linked else 3

    return SimpleNamespace(
        NVMLError=NvmlError, NVMLError_NotSupported=NotSupported, NVML_P2P_CAPS_INDEX_NVLINK=2, NVML_P2P_STATUS_OK=0,
        nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: len(memory), nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(total=memory[index]), nvmlDeviceGetP2PStatus=status,
    )  # fmt: skip


ALL = {frozenset((one, other)) for one in range(8) for other in range(one)}
PAIRS = {frozenset((0, 1)), frozenset((2, 3))}


@pytest.mark.parametrize(
    ("nvml", "expected"),
    [
        (driver([150_754_820_096] * 8, ALL), {MEMORY_LABEL: "140", NVLINK_LABEL: "8"}),
        (driver([85_520_809_984] * 4, PAIRS), {MEMORY_LABEL: "79", NVLINK_LABEL: "2"}),
        (driver([48_305_799_168, 23_034_068_992], set(), supported=False), {MEMORY_LABEL: "21", NVLINK_LABEL: "1"}),
        (driver([], set()), {}),
    ],
)
def test_what_the_driver_says(nvml: Any, expected: dict[str, str]) -> None:
    assert labels(nvml) == expected


def test_without_a_driver_there_are_none() -> None:
    def fail() -> None:
        raise NvmlError

    assert labels(SimpleNamespace(**{**vars(driver([1], set())), "nvmlInit": fail})) == {}


@pytest.mark.parametrize(
    ("pairs", "group"), [(set(), 1), (PAIRS, 2), (ALL, 8), ({frozenset((0, 1)), frozenset((1, 2))}, 2)]
)
def test_a_group_is_linked_throughout(pairs: set[frozenset[int]], group: int) -> None:
    assert largest_group(8, lambda one, other: frozenset((one, other)) in pairs) == group


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ("tandem.role=prefill\n", "tandem.role=prefill,tandem.gpu-memory=140,tandem.nvlink=8\n"),
        ("", "tandem.gpu-memory=140,tandem.nvlink=8\n"),
    ],
)
def test_its_own_come_behind_those_given(
    given: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    monkeypatch.setattr(gpu_labels.labels, "__defaults__", (driver([150_754_820_096] * 8, ALL),))
    gpu_labels.main()
    assert capsys.readouterr().out == printed
    node = Node.of({"Resources": {"CPU": 8.0, "GPU": 8.0}, "Labels": parse_node_labels_string(printed.strip())})
    assert (node.gpu_memory, node.linked) == (140 * 2**30, 8)


def test_on_this_machine_it_prints_what_it_was_given_whatever_else() -> None:
    command = [sys.executable, "-m", "deploy.gpu_labels"]
    run = subprocess.run(command, input="tandem.role=decode", capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.startswith("tandem.role=decode")
