"""Prints docs/metrics.md: `python -m router.metrics_reference > docs/metrics.md`.

From the same declarations that the page is made of, so that no metric is without its line and no line without its
metric. It needs no running server.
"""

from __future__ import annotations

import sys

from router import cluster_metrics, request_metrics, store_metrics, tenant_metrics, worker_metrics
from router.families import SCENARIOS, Family

SECTIONS: tuple[tuple[str, tuple[Family, ...]], ...] = (
    ("Requests", request_metrics.FAMILIES),
    ("Tenants and cost", tenant_metrics.FAMILIES),
    ("Cluster", cluster_metrics.FAMILIES),
    ("Workers", worker_metrics.FAMILIES),
    ("Block stores and their index", store_metrics.FAMILIES),
)
HEAD = """\
# Metrics

`GET /metrics` is one page in Prometheus' text format: what this router counted, and what workers, stores, the index and the
controller said last. Written by `python -m router.metrics_reference` from the code. Names and labels are stable.

- A counter's name ends in `_total`; a histogram `NAME` is `NAME_bucket`, `NAME_sum` and `NAME_count` on the page.
- Requests and tenants are counted by the router that served them and add up over routers. Everything else is the same whichever
  router is asked: take `max`, not `sum`, over routers.
- No label says who a tenant is. `tenant` is the first 8 digits of an HMAC under the cluster's secret, for the first 16 tenants of a
  router's life; all others are `other`.
- *Moves when* names the scenario of `tests/e2e/test_metrics.py` that has to move the metric; the scenarios are listed at the end.

Some questions:

| | |
|---|---|
| hit ratio of prompts, in tokens | `1 - sum(rate(tandem_prompt_source_tokens_total{source="computed"}[5m])) / sum(rate(tandem_prompt_source_tokens_total[5m]))` |
| ... of one tier | `sum by (source) (rate(tandem_prompt_source_tokens_total[5m])) / ignoring (source) group_left () sum(rate(tandem_prompt_source_tokens_total[5m]))` |
| is disaggregation in use | `sum by (kind) (rate(tandem_placements_total[5m]))` |
| 95 % of first tokens come within | `histogram_quantile(0.95, sum by (le) (rate(tandem_time_to_first_token_seconds_bucket[5m])))` |
| how busy a worker's engine is | `1 - rate(tandem_step_seconds_total{phase="idle"}[5m])` |
| dollars per hour and tenant, at 2.50 per GPU hour | `2.50 * sum by (model, tenant) (rate(tandem_gpu_seconds_total[5m]))` |
"""  # noqa: E501
COLUMNS = "| metric | type | labels | unit | meaning | moves when |\n|---|---|---|---|---|---|"


def document() -> str:
    parts = [HEAD]
    for title, families in SECTIONS:
        rows = "\n".join(map(_row, families))
        parts.append(f"## {title}\n\n{COLUMNS}\n{rows}\n")
    scenarios = "\n".join(f"| {name} | {what} |" for name, what in SCENARIOS.items())
    parts.append(f"## Scenarios\n\n| scenario | what happens |\n|---|---|\n{scenarios}\n")
    return "\n".join(parts)


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.unit} | {family.meaning} | {family.moved_by} |"


if __name__ == "__main__":
    sys.stdout.write(document())
