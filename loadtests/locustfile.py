"""What Locust loads: the scenarios of a load test of any OpenAI-compatible server, and the hooks that measure it.

    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 -u 8 -t 60s ChatUser RagUser
    locust -f loadtests/locustfile.py --headless --host http://127.0.0.1:8000 TraceUser --trace trace.jsonl.gz

docs/loadtests.md has the scenarios, the options and how to read the report.
"""

from __future__ import annotations

from locust import events

from loadtests.lifecycle import register
from loadtests.open_loop import BurstUser, DiurnalUser, SquareUser, TraceUser
from loadtests.users import ChatUser, CodeUser, RagUser, SoakUser, TurnsUser

__all__ = [
    "BurstUser",
    "ChatUser",
    "CodeUser",
    "DiurnalUser",
    "RagUser",
    "SoakUser",
    "SquareUser",
    "TraceUser",
    "TurnsUser",
]

register(events)
