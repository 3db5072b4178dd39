"""Runs the sections of the benchmark and prints, or writes, their figures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from cluster.config import Config
from deploy.bench import engine, machine, serve
from deploy.bench.report import show, write

SECTIONS = ("engine", "serve")


def run(model: Path, config: Config, sections: list[str], out: Path | None, console: Console) -> None:
    """`config` is resolved for one aggregated worker, so that the engine section uses every core."""
    torch.set_num_threads(config.threads)
    console.print("measuring the machine", style="dim")
    limits, figures = machine.measure(getattr(torch, config.dtype))
    if "engine" in sections:
        console.print("measuring the engine", style="dim")
        figures += engine.measure(model, config, limits)
    if "serve" in sections:
        console.print("measuring a served, disaggregated deployment", style="dim")
        figures += serve.measure(model, config, limits)
    show(figures, console)
    if out is not None:
        write(figures, out)
