"""What follows from a configuration: names of blocks, their layout, what a GPU needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cluster.config import Config
from deploy.served_model import block_layout, gpu_needs, model_key
from workers.architecture import load_architecture

KINDS = ["none", "int8", "int8-cache", "e4m3-cache"]


def config(kind: str, dtype: str = "bfloat16") -> Config:
    return Config(kv_quantization=kind, runner="cuda", dtype=dtype)


def test_no_kind_of_kv_has_the_names_of_another(tiny: Path) -> None:
    """Exact KV, that of int8 stores, and that of either cache, each of two dtypes."""
    keys = [model_key(config(kind, dtype), tiny) for kind in KINDS for dtype in ("bfloat16", "float32")]
    assert model_key(config("none"), tiny) == model_key(config("int8"), tiny), "its requests choose the root"
    assert len({key.namespace for key in keys}) == 6
    assert len({key.root(b"salt") for key in [*keys, *(key.approximate for key in keys)]}) == 12


@pytest.mark.parametrize(("kind", "dtype"), [("int8-cache", "int8"), ("e4m3-cache", "float8_e4m3fn")])
def test_blocks_in_8_bits_have_scales_wherever_they_are(tiny: Path, kind: str, dtype: str) -> None:
    architecture = load_architecture(tiny)
    exact, found = (block_layout(config(each), architecture) for each in ("none", kind))
    assert found == dataclasses.replace(exact, dtype=dtype, itemsize=1)
    assert found.block_bytes * 2 * exact.dim == exact.block_bytes * (exact.dim + 4)
    assert block_layout(config("int8"), architecture) == exact


def test_gpus_need_less_for_kv_and_as_much_for_weights(tiny: Path) -> None:
    architecture = load_architecture(tiny)
    exact, found = (gpu_needs(config(kind), architecture, 100) for kind in ("none", "int8-cache"))
    assert exact is not None
    assert found is not None
    assert found.weights == exact.weights
    assert exact.kv_token == 2 * 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim
    assert found.kv_token * 2 * architecture.head_dim == exact.kv_token * (architecture.head_dim + 4)
