"""Requests that arrive at their times whatever the server does: a recorded trace, bursts, a square wave of mix, a day.

A dispatcher sleeps until a request's time and starts a greenlet that sends it, so no answer holds up the next request.
How late each was sent is measured, and being late fails the run. Several processes share a trace, every n-th request
each; therefore every process has a dispatcher, and the user that Locust starts in one of them only stands for it.
Prompts are token ids made from the trace's block ids, so they share exactly the prefixes that the trace says.
"""

from __future__ import annotations

import zlib
from typing import Any

import gevent
from gevent.pool import Group
from locust import User, task
from locust.exception import StopUser

from loadtests.client import COMPLETIONS, Ask
from loadtests.options import Options
from loadtests.recorder import Recorder
from loadtests.replay import prompt
from loadtests.simulator.trace import TraceRequest

LEAD_S = 0.5  # to have the first request ready
EARLY_S = 0.002  # it is awake so long before each: timers have milliseconds, and getting a core takes a while


def dispatch(recorder: Recorder, chosen: Options, scenario: str, process: int, processes: int) -> None:
    """Send this process's share of the scenario's requests, each at its time, and wait for the answers."""
    trace = chosen.arrivals(scenario)
    begun_s = recorder.now() + LEAD_S  # reading the trace took a moment, which is nobody's lateness
    flights = Group()
    for request in trace.requests[process::processes]:
        ask = _ask(request, trace.block_size, scenario, chosen)
        body = recorder.encode(ask)  # before its time, for a long prompt takes milliseconds
        due_s = begun_s + request.arrival_s
        if not recorder.pause(due_s - EARLY_S - recorder.now()):
            break
        while recorder.now() < due_s:
            gevent.sleep(0)  # others may run
        flights.spawn(recorder.perform, scenario, ask, due_s, body)
    flights.join()


def _ask(request: TraceRequest, block_size: int, scenario: str, chosen: Options) -> Ask:
    # each scenario and seed has blocks of its own: else one would find what another has left in the cache
    own = zlib.crc32(f"{chosen.seed}/{scenario}".encode()) << 32
    named = request._replace(blocks=tuple(own + block for block in request.blocks))
    tokens = prompt(named, block_size, chosen.vocab)
    return Ask(COMPLETIONS, {"prompt": tokens, "max_tokens": request.output_tokens, "temperature": 0})


class ArrivalUser(User):
    """Chooses a scenario by being there."""

    abstract = True
    scenario = ""
    fixed_count = 1

    @task
    def stand(self) -> None:
        recorder: Any = self.environment.recorder
        recorder.ending.wait()
        raise StopUser


class BurstUser(ArrivalUser):
    """Gaps between requests with a coefficient of variation of 4."""

    scenario = "burst"


class SquareUser(ArrivalUser):
    """Long prompts with short answers, then short prompts with long answers, and again."""

    scenario = "square"


class DiurnalUser(ArrivalUser):
    """A day in the time of the run: the rate is a sine that reaches 1.8 times its mean."""

    scenario = "diurnal"


class TraceUser(ArrivalUser):
    """What --trace says."""

    scenario = "trace"
