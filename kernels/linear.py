"""Matrix times activations, with the weight kept in the layout the CPU multiplies fastest.

oneDNN reorders a weight once into its blocked layout; a step over the packed weight takes half the time of F.linear
for small batches and never more. A packed weight is opaque: it cannot be saved, sliced or read back. The two private
operators are those that torch's own inductor freezes CPU models into; where they are missing, F.linear serves.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_BATCH_HINT = 8  # oneDNN picks the same layout for 1, 8, 32 and 256 rows


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build and this CPU can multiply packed weights of the dtype."""
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(operators._is_mkldnn_bf16_supported()))


class Linear:
    """y = x W^T + b.  weight [N, K], bias [N] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._packed = weight.device.type == "cpu" and packs(weight.dtype)
        self._weight = weight
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_BATCH_HINT)
            self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        y: Tensor = self._multiply(x, self._weight, self.bias, "none", [], "")
        return y
