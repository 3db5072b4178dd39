"""A deployment as a dashboard sees it, made up: any number of workers, ten minutes of load that rises until one worker
changes its role, and requests with placements. The same every time.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from cluster.messages import ControllerInfo, Load, Role
from cluster.perfmodel import PRIOR
from router.costs import Terms
from router.dashboard_data import Minute, Seen, WorkerNow, data, sample_of
from router.events import event
from router.flows import Flow
from router.history import KEPT, History
from router.last_minute import Percentiles
from router.placement import Decision, Route
from router.watch import Ended

CHANGED = 0.45  # part of the ten minutes since decode-3 changed its role
LINES = (
    "09:21:40 decode-7 is started for decode",
    "09:21:58 decode-7 has joined",
    "09:24:12 1 to prefill: the busier pool is 91% busy",
    "09:24:12 decode-3 turns to prefill",
    "09:28:05 decode-5 is lost",
    "09:28:17 decode-5 is back",
)
CONTROLLER = ControllerInfo("controller", "model", 4711, 1, 1, 0, 0, 0, 0, 0.0, LINES)


def load(role: Role, running: int, waiting: int, used: int) -> Load:
    return Load(role, running, waiting, 300 * waiting, 4_000 - used, 1_200, 4_000, 1, 2, 3, 4, 5, 6, 0.5, 0)


def workers(count: int) -> tuple[WorkerNow, ...]:
    """Every second one was made for decode, of which one prefills now; the one before the last is lost where there are
    more than ten."""
    rng = random.Random(count)
    made = []
    for number in range(count):
        role: Role = "prefill" if number % 2 == 0 else "decode"
        name = f"{role}-{number // 2}"
        if name == "decode-3":
            role = "prefill"
        if count > 10 and number == count - 2:
            made.append(WorkerNow(name, role, "lost", "node-3", None, None, Flow()))
            continue
        prefill = role == "prefill"
        running, waiting = (rng.randint(1, 4), rng.choice((0, 0, 1))) if prefill else (rng.randint(9, 30), 0)
        used = rng.randint(200, 900) if prefill else rng.randint(1_200, 3_300)
        flow = Flow(rng.uniform(900, 1_600), 6.0, 0.0, 40.0) if prefill else Flow(9.0, rng.uniform(250, 420), 6.1e6)
        told = load(role, running, waiting, used)
        made.append(WorkerNow(name, role, "serving", f"node-{number % 3}", told, PRIOR, flow))
    return tuple(made)


def history(count: int) -> History:
    """It ends with what `seen` says, and was busier before decode-3 changed its role."""
    made, rng, end = History(), random.Random(7), sample_of(seen(count))
    for second in range(KEPT):
        left = (KEPT - 1 - second) / KEPT  # of the time, 0 at the end
        busy = 1.0 - 0.3 * left + 0.08 * math.sin(22 * left) + rng.gauss(0, 0.012) * (left > 0)
        if left > CHANGED:
            busy += 0.75 / (1 + math.exp(28 * (left - CHANGED - 0.17)))
        moved = left > CHANGED and count > 6
        early = second < 20  # no request had come
        made.add(
            dataclasses.replace(
                end,
                prefill=end.prefill - moved,
                decode=end.decode + moved,
                running=round(end.running * busy),
                waiting=max(end.waiting if left == 0 else 0, round(40 * (busy - 1.2))),
                kv_used=(end.kv_used or 0.0) * busy**0.7,
                ttft_p50_ms=None if early else (end.ttft_p50_ms or 0.0) * busy**1.8,
                ttft_p95_ms=None if early else (end.ttft_p95_ms or 0.0) * busy**2.6,
                itl_p50_ms=None if early else (end.itl_p50_ms or 0.0) * busy**0.25,
                itl_p95_ms=None if early else (end.itl_p95_ms or 0.0) * busy**0.35,
                hit_ratio=(end.hit_ratio or 0.0) + 0.12 * math.sin(7 * left),
                prompt_tokens_s=end.prompt_tokens_s * busy,
                output_tokens_s=end.output_tokens_s * busy * (1 + rng.gauss(0, 0.02) * (left > 0)),
                handoff_bytes_s=end.handoff_bytes_s * busy * (1 + rng.gauss(0, 0.04) * (left > 0)),
            )
        )
    return made


def decision(prefill: str | None, decode: str, queue_ms: float) -> Decision:
    chosen = Terms(prefill, decode, queue_ms, 212.4, 0.0, 9.1 if prefill else 0.0, 1_804.0, 310.5, 512, 256)
    second = None if prefill else "prefill-3"
    other = Terms(second, decode, 3.2, 233.0, 18.0, 12.5 if second else 0.0, 1_804.0, 902.7, 768, 0)
    return Decision(Route(prefill, decode), chosen, other, 8, "least_time", 1_280)


def ended(count: int) -> list[Ended]:
    rng = random.Random(11)
    made = []
    for number in range(1, count + 1):
        outcome = "cancelled" if number % 17 == 0 else "worker_lost" if number % 23 == 0 else "finished"
        prefill = None if number % 5 == 0 else f"prefill-{number % 4}"
        made.append(
            Ended(
                number=number,
                id=f"{number:08x}-0",
                tenant=("3fa2c81b90d24e17", "b7710c3ad5e92f60")[number % 3 == 0],
                outcome=outcome,
                prompt_tokens=rng.randint(300, 4_000),
                cached_tokens=rng.choice((0, 256, 288)),
                output_tokens=rng.randint(20, 400),
                turn_ms=rng.uniform(1, 30),
                ttft_ms=rng.uniform(240, 900),
                itl_ms=rng.uniform(22, 38),
                total_ms=rng.uniform(3_000, 14_000),
                ended_s=1_000.0 - 0.7 * (count - number),
                decisions=(decision(prefill, f"decode-{number % 3}", rng.uniform(0, 150)),),
            )
        )
    return made


def seen(count: int) -> Seen:
    there = workers(count)
    flows = [worker.flow for worker in there]
    return Seen(
        router="router-5f0c2a9d1e77",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        redis=True,
        ttft_slo_ms=2_000.0,
        itl_slo_ms=50.0,
        workers=there,
        controller=CONTROLLER,
        queue_requests=3,
        queue_tokens=4_210,
        minute=Minute(
            Percentiles(412, 318.2, 641.7, 1_022.4),
            Percentiles(48_000, 26.4, 37.9, 52.3),
            0.9864,
            0.438,
            {"finished": 405, "cancelled": 7},
        ),
        flow=Flow(
            sum(flow.prompt_tokens for flow in flows),
            sum(flow.output_tokens for flow in flows),
            sum(flow.handoff_bytes for flow in flows),
            sum(flow.fetched_tokens for flow in flows),
        ),
        events=tuple(map(event, LINES)),
        now_s=1_002.0,
    )


def answer(count: int) -> dict[str, Any]:
    """What `/dashboard/data` would say of so many workers."""
    return data(seen(count), history(count).after(0), ended(50))
