"""How close an elementwise result must be to its value in fp64: to so many units in the last place of its dtype."""

import pytest
import torch
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# a kernel computes in fp32: 16-bit results are rounded once from something exact enough, fp32 results carry its errors
UNITS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


def close(found: Tensor, expected: Tensor, units: int = 1, scale: Tensor | None = None) -> bool:
    """Every element within the dtype's units of the fp64 value; a unit is that of the largest magnitude involved:
    `scale`, or the value itself. NaN is close to nothing."""
    magnitude = expected.double() if scale is None else scale.double()
    info = torch.finfo(found.dtype)
    unit = 2.0 ** magnitude.abs().clamp(min=info.tiny).log2().floor() * info.eps
    return bool(((found.double() - expected).abs() <= units * UNITS[found.dtype] * unit).all())
