"""`tandem doctor`: what would keep `tandem serve` from starting or working well here, and what to do about it.

It takes the configuration that `tandem serve` would (file, environment, and the flags below), gathers facts and shows
one finding per check. Starts nothing, changes nothing. Exit code 1 when a finding is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cluster.config import Config, load, resolved
from cluster.errors import ConfigError
from deploy.doctor.findings import Finding, error, ok
from deploy.terminal import console

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    model: Annotated[str | None, typer.Argument(help="as for `tandem serve` [default: the demo model]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on [default: 8000]")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis of the block index [default: an embedded one]")] = None,
    disk: Annotated[str | None, typer.Option(help="folder of the disk tier [default: none]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check this machine and the configuration before a start, and say what to do. Exit code 1: something is wrong."""
    given = {"model": model, "port": port, "redis_url": redis_url, "disk": disk}
    findings = diagnose(config, {name: value for name, value in given.items() if value is not None})
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"errors": errors, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        console.print(_table(findings))
    raise typer.Exit(1 if errors else 0)


def diagnose(path: Path | None, flags: dict[str, Any]) -> list[Finding]:
    """A finding per check. With a configuration that is wrong, the others go by the defaults and the flags."""
    # numpy, NVML, Redis: a fraction of a second that the other commands should not wait for
    from deploy.doctor import checks, machine, model_files, services

    given, configured = _configuration(path, flags)
    made = resolved(given)
    here, model = machine.machine(), model_files.model_files(made.model, made.runner != "sim")
    redis = services.redis_facts(made.redis_url) if made.redis_url else None
    ray = services.ray_facts()
    return [
        configured,
        checks.python(here),
        checks.port(machine.port(made.host, made.port)),
        checks.model(model),
        checks.cores(made, here),
        checks.memory(made, here, model),
        checks.shared_memory(given, here),
        *([checks.disk(made, machine.disk(made.disk))] if made.disk else []),
        checks.gpus(machine.gpus()),
        checks.redis(made, redis, ray.nodes),
        checks.clock(redis, machine.clock_is_synchronized()),
        checks.ray(ray),
        checks.haproxy(machine.haproxy()),
    ]


def _configuration(path: Path | None, flags: dict[str, Any]) -> tuple[Config, Finding]:
    """What to check by, and what is to be said of it."""
    try:
        return load(path, os.environ, flags), ok("configuration", str(path or "defaults, environment, flags"))
    except ConfigError as wrong:
        found, _, advice = wrong.message.partition("; ")
        known = {name: value for name, value in flags.items() if name in Config.model_fields}
        finding = error("configuration", found, advice or "correct it; docs/configuration.md lists every setting")
        return load(None, {}, known), finding


def _table(findings: list[Finding]) -> Table:
    table = Table("", "check", "finding", title="tandem doctor")
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="bold")
        table.add_row(Text(finding.level, style=COLOURS[finding.level]), finding.check, text)
    return table
