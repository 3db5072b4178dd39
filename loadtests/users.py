"""Locust's users: one class per scenario, whose users ask what loadtests/scenarios.py says, one thing at a time.

They wait for their answers (a closed loop). The n-th user of a scenario asks the same in every run of a seed, however
many processes share the users.
"""

from __future__ import annotations

from typing import Any

from locust import User, task
from locust.exception import StopUser

from loadtests.options import options
from loadtests.scenarios import Population, asks

AFTER_ERROR_S = 1.0  # a server that refuses is not asked as fast as it can refuse


class ScenarioUser(User):
    """Asks, waits for the answer, asks again."""

    abstract = True
    scenario = ""

    def on_start(self) -> None:
        chosen = options(self.environment.host, self.environment.parsed_options)
        processes = max(1, self.environment.parsed_options.expect_workers)
        number = self.environment.recorder.join(self.scenario) * processes + self.environment.runner.worker_index
        self._asks = asks(self.scenario, Population(chosen.seed, chosen.length), number)
        self._ask = next(self._asks)

    @task
    def ask(self) -> None:
        recorder: Any = self.environment.recorder
        if not recorder.pause(self._ask.think_s):
            raise StopUser
        answer = recorder.perform(self.scenario, self._ask)
        if answer.error:
            recorder.pause(AFTER_ERROR_S)
        self._ask = self._asks.send(answer.text)


class ChatUser(ScenarioUser):
    """Short questions behind a few long system prompts."""

    scenario = "chat"


class TurnsUser(ScenarioUser):
    """Conversations that grow."""

    scenario = "turns"


class RagUser(ScenarioUser):
    """Long documents, short answers."""

    scenario = "rag"


class CodeUser(ScenarioUser):
    """Completions in a file that grows."""

    scenario = "code"


class SoakUser(ScenarioUser):
    """All of these for a long time; some leave in the middle."""

    scenario = "soak"
