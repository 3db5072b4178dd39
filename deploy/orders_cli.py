"""`tandem drain | roles | scale | restart | log`: an operator's orders to a running deployment, over its HTTP API.

`drain` and `restart` wait until they are done and say how long that took; the others say what holds now and return.
No logic of their own: the routes are router/orders.py's.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import typer

from deploy.http_client import LOCAL, Key, Url, ask
from deploy.terminal import console, fail

POLL_S = 0.25
SETTLE_S = 10.0  # for a router to notice that a worker is gone
DRAIN_S = 900.0  # a worker gives what it has to others after 30 s; requests have deadlines of their own
RESTART_S = 3_600.0
BOUNDS = re.compile(r"(\d+)(?:\.\.(\d+))?")
Deadline = Annotated[float, typer.Option("--timeout", help="seconds to wait for it")]


def drain(
    worker: Annotated[str, typer.Argument(help="id")], timeout: Deadline = DRAIN_S, url: Url = LOCAL, key: Key = ""
) -> None:
    """Let a worker finish what it has, stop it, and wait until it is gone. No request is lost."""
    begun = time.monotonic()
    ask(url, "POST", "/orders/drain", key, {"worker": worker})
    try:
        left = _await_end(url, key, "drain", [worker], begun + timeout)
    except TimeoutError:
        fail(f"{worker} still drains after {timeout:.0f} s and will go on; `tandem status` shows what it has left")
    if left:
        fail(f"{worker} serves on: the order to drain it is lost, perhaps with Redis's data; give it again")
    console.print(f"{worker} is stopped, {time.monotonic() - begun:.1f} s after it was told to drain")


def roles(
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="[prefill=N decode=M | WORKER=ROLE ... | auto]", show_default=False)
    ] = None,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Show which worker has which role, keep a split or workers' roles, or leave them to the traffic again."""
    if wanted:
        ask(url, "POST", "/orders/roles", key, _roles_body(wanted))
    now = ask(url, "GET", "/orders", key)
    for worker in ask(url, "GET", "/status")["workers"]:
        kept = f", kept as {now['roles'][worker['id']]}" if worker["id"] in now["roles"] else ""
        console.print(f"{worker['id']}: {worker['role'] if worker['connected'] else 'lost'}{kept}")
    split = now["split"]
    held = f"kept at {split['prefill']} prefill : {split['decode']} decode" if split else "the operator's, per worker"
    console.print(f"roles: {held if split or now['roles'] else 'as the traffic needs'}")


def scale(
    bounds: Annotated[str, typer.Argument(metavar="[N | MIN..MAX | auto]", show_default=False)] = "",
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Show or set the least and most shards (GPUs); auto: those of the configuration again."""
    if bounds:
        ask(url, "POST", "/orders/scale", key, _scale_body(bounds))
    now = ask(url, "GET", "/orders", key)["scale"]
    shards = sum(w["tp"] * w["pp"] for w in ask(url, "GET", "/status")["workers"] if w["connected"])
    limits = f"{now['least']}..{now['most']}, as ordered" if now else "as configured"
    console.print(f"scale: {limits}; {shards} shards serve")


def restart(
    workers: Annotated[list[str] | None, typer.Argument(help="ids [default: all]", show_default=False)] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="leave those that have not been drained yet")] = False,
    timeout: Deadline = RESTART_S,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Replace workers one after the other, each by a fresh one, and wait until it is done. No request is lost."""
    if cancel:
        ask(url, "POST", "/orders/restart", key, {"cancel": True})
        console.print("no restart is ordered")
        return
    begun = time.monotonic()
    chosen = ask(url, "POST", "/orders/restart", key, {"workers": workers or []})["restart"]["workers"]
    try:
        left = _await_end(url, key, "restart", chosen, begun + timeout)
    except TimeoutError:
        ask(url, "POST", "/orders/restart", key, {"cancel": True})
        fail(f"not every worker is replaced after {timeout:.0f} s; the others stay: see `tandem status`")
    if left:
        fail(f"the restart was withdrawn, or is lost with Redis's data; not replaced: {', '.join(sorted(left))}")
    console.print(f"{len(chosen)} workers are replaced, in {time.monotonic() - begun:.1f} s")


def log(
    level: Annotated[str, typer.Argument(metavar="debug | info | warning | error")], url: Url = LOCAL, key: Key = ""
) -> None:
    """Set the log level of every process of a running deployment; they follow within seconds."""
    now = ask(url, "POST", "/orders/log", key, {"level": level})["log"]
    console.print(f"log level: {now}")


def _await_end(url: str, key: str, what: str, workers: list[str], deadline: float) -> set[str]:
    """Wait until it is no longer ordered, and then until the router has noticed. Returns which of the workers serve on.
    Raises TimeoutError at the deadline, on the monotonic clock."""
    while _ordered(ask(url, "GET", "/orders", key)[what], workers):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(POLL_S)
    settled = time.monotonic() + SETTLE_S
    while (left := _serving(url) & set(workers)) and time.monotonic() < settled:
        time.sleep(POLL_S)
    return left


def _ordered(order: Any, workers: list[str]) -> bool:
    """Whether that is a drain of any of them, or a restart."""
    return bool(set(workers) & set(order if isinstance(order, list) else (order or {}).get("workers", ())))


def _serving(url: str) -> set[str]:
    return {worker["id"] for worker in ask(url, "GET", "/status")["workers"] if worker["connected"]}


def _roles_body(wanted: list[str]) -> dict[str, Any]:
    if wanted == ["auto"]:
        return {"auto": True}
    pairs = dict(item.partition("=")[::2] for item in wanted)
    if pairs.keys() == {"prefill", "decode"} and all(value.isdecimal() for value in pairs.values()):
        return {role: int(value) for role, value in pairs.items()}
    if not all(value in ("prefill", "decode") for value in pairs.values()):
        fail("say prefill=N decode=M, or WORKER=prefill and the like, or auto")
    return {"workers": pairs}


def _scale_body(bounds: str) -> dict[str, Any]:
    if bounds == "auto":
        return {"auto": True}
    match = BOUNDS.fullmatch(bounds)
    if match is None:
        fail(f"{bounds} are no bounds; say N, MIN..MAX or auto")
    return {"least": int(match[1]), "most": int(match[2] or match[1])}
