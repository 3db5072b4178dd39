"""Runs the sections of the benchmark and prints, or writes, their figures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from cluster.config import Config
from cluster.errors import StartupError
from deploy.bench import (
    engine,
    fidelity,
    machine,
    placement,
    prefix_map,
    routing,
    serve,
    shard_memory,
    shard_steps,
    store,
    tier,
)
from deploy.bench.report import show, write

SECTIONS = ("engine", "serve", "store", "tier", "shards", "placement", "routing", "fidelity")
NEED_A_MODEL = {"engine", "serve", "tier", "shards", "routing", "fidelity"}


def run(
    model: Path | None, config: Config, sections: list[str], trace: Path | None, out: Path | None, console: Console
) -> None:
    """`config` is resolved for one aggregated worker, so that the engine section uses every core. `model` and `trace`
    may be None when no section needs one. Raises StartupError."""
    if model is None and NEED_A_MODEL & set(sections):
        raise StartupError(f"the sections {', '.join(sorted(NEED_A_MODEL))} need a model")
    if trace is None and "routing" in sections:
        raise StartupError("the section routing needs --trace FILE with recorded requests that share prefixes")
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
    if "placement" in sections:
        console.print("measuring what choosing workers costs", style="dim")
        figures += prefix_map.measure() + placement.measure()
    if model is not None and trace is not None and "routing" in sections:
        console.print("measuring placement on a trace, and a killed router", style="dim")
        figures += routing.measure(model, config, trace)
    if model is not None and "fidelity" in sections:
        console.print("measuring how far the simulator is off", style="dim")
        figures += fidelity.measure(model, config)
    show(figures, console)
    if out is not None:
        write(figures, out)
