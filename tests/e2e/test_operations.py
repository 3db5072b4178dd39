"""What an operator does to a running deployment, by the commands, under load: no request is lost, every token is right.

Real processes, Ray actors, Redis and blocks; only the model is simulated. The size policy is `fixed`, so that whatever
happens was ordered.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from tests.e2e.test_scaling import MIXED, controller, roles, settle, traffic
from tests.serving import Served, serving, wait_until

USERS = 3
WAIT_S = 120.0  # for workers to come, on a busy machine


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[Served]:
    counts = ("--prefill", "1", "--decode", "2", "--scale", "1..4", "--autoscaling", "fixed")
    settings = {"TANDEM_SIM_MS": "30,0.2,0", "TANDEM_THREADS": "1", "TANDEM_OPERATOR_KEY": "operator-key"}
    with serving(str(tiny), "--runner", "sim", *counts, **settings) as made:
        yield made


def tandem(served: Served, *arguments: str, key: str = "operator-key") -> Result:
    environment = {"TANDEM_OPERATOR_KEY": key, "COLUMNS": "80"}
    return CliRunner().invoke(app, [*arguments, "--url", served.url], env=environment)


def done(served: Served, *arguments: str) -> str:
    result = tandem(served, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def ids(served: Served) -> set[str]:
    """Of the workers that are connected."""
    return {worker["id"] for worker in served.status()["workers"] if worker["connected"]}


@pytest.mark.timeout(600)
def test_drain_scale_and_restart_under_load_lose_nothing(
    served: Served, tiny: Path, record_property: Callable[[str, Any], None]
) -> None:
    with traffic(served, tiny, USERS, MIXED) as made:
        settle(served, made, lambda: made.answered > 5)
        drained = re.fullmatch(r"decode-1 is stopped, ([\d.]+) s after .*\n", done(served, "drain", "decode-1"))
        assert drained
        record_property("seconds of a drain", float(drained[1]))
        made.check()
        assert ids(served) == {"prefill-0", "decode-0"}

        assert "scale: 3..3, as ordered" in done(served, "scale", "3")
        settle(served, made, lambda: len(ids(served)) == 3)
        done(served, "scale", "1..2")
        settle(served, made, lambda: len(ids(served)) == 2 and controller(served)["draining"] == 0)

        before = ids(served)
        replaced = re.fullmatch(r"2 workers are replaced, in ([\d.]+) s\n", done(served, "restart"))
        assert replaced
        record_property("seconds of a restart of two workers", float(replaced[1]))
        assert not ids(served) & before
        settle(served, made, lambda: len(ids(served)) == 2)
        answered = made.answered
        settle(served, made, lambda: made.answered > answered + 5)
    served.assert_no_leaks()
    done(served, "scale", "auto")


def test_roles_are_kept_as_ordered_under_load(served: Served, tiny: Path) -> None:
    done(served, "scale", "4")
    wait_until(lambda: len(ids(served)) == 4, WAIT_S, lambda: str(served.status()))
    with traffic(served, tiny, USERS, MIXED) as made:
        for prefill in (3, 1):
            assert f"kept at {prefill} prefill : {4 - prefill} decode" in done(
                served, "roles", f"prefill={prefill}", f"decode={4 - prefill}"
            )
            settle(served, made, lambda prefill=prefill: roles(served).count("prefill") == prefill)
        one = next(w["id"] for w in served.status()["workers"] if w["role"] == "decode")
        assert f"{one}: " in done(served, "roles", f"{one}=prefill")
        settle(served, made, lambda: roles(served) == ["decode", "decode", "prefill", "prefill"])
        assert "as the traffic needs" in done(served, "roles", "auto")
    done(served, "scale", "auto")


def test_nonsense_is_one_line_and_exit_1(served: Served) -> None:
    for arguments, words in (
        (("drain", "nobody"), "no worker 'nobody' serves"),
        (("scale", "9"), "more than this deployment may have, 4"),
        (("scale", "many"), "say N, MIN..MAX or auto"),
        (("roles", "prefill=9", "decode=9"), "workers, not 18"),
        (("roles", "x=y"), "WORKER=prefill"),
        (("log", "loud"), "level"),
    ):
        result = tandem(served, *arguments)
        assert (result.exit_code, words in result.stderr) == (1, True), result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    refused = tandem(served, "scale", "2", key="wrong")
    assert (refused.exit_code, "x-tandem-operator-key" in refused.stderr) == (1, True)


def test_every_process_follows_the_log_level_and_requests_leave_a_line(served: Served) -> None:
    done(served, "log", "debug")
    actors = [*served.processes("ray::WorkerActor"), *served.processes("ray::StoreActor")]
    (router,) = served.processes("ray::ServeReplica")
    for process in (*actors, router):
        wait_until(lambda pid=process.pid: "the log level is debug now" in str(logged(pid)), 20)
    assert "the log level is debug now" in served.output.read_text()
    assert "log level: info" in done(served, "log", "info")
    prompt = list(range(20, 50))
    served.post("/v1/completions", {"prompt": prompt, "max_tokens": 3}, headers={"x-request-id": "find-me"})
    wait_until(lambda: any(line.get("request_id", "").startswith("find-me-") for line in logged(router.pid)), 20)
    line = next(line for line in logged(router.pid) if line.get("request_id", "").startswith("find-me-"))
    assert (line["prompt_tokens"], line["output_tokens"], line["level"]) == (30, 3, "info")
    assert line["decode"] in ids(served)


def logged(pid: int) -> list[dict[str, Any]]:
    """What that process has written to its standard error as JSON."""
    text = Path(os.readlink(f"/proc/{pid}/fd/2")).read_text(errors="replace")
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
