"""Why a request went where it went, for operators who ask: `x-tandem-explain: 1` is answered by `x-tandem-placement`.

The value is JSON: the decisions taken for the request's first choice, in order; the last is the one that served it.
Each has the terms of the route chosen and of the runner-up, in milliseconds. It tells of other tenants' load and
prefixes, so where there are API keys it needs the operator's as well (`x-tandem-operator-key`).
"""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request

from cluster.errors import Forbidden
from router.middleware import OPERATOR_HEADER
from router.placement import Decision, Terms

ASKED = "x-tandem-explain"
ANSWERED = "x-tandem-placement"
DIGITS = 3


def explained(request: Request) -> bool:
    """Whether the answer is to carry its decisions. Raises Forbidden when the caller may not ask for them."""
    if request.headers.get(ASKED, "0") in ("0", ""):
        return False
    if not request.state.operator:
        raise Forbidden(f"{ASKED} shows what other tenants do; send the operator key as {OPERATOR_HEADER} with it")
    return True


def explanation(decisions: list[Decision]) -> dict[str, str]:
    """The header that tells of them."""
    return {ANSWERED: orjson.dumps([body(decision) for decision in decisions]).decode()}


def body(decision: Decision) -> dict[str, Any]:
    """One decision as plain values, ready for JSON."""
    return decision._asdict() | {
        "route": decision.route._asdict(),
        "chosen": decision.chosen and _terms(decision.chosen),
        "runner_up": decision.runner_up and _terms(decision.runner_up),
    }


def _terms(terms: Terms) -> dict[str, Any]:
    figures = terms._asdict() | {"total_ms": terms.total_ms}
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in figures.items()}
