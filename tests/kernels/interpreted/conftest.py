"""Triton decides when a kernel is defined whether it is interpreted, so these tests need a process of their own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("kernels are not interpreted; use: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted", 4)
