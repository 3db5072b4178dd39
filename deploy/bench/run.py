"""Runs the sections of the benchmark and prints, or writes, their figures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from cluster.config import Config
from cluster.errors import StartupError
from deploy.bench import engine, machine, serve, shard_memory, shard_steps, store, tier
from deploy.bench.report import show, write

SECTIONS = ("engine", "serve", "store", "tier", "shards")
NEED_A_MODEL = {"engine", "serve", "tier", "shards"}


def run(model: Path | None, config: Config, sections: list[str], out: Path | None, console: Console) -> None:
    """`config` is resolved for one aggregated worker, so that the engine section uses every core. `model` may be None
    when no section needs one. Raises StartupError."""
    if model is None and NEED_A_MODEL & set(sections):
        raise StartupError(f"the sections {', '.join(sorted(NEED_A_MODEL))} need a model")
    torch.set_num_threads(config.threads)
    console.print("measuring the machine", style="dim")
    limits, figures = machine.measure(getattr(torch, config.dtype))
    if model is not None and "engine" in sections:
        console.print("measuring the engine", style="dim")
        figures += engine.measure(model, config, limits)
    if model is not None and "serve" in sections:
        console.print("measuring a served, disaggregated deployment", style="dim")
        figures += serve.measure(model, config, limits)
    if "store" in sections:
        console.print("measuring the block store", style="dim")
        figures += store.measure()
    if model is not None and "tier" in sections:
        console.print("measuring what a prompt costs whose worker was killed", style="dim")
        figures += tier.measure(model, config)
    if model is not None and "shards" in sections:
        console.print("measuring workers of several shards", style="dim")
        figures += shard_memory.measure() + shard_steps.measure(model, config)
    show(figures, console)
    if out is not None:
        write(figures, out)
