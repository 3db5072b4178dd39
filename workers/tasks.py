"""How a task ended, for whoever must be told exactly once.

Asked from a callback of the task, not from a `finally` in it: a task that is cancelled before it has begun runs none.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


def outcome(task: asyncio.Task[T], otherwise: T) -> T:
    """The result of a task that is done; `otherwise` when it was cancelled, or failed, which is a bug and is logged."""
    if task.cancelled():
        return otherwise
    if (error := task.exception()) is not None:
        log.error("%s failed", task.get_name(), exc_info=error)
        return otherwise
    return task.result()
