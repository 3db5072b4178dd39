"""What one worker of a known model on a known GPU can do: from names, as people give them, to rates and room for KV.

The numbers are `cluster/roofline.py`'s; this only looks names up and says what there is when a name is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster import roofline
from cluster.errors import ConfigError
from cluster.messages import Rates

STEP_TOKENS = 2048  # of a prompt's chunk: where prefill on these GPUs has reached most of its throughput


@dataclass(frozen=True, slots=True)
class Shape:
    """How a worker is sharded."""

    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}" + (f" pp{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one worker."""

    rates: Rates
    kv_tokens: int  # room for KV; 0: the weights do not fit
    kv_bytes: int  # of a token


def speed(model: str, gpu: str, shape: Shape, dtype: str = "bfloat16", step_tokens: int = STEP_TOKENS) -> Speed:
    """Raises ConfigError, which names the models or the GPUs that are known."""
    if model not in roofline.MODELS:
        raise ConfigError(f"the speed of model {model!r} is not known; one of {', '.join(roofline.MODELS)}")
    if (device := roofline.find(gpu)) is None:
        raise ConfigError(f"the speed of GPU {gpu!r} is not known; one of {', '.join(roofline.GPUS)}")
    sizes = roofline.MODELS[model]
    rates = roofline.prior(sizes, gpu, shape.tp, shape.pp, dtype, step_tokens)
    room = roofline.kv_tokens(sizes, device, shape.tp, shape.pp, dtype)
    return Speed(rates, max(0, room), sizes.kv_token_bytes)
