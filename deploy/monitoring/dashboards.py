"""The Grafana dashboard as a list of panels, and its printing as the JSON that Grafana reads:

    python -m deploy.monitoring.dashboards > deploy/monitoring/grafana/dashboards/tandem.json

One page, from top to bottom: is it well, what do users feel, what is the load, what moves between workers, who is
there, what do the machines do, what does it cost. Edit the list, not the JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, COLUMNS = 8, 7, 24  # of a panel and of Grafana's grid
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WINDOW = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  # Grafana's name of it
    queries: tuple[tuple[str, str], ...]  # (expression, legend)


def rate(counter: str, by: str) -> str:
    """Of what each router counts for itself."""
    return f"sum by ({by}) (rate({counter}[{WINDOW}]))"


def most(gauge: str, by: str) -> str:
    """Every router says the same of workers, stores and the controller."""
    return f"max by ({by}) ({gauge})"


def moved(counter: str, by: str, owner: str = "worker") -> str:
    """The rate of what workers or stores count, which every router says."""
    labels = ", ".join(dict.fromkeys((*by.split(", "), owner)))
    return f"sum by ({by}) (max by ({labels}) (rate({counter}[{WINDOW}])))"


def total(counter: str, owner: str = "worker") -> str:
    """As `moved`, of all together."""
    return f"sum(max by ({owner}) (rate({counter}[{WINDOW}])))"


def quantile(part: float, histogram: str) -> str:
    return f"histogram_quantile({part}, sum by (le) (rate({histogram}_bucket[{WINDOW}])))"


def percentiles(histogram: str, objective: str = "") -> tuple[tuple[str, str], ...]:
    found = tuple((quantile(part, histogram), f"p{part * 100:g}") for part in (0.5, 0.95, 0.99))
    slo = f'max(tandem_slo_seconds{{objective="{objective}"}})'
    return (*found, (slo, "SLO")) if objective else found


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it well",
        (
            Panel(
                "Requests by outcome", "reqps",
                ((rate("tandem_requests_total", "outcome") + " > 0", "{{outcome}}"),),
            ),
            Panel("Refused", "reqps", ((rate("tandem_refused_total", "reason"), "{{reason}}"),)),
            Panel(
                "Workers by role and state", "short",
                ((most("tandem_workers", "role, state") + " > 0", "{{role}} {{state}}"),),
            ),
        ),
    ),
    (
        "What users feel",
        (
            Panel("Time to first token", "s", percentiles("tandem_time_to_first_token_seconds", "ttft")),
            Panel("Time between tokens", "s", percentiles("tandem_inter_token_latency_seconds", "itl")),
            Panel("Whole requests", "s", percentiles("tandem_request_seconds")),
            Panel("Waiting in the router", "s", percentiles("tandem_queue_seconds")),
            Panel(
                "Exposed part of handoffs", "s", percentiles("tandem_handoff_exposed_seconds"),
            ),
            Panel("Placements", "ops", ((rate("tandem_placements_total", "kind"), "{{kind}}"),)),
        ),
    ),
    (
        "Load",
        (
            Panel("Waiting in the router", "short", (("sum by (priority) (tandem_queue_requests)", "{{priority}}"),)),
            Panel(
                "Sequences", "short",
                (
                    (most("tandem_worker_running", "worker"), "{{worker}} runs"),
                    (most("tandem_worker_waiting", "worker"), "{{worker}} waits"),
                ),
            ),
            Panel(
                "Tokens", "short",
                (
                    (total("tandem_prompt_tokens_total"), "computed"),
                    (total("tandem_cached_tokens_total"), "cached"),
                    (total("tandem_output_tokens_total"), "output"),
                ),
            ),
            Panel(
                "KV cache in use", "percentunit",
                ((f"{most('tandem_worker_kv_blocks_used / tandem_worker_kv_blocks', 'worker')}", "{{worker}}"),),
            ),
            Panel("Preempted sequences", "ops", ((moved("tandem_preemptions_total", "worker"), "{{worker}}"),)),
            Panel(
                "Where an engine's time goes", "percentunit",
                ((moved("tandem_step_seconds_total", "worker, phase"), "{{worker}} {{phase}}"),),
            ),
        ),
    ),
    (
        "KV between workers",
        (
            Panel(
                "Prompt tokens by source", "percentunit",
                (
                    (
                        f"{moved('tandem_prompt_source_tokens_total', 'source')} / ignoring (source) group_left () "
                        f"{total('tandem_prompt_source_tokens_total', 'worker, source')}",
                        "{{source}}",
                    ),
                ),
            ),
            Panel(
                "KV bytes moved", "Bps",
                (
                    (total("tandem_handoff_bytes_total"), "handed over"),
                    (total("tandem_fetch_bytes_total"), "fetched"),
                    (total("tandem_store_sealed_bytes_total", "store"), "written"),
                ),
            ),
            Panel(
                "What failed", "ops",
                (
                    (total("tandem_handoff_failures_total"), "handoffs"),
                    (total("tandem_fetch_failures_total"), "fetches"),
                    (total("tandem_offload_failures_total"), "blocks not written"),
                    (total("tandem_store_disk_errors_total", "store"), "disk"),
                    (total("tandem_store_corrupt_blocks_total", "store"), "corrupt"),
                ),
            ),
            Panel("Fetch or recompute", "ops", ((moved("tandem_fetch_decisions_total", "decision"), "{{decision}}"),)),
            Panel(
                "KV by tier", "bytes", ((most("tandem_kv_bytes", "tier, state"), "{{tier}} {{state}}"),)
            ),
            Panel(
                "Store and index", "short",
                (
                    (moved("tandem_store_evictions_total", "store", "store"), "{{store}} evicts"),
                    ("max(tandem_index_behind_seconds)", "index behind, seconds"),
                ),
            ),
        ),
    ),
    (
        "Roles and size",
        (
            Panel("Ratio of roles", "percentunit", ((most("tandem_role_ratio", "role"), "{{role}}"),)),
            Panel(
                "The controller's actions", "short",
                (
                    ("max(tandem_role_changes_total)", "role changes"),
                    ("max(tandem_worker_starts_total)", "starts"),
                    ("max(tandem_worker_stops_total)", "stops"),
                    ("max(tandem_worker_migrations_total)", "migrations"),
                ),
            ),
            Panel(
                "Error of the performance models", "percentunit",
                ((most("tandem_model_error", "worker, of"), "{{worker}} {{of}}"),),
            ),
        ),
    ),
    (
        "GPUs",
        (
            Panel(
                "Utilization", "percentunit",
                ((most("tandem_gpu_utilization_ratio", "node, gpu"), "{{node}} {{gpu}}"),),
            ),
            Panel(
                "Memory", "percentunit",
                ((most("tandem_gpu_memory_used_bytes / tandem_gpu_memory_bytes", "node, gpu"), "{{node}} {{gpu}}"),),
            ),
            Panel("Power", "watt", ((most("tandem_gpu_power_watts", "node, gpu"), "{{node}} {{gpu}}"),)),
        ),
    ),
    (
        "Cost",
        (
            Panel(
                "Per hour and tenant, at the price above", "currencyUSD",
                ((f"$gpu_hour_price * {rate('tandem_gpu_seconds_total', 'model, tenant')}", "{{tenant}}"),),
            ),
            Panel(
                "Tokens per tenant", "short",
                ((rate("tandem_tenant_tokens_total", "tenant, kind"), "{{tenant}} {{kind}}"),),
            ),
        ),
    ),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """As Grafana 10 and later read it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        y += 1
        for at, panel in enumerate(row):
            x, down = at * WIDTH % COLUMNS, at * WIDTH // COLUMNS * HEIGHT
            panels.append(_panel(panel, {"x": x, "y": y + down, "w": WIDTH, "h": HEIGHT}))
        y += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
    return {
        "uid": "tandem",
        "title": "Tandem",
        "tags": ["tandem"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_price()]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, start=1)],
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
            for at, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _price() -> dict[str, Any]:
    value = {"selected": True, "text": "2.50", "value": "2.50"}
    return {
        "type": "textbox",
        "name": "gpu_hour_price",
        "label": "price of a GPU hour",
        "query": "2.50",
        "current": value,
        "options": [value],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=1) + "\n")
