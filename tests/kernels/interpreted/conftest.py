"""Triton decides when a kernel is defined whether it is interpreted, so these tests need a process of their own."""

import os
from collections.abc import Callable
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("kernels are not interpreted; use: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted", 4)

import triton.language as tl
from triton.runtime import interpreter


def _patch_once_per_launch() -> None:
    """The interpreter patches triton.language for every call of a jitted function, those within a kernel and tl.sum
    among them: milliseconds each, and nearly all of a test's time. Once per launch does the same."""
    patch: Callable[..., Any] = interpreter._patch_lang
    run: Callable[..., Any] = interpreter.GridExecutor.__call__
    patched: set[tuple[bool, bool]] = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        values = [id(value) for value in fn.__globals__.values()]
        sees = (id(tl) in values, id(tl.core) in values)  # what the patch goes by
        if sees in patched:
            return interpreter._LangPatchScope()
        patched.add(sees)
        return patch(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch


_patch_once_per_launch()
