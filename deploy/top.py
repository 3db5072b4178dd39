"""`tandem top`: what the dashboard shows, in a terminal: figures of the last minute, workers, the last two minutes as
lines, events, and the last requests with the routes that were chosen for them.

A pure function makes one frame from the answer of `/dashboard/data`. It ends when the deployment does not answer; what
does not fit the terminal is left out from the end, and said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.http_client import LOCAL, Key, Url, ask
from deploy.terminal import console, print_wide

EVERY_S = 1.0
CALL_S = 5.0
LINE = 120  # samples, one a second
EVENTS, REQUESTS = 6, 8
AROUND = 14 + EVENTS + REQUESTS + 12  # lines of a frame that are not workers
LEAST_WORKERS = 4
LEVELS = "▁▂▃▄▅▆▇█"
BAR = 10  # characters
COLOURS = {"prefill": "blue", "decode": "yellow", "both": "magenta"}
KINDS = {"failure": "red", "recovery": "green", "scale": "magenta", "role": "blue"}


def top(
    once: Annotated[bool, typer.Option("--once", help="print one frame and end, as when this is no terminal")] = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Watch a running deployment: load, times, workers, events and placements."""
    if once or not console.is_terminal:
        print_wide(frame(_latest(url, key), None))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(frame(_latest(url, key), console.size.height), refresh=True)
                time.sleep(EVERY_S)
    except KeyboardInterrupt:
        return


def _latest(url: str, key: str) -> dict[str, Any]:
    answer: dict[str, Any] = ask(url, "GET", "/dashboard/data", key, timeout_s=CALL_S)
    return answer


def frame(data: dict[str, Any], height: int | None) -> RenderableType:
    """One picture of an answer of `/dashboard/data`, for a terminal of so many lines (None: of any)."""
    shown = len(data["workers"]) if height is None else max(LEAST_WORKERS, height - AROUND)
    return Group(
        _head(data),
        _figures(data),
        _workers(data["workers"], shown),
        _lines(data["history"]),
        _events(data["events"][-EVENTS:]),
        _requests(data["requests"][-REQUESTS:]),
    )


def _head(data: dict[str, Any]) -> Text:
    lost = [worker["id"] for worker in data["workers"] if worker["state"] == "lost"]
    serving = sum(worker["state"] == "serving" for worker in data["workers"])
    told = data["controller"]
    text = Text.assemble((data["model"], "bold"), f"   {serving} of {len(data['workers'])} workers serve")
    if lost:
        text.append(f", {', '.join(lost[:3])} lost", "bold red")
    text.append(f"   Redis {data['redis']}", "" if data["redis"] == "reachable" else "bold red")
    if told is None:
        return text.append("   no word from a controller", "yellow")
    return text.append(
        f"   {told['moves_total']} role changes, {told['starting']} starting, {told['draining']} draining"
    )


def _figures(data: dict[str, Any]) -> Table:
    minute, flow, queue = data["minute"], data["per_second"], data["queue"]
    failed = {name: n for name, n in minute["outcomes"].items() if name not in ("finished", "cancelled")}
    running, waiting = (sum(worker[name] or 0 for worker in data["workers"]) for name in ("running", "waiting"))
    figures: list[tuple[str, str | Text]] = [
        ("within SLO", _percent(minute["slo_kept"])),
        ("TTFT p50 / p95", _times(minute["ttft_ms"], data["slo"]["ttft_ms"])),
        ("ITL p50 / p95", _times(minute["itl_ms"], data["slo"]["itl_ms"])),
        ("requests/s", f"{minute['requests_s']:,.1f}"),
        (
            "errors, last minute",
            Text(", ".join(f"{n} {name}" for name, n in failed.items()) or "none", "red" * bool(failed)),
        ),
        ("running", f"{running:,}"),
        ("waiting", f"{waiting + queue['requests']:,} ({queue['tokens']:,} prompt tokens in the router)"),
        ("computed", f"{flow['prompt_tokens']:,.0f} prompt tokens/s"),
        ("output", f"{flow['output_tokens']:,.0f} tokens/s"),
        ("prompt tokens cached", _percent(minute["hit_ratio"])),
        ("KV handed over", f"{_bytes(flow['handoff_bytes'])}/s"),
    ]
    grid = Table.grid(padding=(0, 2))
    half = -(-len(figures) // 2)
    for left in range(half):
        cells = [cell for name, value in figures[left::half] for cell in (Text(name, "dim"), value)]
        grid.add_row(*cells)
    return grid


def _workers(workers: Sequence[dict[str, Any]], shown: int) -> Table:
    table = Table(title="workers", title_justify="left", expand=False, box=None, padding=(0, 2, 0, 0))
    for name in ("worker", "role", "state"):
        table.add_column(name)
    for name in ("running", "waiting"):
        table.add_column(name, justify="right")
    table.add_column("KV blocks in use", no_wrap=True)
    for name in ("prompt/s", "output/s", "handed over"):
        table.add_column(name, justify="right")
    for worker in workers[:shown]:
        flow, lost = worker["per_second"], worker["state"] == "lost"
        load = ("", "") if lost else (f"{worker['running']:,}", f"{worker['waiting']:,}")
        rates = (f"{flow['prompt_tokens']:,.0f}", f"{flow['output_tokens']:,.0f}", f"{_bytes(flow['handoff_bytes'])}/s")
        role = Text(worker["role"], COLOURS[worker["role"]])
        table.add_row(worker["id"], role, Text(worker["state"], "red" if lost else ""), *load, _used(worker), *rates)
    if len(workers) > shown:
        table.add_row(f"and {len(workers) - shown:,} more")
    return table


def _used(worker: dict[str, Any]) -> str:
    if not worker["kv_blocks"]:
        return ""
    part = worker["kv_blocks_used"] / worker["kv_blocks"]
    return f"{'█' * round(BAR * part):░<{BAR}} {part:.0%}"


def _lines(history: dict[str, Any]) -> Table:
    """The last two minutes, oldest at the left."""
    samples = history["samples"][-LINE:]
    shown: list[tuple[str, str, Callable[[float], str]]] = [
        ("prefill", "prefill workers", _whole),
        ("decode", "decode workers", _whole),
        ("ttft_p95_ms", "TTFT p95", _milliseconds),
        ("itl_p95_ms", "ITL p95", _milliseconds),
        ("running", "running", _whole),
        ("waiting", "waiting", _whole),
        ("output_tokens_s", "output tokens/s", _whole),
    ]
    table = Table(title="last two minutes", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, label, words in shown:
        at = history["columns"].index(name)
        values = [sample[at] for sample in samples]
        now = values[-1] if values else None
        table.add_row(Text(label, "dim"), "" if now is None else words(now), spark(values))
    return table


def spark(values: Sequence[float | None]) -> str:
    """One character each, as high as the value is next to the largest; a space for what is not known."""
    most = max((value for value in values if value is not None), default=0.0)
    if most <= 0:
        return "".join(" " if value is None else LEVELS[0] for value in values)
    return "".join(" " if value is None else LEVELS[round(value / most * (len(LEVELS) - 1))] for value in values)


def _events(events: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="events (UTC)", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for event in reversed(events):
        table.add_row(Text(event["at"], "dim"), Text(event["kind"], KINDS[event["kind"]]), Text(event["words"]))
    return table


def _requests(requests: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="last requests", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("tenant", "outcome", "route"):
        table.add_column(name)
    for name in ("prompt", "cached", "output", "TTFT", "per token", "predicted"):
        table.add_column(name, justify="right")
    table.add_column("runner-up")
    for request in reversed(requests):
        decision = request["decisions"][-1] if request["decisions"] else None
        other = decision and decision["runner_up"]
        table.add_row(
            request["tenant"][:8],
            Text(request["outcome"], "" if request["outcome"] in ("finished", "cancelled") else "red"),
            _route(decision["route"]) if decision else "not placed",
            *(f"{request[name]:,}" for name in ("prompt_tokens", "cached_tokens", "output_tokens")),
            *(_milliseconds(request[name]) for name in ("ttft_ms", "itl_ms")),
            _milliseconds(decision["chosen"]["total_ms"]) if decision else "",
            f"{_milliseconds(other['total_ms'])} {_route(other)}" if other else "",
        )
    return table


def _route(route: dict[str, Any]) -> str:
    return f"{route['prefill']} → {route['decode']}" if route["prefill"] else str(route["decode"])


def _times(times: dict[str, Any] | None, goal: float) -> Text:
    if times is None:
        return Text(f"none (SLO {_milliseconds(goal)})", "dim")
    words = f"{_milliseconds(times['p50'])} / {_milliseconds(times['p95'])} (SLO {_milliseconds(goal)})"
    return Text(words, "red" if times["p95"] > goal else "green")


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{part:.1%}"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1_000:
            return f"{value:,.0f} {unit}"
        value /= 1_000
    return f"{value:,.1f} GB"
