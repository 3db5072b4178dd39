"""`tandem drain` and `restart` against a router: how they end when an order is lost, withdrawn, or takes too long.

What they do to a deployment is tested in `tests/e2e/test_operations.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner, Result

from cluster.messages import ControllerInfo
from deploy import orders_cli
from deploy.cli import app
from kvstore.redis_server import EmbeddedRedis
from tests.router.fakes import NAMESPACE
from tests.router.harness import Api

ORDERS = f"tandem:{{{NAMESPACE}}}:orders"


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()


@pytest.fixture(scope="module")
def there(model_directory: Path, server: EmbeddedRedis) -> Iterator[Api]:
    """Two workers and a router; a controller that has registered and does nothing."""
    one = Api(model_directory)
    one.settings = dataclasses.replace(one.settings, redis_url=server.url)
    one.membership.controllers = [ControllerInfo("controller", NAMESPACE, 5, 0, 0, 0, 0, 0, 0, 0.0, ())]
    with one.serving("pd") as api:
        yield api


def run(there: Api, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", there.url])


def test_an_order_that_is_lost_is_said(there: Api, server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders_cli, "SETTLE_S", 0.2)
    for arguments, words in (
        (("drain", "d1", "--timeout", "60"), "d1 serves on"),
        (("restart", "--timeout", "60"), "not replaced: d1, p1"),
    ):
        with ThreadPoolExecutor(1) as pool, redis.Redis.from_url(server.url) as client:
            command = pool.submit(run, there, *arguments)
            there.wait(lambda client=client: client.delete(ORDERS), 20.0)
            result = command.result(30)
        assert (result.exit_code, words in result.stderr) == (1, True), repr((result.exception, result.output))


def test_a_deadline_ends_the_waiting_and_withdraws_a_restart(there: Api) -> None:
    slow = run(there, "drain", "d1", "--timeout", "0")
    assert (slow.exit_code, "still drains after 0 s" in slow.stderr) == (1, True)
    assert there.http.get("/orders").json()["drain"] == ["d1"]
    slow = run(there, "restart", "p1", "--timeout", "0")
    assert (slow.exit_code, "the others stay" in slow.stderr) == (1, True)
    assert there.http.get("/orders").json()["restart"] is None
