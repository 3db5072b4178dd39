"""`tandem status`: the workers, block stores, Redis and controller of a running deployment, as one router sees them.

Everything it shows is the answer of `GET /status`; `--json` is that answer as it came.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from deploy.http_client import LOCAL, Url, ask
from deploy.terminal import console, print_wide

STATUS_S = 5.0
WORKER_COLUMNS = ("id", "role", "tp x pp", "node", "pids", "running", "waiting", "KV blocks used", "prefill", "decode")
SLAB_STATES = ("slabs", "free", "reserved", "held", "cached", "quarantined")


def status(
    url: Url = LOCAL, as_json: Annotated[bool, typer.Option("--json", help="the answer as it came")] = False
) -> None:
    """Show the workers, block stores, Redis and controller of a running deployment."""
    state: dict[str, Any] = ask(url, "GET", "/status", timeout_s=STATUS_S)
    if as_json:
        typer.echo(json.dumps(state))
        return
    print_wide(_workers(state))
    print_wide(_stores(state))
    console.print(f"Redis is {state['redis']}")
    console.print(_controller(state["controller"]), highlight=False, markup=False, soft_wrap=True)


def _workers(state: dict[str, Any]) -> Table:
    table = Table(*WORKER_COLUMNS, title=f"workers of {state['model']}")
    for w in state["workers"]:
        load = (str(w["running"]), str(w["waiting"]), f"{w['kv_blocks_used']} / {w['kv_blocks']}")
        shards = (f"{w['tp']} x {w['pp']}", w["node"], " ".join(map(str, w["shard_pids"])))
        table.add_row(w["id"], w["role"], *shards, *(load if w["connected"] else ("lost", "", "")), *_speed(w["rates"]))
    return table


def _speed(rates: dict[str, Any] | None) -> tuple[str, str]:
    """Prefill and decode of a worker as it has measured them."""
    if rates is None:
        return "", ""
    (step, token, _), (decode, *_) = rates["prefill"], rates["decode"]
    return f"{step:.1f} ms + {token:.3g} a token", f"{decode:.1f} ms a step"


def _stores(state: dict[str, Any]) -> Table:
    table = Table("id", "node", "pid", *SLAB_STATES, "on disk", title="block stores")
    for s in state["stores"]:
        slabs = [str(s["slabs"][name]) for name in (*SLAB_STATES, "disk_blocks")] if s["answers"] else ["lost"]
        table.add_row(s["id"], s["node"], str(s["pid"]), *slabs)
    return table


def _controller(info: dict[str, Any] | None) -> str:
    if info is None:
        return "no controller: roles and sizes stay as they are"
    counts = (
        f"controller (pid {info['pid']}): {info['moves_total']} role changes, {info['starts_total']} starts, "
        f"{info['stops_total']} stops, {info['migrations_total']} migrations; {info['starting']} starting, "
        f"{info['draining']} draining, last drain {info['last_drain_s']:.1f} s"
    )
    return "\n".join((counts, *(f"  {event}" for event in info["events"])))
