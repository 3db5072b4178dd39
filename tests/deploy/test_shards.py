"""How a shard is put together, and what a worker takes for true of its speed before it has measured anything."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch

from cluster.config import Config
from cluster.identity import Identity
from cluster.perfmodel import PRIOR
from cluster.roofline import prior
from deploy.served_model import block_layout, model_shape
from deploy.shards import Assembled, assemble, build_stage
from kvstore.hashing import ModelKey
from workers.architecture import load_architecture
from workers.device import Device
from workers.worker import WorkerSettings


def settings() -> WorkerSettings:
    config = Config(runner="sim", dtype="bfloat16", threads=1, token_budget=256)
    key = ModelKey(b"model", b"tokenizer", "bfloat16", config.block_size)
    return WorkerSettings(
        "decode-0", "decode", key, 256, Identity("n", "redis://127.0.0.1:1", "secret", "127.0.0.1"), config
    )


def decode_of(assembled: Assembled) -> tuple[float, float, float]:
    """What its worker's engine thinks that decode steps take."""

    async def told() -> tuple[float, float, float]:
        return assembled.worker(settings())._engine.model.rates().decode

    return asyncio.run(told())  # its server belongs to an event loop


def on_a_gpu(kind: str) -> WorkerSettings:
    config = Config(runner="cuda", dtype="bfloat16", kv_memory=2**24, max_sequences=2, kv_quantization=kind)
    return dataclasses.replace(settings(), config=config)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA L40S"])
@pytest.mark.parametrize(("kind", "kv_bytes"), [("none", 2), ("int8-cache", 1)])
def test_on_a_gpu_it_is_what_that_gpu_promises(
    gpu: str, kind: str, kv_bytes: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.gpu_runner._gpu", Device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    asked = on_a_gpu(kind)
    assembled = assemble(asked, tiny, lambda address: [])
    expected = prior(model_shape(load_architecture(tiny), kv_bytes), gpu, 1, 1, "bfloat16", asked.config.token_budget)
    assert assembled.prior == expected
    assert expected.decode != PRIOR.decode
    assert decode_of(assembled) == pytest.approx(expected.decode)


def test_on_cpus_it_is_the_general_one(tiny: Path) -> None:
    assembled = assemble(settings(), tiny, lambda address: [])
    assert assembled.prior is None
    assert decode_of(assembled) == pytest.approx(PRIOR.decode)


@pytest.mark.parametrize("kind", ["none", "int8-cache", "e4m3-cache"])
def test_a_gpu_has_kv_in_the_layout_that_the_stores_are_made_for(
    kind: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.gpu_runner._gpu", Device)
    asked = on_a_gpu(kind)
    stage = build_stage(asked, tiny, 0)
    assert stage.layout == block_layout(asked.config, load_architecture(tiny))
    assert len(stage.block(0)) == stage.layout.block_bytes
