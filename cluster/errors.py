"""Every error Tandem raises on purpose, as one tree.

Each class carries its HTTP status, OpenAI `type` and `code`, and whether trying again is sound; `router/app.py` is the
only place that turns them into responses and `deploy/cli.py` the only one that turns them into exit codes. The message
tells the user what to do next.

    TandemError
    ├── InvalidRequest 400           the request is wrong; the same request will fail again
    │   ├── ContextLengthExceeded 400
    │   ├── Unauthorized 401
    │   ├── Forbidden 403            no key opens this here
    │   ├── UnknownModel 404
    │   └── BodyTooLarge 413
    ├── Overloaded 429               queues are full; retry after `retry_after_s`
    ├── Unavailable 503              no worker can serve this now; retry
    │   ├── WorkerLost               a worker's stream broke or went silent (dispatch re-places the request)
    │   ├── Moved                    a worker gave a request up so that another goes on with it (dispatch does so)
    │   ├── Leaving                  a worker takes nothing more because it is about to end (dispatch finds another)
    │   └── DeadlineExceeded 504     a leg outlived its deadline
    ├── StoreError 503               the block store said no; callers recompute, so no client ever sees one
    │   ├── NoSpace                  the arena cannot hold the whole handoff
    │   ├── Expired                  the hold ran out or the transfer is unknown
    │   ├── EpochMismatch            the store restarted since the address was handed out
    │   ├── LayoutMismatch           reader, writer and store disagree on a block's bytes
    │   └── Corrupt                  a checksum did not match
    ├── ProtocolError                a peer sent what this version does not understand
    └── StartupError                 `tandem serve` cannot start; one line and a non-zero exit
        ├── ConfigError
        └── ModelError
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of the tree; a bare one means a bug of ours."""

    status = 500
    type = "server_error"
    code = "internal_error"
    retriable = False

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the request field at fault, as the client spelled it
        self.retry_after_s = retry_after_s


class InvalidRequest(TandemError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(InvalidRequest):
    status = 401
    code = "invalid_api_key"


class Forbidden(InvalidRequest):
    status = 403
    code = "permission_denied"


class UnknownModel(InvalidRequest):
    status = 404
    code = "model_not_found"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "body_too_large"


class Overloaded(TandemError):
    status = 429
    type = "rate_limit_error"
    code = "server_overloaded"
    retriable = True


class Unavailable(TandemError):
    status = 503
    code = "service_unavailable"
    retriable = True


class WorkerLost(Unavailable):
    code = "worker_lost"


class Moved(Unavailable):
    code = "moved"


class Leaving(Unavailable):
    code = "leaving"


class DeadlineExceeded(Unavailable):
    status = 504
    code = "deadline_exceeded"


class StoreError(TandemError):
    status = 503
    code = "store_error"
    retriable = True


class NoSpace(StoreError):
    code = "store_no_space"


class Expired(StoreError):
    code = "store_expired"


class EpochMismatch(StoreError):
    code = "store_epoch_mismatch"


class LayoutMismatch(StoreError):
    code = "store_layout_mismatch"
    retriable = False


class Corrupt(StoreError):
    code = "store_corrupt"


class ProtocolError(TandemError):
    code = "protocol_error"


class StartupError(TandemError):
    code = "startup_error"


class ConfigError(StartupError):
    code = "config_error"


class ModelError(StartupError):
    code = "model_error"


def subclasses(base: type[TandemError]) -> dict[str, type[TandemError]]:
    """code -> class, for the whole tree under `base`; how an error crosses the wire and keeps its class."""
    found = {base.code: base}
    for child in base.__subclasses__():
        found.update(subclasses(child))
    return found
