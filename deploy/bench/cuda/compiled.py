"""Triton kernels compiled for a GPU that is not there, and what the machine code needs.

Within `imagined`, a tensor on "cuda" has a shape, strides and no memory (torch's FakeTensorMode), and a launch goes
through Triton's own specialization and compilers and ends there. So what is compiled is what the launchers would
launch, arguments and configurations included. `resources` reads the result with the tools of Triton's own package.
Nothing is run and no result is right; asking an imagined tensor for a value raises.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget

WARP = 32
# what one CTA can have on an A100, H100 and B200 (CUDA programming guide, "Compute Capabilities")
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
SMS = {80: 108, 90: 132, 100: 148}
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|IGMMA|IMMA|QGMMA|QMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
TOOL_S = 60.0


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel."""

    kernel: str  # the function's name
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # instructions that load from or store to a thread's own memory
    shared: int  # bytes per CTA
    tensor: tuple[str, ...]  # tensor-core instructions, sorted
    instructions: int


@contextmanager
def imagined(architecture: int) -> Iterator[dict[str, Any]]:
    """`architecture` is 90 for sm_90. What is launched is found in the dict, by hash, as Triton's CompiledKernel."""
    compiled: dict[str, Any] = {}

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            found = kernel.warmup(*arguments, grid=grid, **options)
            compiled.setdefault(found.hash, found)

        return launch

    properties = SimpleNamespace(multi_processor_count=SMS[architecture], major=architecture // 10, minor=0)
    triton.runtime.driver.set_active(_Driver(architecture))
    try:
        with (
            mock.patch.object(triton.KernelInterface, "__getitem__", compile_only),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(architecture // 10, 0)),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            FakeTensorMode(allow_non_fake_inputs=True),
            _Imagination(),
        ):
            yield compiled
    finally:
        triton.runtime.driver._active = None


def resources(kernel: Any) -> Resources:
    """Raises subprocess.CalledProcessError when the tool cannot read the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = USAGE.search(_read("--dump-resource-usage", file.name))
        code = _read("--dump-sass", file.name)
    assert usage is not None, f"cuobjdump says nothing of {kernel.name}"
    registers, stack = map(int, usage.groups())
    return Resources(
        kernel=kernel.metadata.name,
        warps=kernel.metadata.num_warps,
        registers=registers,
        stack=stack,
        spills=len(SPILL.findall(code)),
        shared=kernel.metadata.shared,  # Triton's kernels have no other; cuobjdump adds the system's 1 KiB
        tensor=tuple(sorted(set(TENSOR_CORE.findall(code)))),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", code)),
    )


def _read(option: str, file: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True, timeout=TOOL_S).stdout


class _Driver:
    """What Triton asks a driver before it launches. A device per architecture: it keeps kernels by device."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, WARP)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


class _Imagination(TorchFunctionMode):
    """What FakeTensorMode leaves to a GPU. Pointers: Triton specializes a kernel on which are multiples of 16 bytes.
    Those of allocations are, and a view's is as far off as it begins. And what makes the tensor's device the current
    one, which a torch that was built for CPUs refuses: indexing, `to` and `copy_`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.data_ptr:
            return args[0].storage_offset() * args[0].element_size()
        if function is torch.Tensor.__getitem__:
            return _indexed(*args)
        if function is torch.Tensor.copy_:
            return args[0]
        if function is torch.Tensor.to and "cuda" in map(str, (*args[1:], *(kwargs or {}).values())):
            dtype = next((each for each in args[1:] if isinstance(each, torch.dtype)), args[0].dtype)
            return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device="cuda")
        return function(*args, **(kwargs or {}))


def _indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    """x[index] of integers, slices, `...`, None and tensors that stand side by side."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        rest = x.dim() - sum(part is not None for part in parts) + 1
        parts[at : at + 1] = [slice(None)] * rest
    dimension = 0
    tensors: list[torch.Tensor | None] = []  # per dimension of the result so far
    for part in parts:
        if isinstance(part, int):
            x = x.select(dimension, part)
            continue
        if part is None:
            x = x.unsqueeze(dimension)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice.Tensor(x, dimension, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, torch.Tensor) else None)
        dimension += 1
    if all(part is None for part in tensors):
        return x
    found: torch.Tensor = torch.ops.aten.index.Tensor(x, tensors)
    return found
