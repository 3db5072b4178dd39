"""Log lines as people and as programs want them, and a level that changes while a process runs."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster import logs
from cluster.order_book import OrderBook
from cluster.orders import NONE, LogOrder, Orders
from kvstore.redis_server import EmbeddedRedis
from tests.serving import wait_until

PROGRAM = """
import logging
from cluster import logs
logs.configure()
log = logging.getLogger("router.x")
log.debug("hidden")
logging.getLogger("somebody.else").info("hidden")
log.info("count %d", 3, extra={"fields": {"tokens": 7}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


@pytest.fixture(autouse=True)
def usual_level() -> Iterator[None]:
    yield
    logs.set_level(NONE)
    for package in logs.OURS:
        logging.getLogger(package).setLevel(logging.NOTSET)


def lines(**environment: str) -> list[str]:
    """What a process with that environment logs."""
    env = {k: v for k, v in os.environ.items() if k != logs.VARIABLE} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("environment", [{}, {"TANDEM_LOG": "json"}])
def test_json_is_one_object_per_line_with_the_fields_of_the_call(environment: dict[str, str]) -> None:
    first, second = map(json.loads, lines(**environment))
    assert first["time"].endswith("Z")
    assert (first["level"], first["logger"], first["message"], first["tokens"]) == ("info", "router.x", "count 3", 7)
    assert "ZeroDivisionError" in second["exception"]


def test_text_is_for_people() -> None:
    first, *rest = lines(TANDEM_LOG="text")
    assert first.endswith("INFO router.x: count 3")
    assert rest[-1] == "ZeroDivisionError: division by zero"


def test_a_level_that_is_ordered_holds_until_another_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    logs.set_level(Orders(log=LogOrder("debug")))
    assert logging.getLogger("workers.engine").getEffectiveLevel() == logging.DEBUG
    logs.set_level(Orders(log=LogOrder("error")))
    assert logging.getLogger("workers.engine").getEffectiveLevel() == logging.ERROR
    logs.set_level(NONE)
    assert logging.getLogger("workers.engine").getEffectiveLevel() == logging.INFO
    assert [record.getMessage().split()[-2] for record in caplog.records] == ["debug", "error", "info"]


def test_a_process_follows_what_is_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FOLLOW_S", 0.05)
    server = EmbeddedRedis()

    def order(level: logs.Level) -> None:
        async def give() -> None:
            book = OrderBook(server.url)
            await book.change("ns", [LogOrder(level)])
            await book.close()

        asyncio.run(give())

    try:
        logs.follow(server.url, "ns")
        for level, number in (("error", logging.ERROR), ("debug", logging.DEBUG)):
            order(level)
            wait_until(lambda number=number: logging.getLogger("workers").level == number, 20)
    finally:
        server.close()
