"""From started processes to a worker: its shards join rank 0, then all load at the same time.

    followers     connect, Joined ─────►│ all there │◄─── Begin ───│ build links, load │─── Loaded ──► serving
    rank 0                              │           │              │ the same          │

Every wait has a deadline here; the followers' waits end when rank 0 closes their connections. What goes wrong at any
rank is raised here, as what it was: the first shard that cannot serve says why, not the last that waited for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any, TypeVar

from cluster.errors import StartupError, TandemError, subclasses
from cluster.shard_messages import Begin, Failed, Joined, Loaded
from workers.control import HANDSHAKE_S, Control, ControlListener
from workers.runner import Stage

REASON_S = 2.0  # a shard whose peer failed may say so before the peer has said why
T = TypeVar("T")
log = logging.getLogger(__name__)


def join(listener: ControlListener, followers: int, timeout_s: float) -> list[Control]:
    """The connections of ranks 1..followers, in order; nobody can join afterwards. Raises StartupError when not all
    join in time."""
    deadline = time.monotonic() + timeout_s
    joined: dict[int, Control] = {}  # rank -> its connection
    try:
        while len(joined) < followers:
            control = listener.accept(deadline)
            if control is None:
                raise StartupError(_missing(joined, followers, timeout_s, listener.refused))
            message = control.receive(HANDSHAKE_S)
            if not isinstance(message, Joined) or message.rank in joined or not 1 <= message.rank <= followers:
                control.close()
                raise StartupError(f"a shard joined with {message}; ranks 1 to {followers} are expected, each once")
            control.name = f"shard {message.rank} (pid {message.pid})"
            joined[message.rank] = control
    except TandemError:
        close(list(joined.values()))
        raise
    finally:
        listener.close()
    return [joined[rank] for rank in range(1, followers + 1)]


def load(
    controls: list[Control], rendezvous: str, build: Callable[[str], Stage], timeout_s: float
) -> tuple[Stage, tuple[str, ...]]:
    """Have all shards load, this one with `build(rendezvous)`. Its stage, and where the others serve gRPC, in the order
    of their ranks. Raises the error of the first that failed, or StartupError when one takes longer than that."""
    try:
        for control in controls:
            control.send(Begin(rendezvous))
        own = _in_thread(partial(build, rendezvous))
        others = [_in_thread(partial(_loaded, control, timeout_s)) for control in controls]
        _all(own, others, timeout_s)
    except Exception:
        close(controls)
        raise
    return own.result(), tuple(other.result() for other in others)


def close(controls: list[Control]) -> None:
    for control in controls:
        control.close()


def error_of(message: Failed) -> TandemError:
    return subclasses(TandemError).get(message.code, TandemError)(message.message)


def _missing(joined: dict[int, Control], followers: int, timeout_s: float, refused: int) -> str:
    missing = [str(rank) for rank in range(1, followers + 1) if rank not in joined]
    strangers = f"; {refused} connections were refused, of another cluster or secret" if refused else ""
    return f"shards {', '.join(missing)} of this worker did not join within {timeout_s:g} s; see their logs{strangers}"


def _loaded(control: Control, timeout_s: float) -> str:
    message = control.receive(timeout_s)
    if isinstance(message, Failed):
        raise error_of(message)
    if not isinstance(message, Loaded):
        raise StartupError(f"{control.name} said {type(message).__name__} while it loaded")
    return message.address


def _all(own: Future[Stage], others: list[Future[str]], timeout_s: float) -> None:
    """Return when all have loaded, else raise the most telling of their errors."""
    futures: list[Future[Any]] = [own, *others]
    done, pending = wait(futures, timeout_s, FIRST_EXCEPTION)
    errors = _errors(done)
    if errors and not _reasons(errors):
        done, _ = wait(futures, REASON_S)
    if errors:
        raise [*_reasons(_errors(done)), *errors][0]
    if pending:
        ranks = ", ".join(str(rank) for rank, future in enumerate(futures) if future in pending)
        raise StartupError(f"shards {ranks} of this worker did not load within {timeout_s:g} s; see their logs")


def _errors(done: Iterable[Future[Any]]) -> list[BaseException]:
    return [error for future in done if (error := future.exception()) is not None]


def _reasons(errors: list[BaseException]) -> list[BaseException]:
    """Those that say why a shard cannot start. Others tell of a peer that is gone."""
    return [error for error in errors if isinstance(error, StartupError)]


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """A daemon, unlike an executor's: a shard that failed ends without waiting for what waits for its peers."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future
