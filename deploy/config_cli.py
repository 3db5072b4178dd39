"""`tandem config`: every setting as `tandem serve` with the same flags would have it, and where it comes from.

Secrets are shown as ***. Starts nothing and asks nobody: a deployment that runs may have been started otherwise.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.config import Config, load, origins, resolved
from cluster.errors import ConfigError
from cluster.redis import redacted
from deploy.terminal import fail, print_wide

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
HIDDEN = "***"


def config(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show the effective settings and their origin; takes the flags of `tandem serve`."""
    path, flags = _serve_flags(context)
    try:
        made = load(path, os.environ, flags)
    except ConfigError as error:
        fail(error.message)
    sources, here = origins(path, os.environ, flags), resolved(made)
    rows = [(name, shown(made, name), shown(here, name), sources.get(name, "default")) for name in Config.model_fields]
    if as_json:
        typer.echo(
            json.dumps({name: {"value": value, "here": now, "origin": source} for name, value, now, source in rows})
        )
        return
    table = Table("setting", "value", "origin", title="settings")
    for name, value, now, source in rows:
        table.add_row(name, value if value == now else f"{value} (on this machine: {now})", source)
    print_wide(table)


def shown(made: Config, name: str) -> str:
    """A setting's value as text, without what nobody should read over a shoulder."""
    value = getattr(made, name)
    if name == "redis_url":
        return redacted(value) if value else ""
    if value and not Config.model_fields[name].repr:
        return HIDDEN
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _serve_flags(context: typer.Context) -> tuple[Path | None, dict[str, Any]]:
    """What `tandem serve` would make of the arguments: (configuration file, settings that are given)."""
    assert context.parent is not None
    group: Any = context.parent.command
    params = group.commands["serve"].make_context("config", list(context.args), parent=context.parent).params
    path = params.pop("config")
    return path and Path(path), {name: value for name, value in params.items() if value is not None}
