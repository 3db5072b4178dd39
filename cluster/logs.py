"""How every process of a deployment logs: on standard error, as text or as one JSON object per line.

TANDEM_LOG says which (json or text); without it, text on a terminal and JSON elsewhere. The level is an operator's
order (`tandem log`), which `follow` carries to a process while it runs. What is logged never holds a prompt, an output
or a secret; that is for those who log to see to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time

from cluster.errors import TandemError
from cluster.order_book import OrderBook
from cluster.orders import Level, Orders

VARIABLE = "TANDEM_LOG"
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS = ("cluster", "deploy", "kvstore", "router", "workers")  # other packages' debugging helps nobody here
FOLLOW_S = 2.0  # between two looks at what is ordered
USUAL: Level = "info"
log = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """`extra={"fields": {...}}` of a log call become fields of the object."""

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure() -> None:
    """Once in every process that serves."""
    handler = logging.StreamHandler()
    wanted = os.environ.get(VARIABLE) or ("text" if sys.stderr.isatty() else "json")
    handler.setFormatter(JsonFormatter() if wanted == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _set(logging.INFO)
    os.environ[VARIABLE] = wanted  # processes that this one starts do the same


def set_level(orders: Orders) -> None:
    """As ordered, or as usual."""
    level = logging.getLevelNamesMapping()[(orders.log.level if orders.log else USUAL).upper()]
    if log.getEffectiveLevel() != level:
        _set(level)
        log.log(level, "the log level is %s now", logging.getLevelName(level).lower())


def _set(level: int) -> None:
    for package in OURS:
        logging.getLogger(package).setLevel(level)


def follow(redis_url: str, namespace: str) -> None:
    """From a thread of its own, for as long as the process lives: log at the level that is ordered."""
    threading.Thread(target=lambda: asyncio.run(_follow(redis_url, namespace)), name="log level", daemon=True).start()


async def _follow(redis_url: str, namespace: str) -> None:
    book = OrderBook(redis_url)
    while True:
        try:
            set_level(await book.read(namespace))
        except TandemError as error:
            log.debug("the log level stays as it is: %s", error.message)
        await asyncio.sleep(FOLLOW_S)
