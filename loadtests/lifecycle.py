"""A load test from its options to its exit code: hooks into Locust's events, in one process or with workers.

    init          options checked, model and SLO found; what is wrong ends the run with one line
    test_start    a recorder in every process
    reports       workers hand their measurements over, the master adds them up
    test_stopping nobody begins anything more; answers that are under way are waited for and counted
    quitting      figures, verdicts, run.json and report.html; exit code 1 when a limit was missed

Locust alone would cut what is under way when a run ends, and would gate on nothing but failed requests.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import re
import sys
import time
from typing import Any

import gevent
from gevent.event import Event
from locust.runners import MasterRunner, WorkerRunner

from cluster.errors import ConfigError
from loadtests import figures, page, slo
from loadtests.client import Client, first_model
from loadtests.measurements import Measurements
from loadtests.open_loop import ArrivalUser, dispatch
from loadtests.options import ARRIVALS, Options, add_arguments, options
from loadtests.recorder import Recorder
from loadtests.scenarios import SCENARIOS

# messages: the master says that the end has come; a worker that all its answers are there, that its share of a trace
# has been sent and answered
END, ENDED, REPLAYED = "loadtest_end", "loadtest_ended", "loadtest_replayed"
PATIENCE_S = 60.0  # for answers that are under way at the end
logger = logging.getLogger(__name__)


def register(events: Any) -> None:
    """Listen to Locust's events."""
    events.init_command_line_parser.add_listener(add_arguments)
    events.init.add_listener(_init)


def _init(environment: Any, runner: Any, **_: Any) -> None:
    # imports took a while in which gevent did not look at the clock, and Locust's --run-time would end so much early
    gevent.get_hub().loop.update_now()
    try:
        (_Worker if isinstance(runner, WorkerRunner) else _Main)(environment, runner)
    except ConfigError as error:
        sys.exit(f"load test: {error.message}")


class _Process:
    """What a worker and the main process have in common: users run here, and what they do is recorded."""

    def __init__(self, environment: Any, runner: Any) -> None:
        self.environment = environment
        self.runner = runner
        environment.recorder = None
        environment.events.test_start.add_listener(self._start)

    def _taken(self) -> dict[str, Any]:
        """What this process has measured since it was last asked."""
        recorder: Recorder | None = self.environment.recorder
        return (recorder.measurements if recorder else Measurements()).take()

    def _start(self, environment: Any, **_: Any) -> None:
        chosen = options(environment.host, environment.parsed_options)
        client = Client(chosen.url, chosen.model, chosen.key, chosen.extra, chosen.timeout_s)
        parsed = environment.parsed_options
        gc.collect()
        gc.freeze()  # a collection over all modules takes tens of milliseconds in which nobody is on time
        environment.recorder = Recorder(environment.events, client, parsed.limits, chosen.warmup_s)
        if not isinstance(self.runner, MasterRunner):  # which has no users
            for scenario in parsed.arriving:
                gevent.spawn(self._dispatch, chosen, scenario)

    def _dispatch(self, chosen: Options, scenario: str) -> None:
        processes = max(1, self.environment.parsed_options.expect_workers)
        try:
            dispatch(self.environment.recorder, chosen, scenario, self.runner.worker_index, processes)
        finally:
            self.runner.send_message(REPLAYED)  # or the run would not end; what was not sent is missed


class _Worker(_Process):
    """One of several processes with users; what it measures goes to the master."""

    def __init__(self, environment: Any, runner: Any) -> None:
        super().__init__(environment, runner)
        environment.events.report_to_master.add_listener(self._report)
        runner.register_message(END, self._end, concurrent=True)

    def _report(self, client_id: str, data: dict[str, Any]) -> None:
        data["loadtest"] = self._taken()

    def _end(self, environment: Any, msg: Any) -> None:
        if environment.recorder:
            environment.recorder.end(PATIENCE_S)
        self.runner.send_message(ENDED, self._taken())


class _Main(_Process):
    """The master, or the only process."""

    def __init__(self, environment: Any, runner: Any) -> None:
        """Raises ConfigError."""
        super().__init__(environment, runner)
        self.options = self._prepare()
        self.measurements = Measurements()
        self._begun_s = self._window_s = 0.0
        self._workers_left = self._replays_left = 0
        self._stopping = False
        self._stopped = Event()
        events = environment.events
        events.worker_report.add_listener(lambda client_id, data: self._merge(data.get("loadtest")))
        events.test_stopping.add_listener(self._stop)
        events.quitting.add_listener(self._finish)
        runner.register_message(ENDED, self._worker_ended)
        runner.register_message(REPLAYED, self._replayed)

    def _prepare(self) -> Options:
        """Find out what the options leave open, so that workers are told it too."""
        parsed = self.environment.parsed_options
        chosen = options(self.environment.host, parsed)
        parsed.limits = slo.load(chosen.slo, (*SCENARIOS, *ARRIVALS))
        classes = self.environment.user_classes
        if not parsed.user_classes:  # all would be too much at once, and arrivals end a run
            classes[:] = [made for made in classes if made.__name__ in ("ChatUser", "TurnsUser", "RagUser", "CodeUser")]
        parsed.arriving = [made.scenario for made in classes if issubclass(made, ArrivalUser)]
        self._due = {scenario: self._count(chosen, scenario) for scenario in parsed.arriving}
        self._chosen = [made.scenario for made in classes]
        parsed.num_users = max(parsed.num_users or 1, len(classes))  # each has one at least
        parsed.model = chosen.model or first_model(chosen.url, chosen.key)
        return options(self.environment.host, parsed)

    @staticmethod
    def _count(chosen: Options, scenario: str) -> int:
        """How many requests of a scenario are to be counted."""
        return sum(request.arrival_s >= chosen.warmup_s for request in chosen.arrivals(scenario).requests)

    def _start(self, environment: Any, **_: Any) -> None:
        if isinstance(self.runner, MasterRunner):  # as many as there are, however many were expected
            environment.parsed_options.expect_workers = self.runner.worker_count
        super()._start(environment)
        self.measurements = Measurements()
        self._stopping = False
        self._stopped.clear()
        self._begun_s = time.perf_counter()
        self._replays_left = max(1, environment.parsed_options.expect_workers) * len(self._due)
        if self._due:  # with a worker lost nobody would say that all has been replayed
            longest_s = max(self.options.arrivals(name).seconds for name in self._due)
            gevent.spawn_later(longest_s + self.options.timeout_s + PATIENCE_S, self._overdue, self._begun_s)

    def _merge(self, taken: dict[str, Any] | None) -> None:
        if taken:
            self.measurements.merge(taken)

    def _replayed(self, environment: Any, msg: Any) -> None:
        self._replays_left -= 1
        if not self._replays_left and not self._stopping:
            gevent.spawn(self.runner.quit)  # not here: this greenlet receives what quitting waits for

    def _overdue(self, begun_s: float) -> None:
        if begun_s == self._begun_s and not self._stopping:
            logger.error("the replay did not end: a worker was lost, or an answer never came")
            self.runner.quit()

    def _worker_ended(self, environment: Any, msg: Any) -> None:
        self._merge(msg.data)
        self._workers_left -= 1
        if not self._workers_left:
            self._stopped.set()

    def _stop(self, environment: Any, **_: Any) -> None:
        """Whoever asks for the end first brings it about; others wait for it."""
        if not self._stopping:
            self._stopping = True
            if isinstance(self.runner, MasterRunner):
                self._workers_left = len(self.runner.clients)
                self.runner.send_message(END)
            else:
                self.environment.recorder.end(PATIENCE_S)
                self._merge(self._taken())
                self._stopped.set()
        if not self._stopped.wait(PATIENCE_S + 5):
            logger.warning("a worker did not say what it had measured last; its last seconds are missing")
        self._window_s = time.perf_counter() - self._begun_s - self.options.warmup_s

    def _finish(self, environment: Any, **_: Any) -> None:
        if self._begun_s and not self._stopping:  # interrupted: nobody waits for what is under way
            self._merge(self._taken())
            self._window_s = time.perf_counter() - self._begun_s - self.options.warmup_s
        try:
            missed = self._write(*self._run())
        except ConfigError as error:
            logger.error(error.message)
            missed = True
        crashed = bool(self.runner.exceptions)
        environment.process_exit_code = int(missed or crashed)

    def _run(self) -> tuple[dict[str, Any], list[slo.Verdict]]:
        """The run as figures.py says it is, and how it did."""
        limits, measurements = self.environment.parsed_options.limits, self.measurements
        window_s = max(1.0, self._window_s)
        scenarios = {name: figures.scenario(measurements.whole(name), window_s) for name in measurements.slots}
        for name, found in scenarios.items():
            found |= figures.asked_for(measurements, name, slo.limits_of(limits, name))
            found["series"] = figures.series(measurements, name)
        verdicts = slo.judge(limits, scenarios, self._chosen, self._due)
        run = {
            "name": self.options.label or "-".join(scenarios) or "nothing",
            "url": self.options.url,
            "model": self.options.model,
            "window_s": window_s,
            "settings": self.options.settings() | {"users": self.environment.parsed_options.num_users},
            "scenarios": scenarios,
            "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
            "errors": [[name, error, times] for (name, error), times in measurements.errors.items()],
        }
        return run, verdicts

    def _write(self, run: dict[str, Any], verdicts: list[slo.Verdict]) -> bool:
        """Files, and a line per verdict. Returns whether a limit was missed. Raises ConfigError."""
        path = self.options.out / re.sub(r"[^\w.-]+", "-", run["name"])
        page.write([run], path.with_suffix(".html"), f"Load test: {run['name']}")
        path.with_suffix(".json").write_text(json.dumps(run) + "\n")
        for verdict in verdicts:
            sys.stderr.write(f"{verdict}\n")
        sys.stderr.write(f"report: {path.with_suffix('.html')}\n")
        return not all(verdict.kept for verdict in verdicts)
