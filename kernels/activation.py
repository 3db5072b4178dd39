"""SwiGLU's gate (arXiv:2002.05202), on the output of one fused projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import uses_triton


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2 I], gate first -> [T, I]
    if uses_triton(gate_up):
        from kernels import triton_activation

        return triton_activation.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
