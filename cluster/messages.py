"""The words that processes say to each other, and their codec.

Frozen dataclasses without tensors or behaviour. On the wire a message is a msgpack extension value: the code is the
class's place in `MESSAGES`, the data its fields in order, so messages nest and tuples stay tuples. Durations are
remaining milliseconds, re-based by the receiver on its own monotonic clock; no wall clock crosses a process.

    router -> worker   Submit(PrefillJob | DecodeJob) -> Accepted | Refused;  Abort;  Outputs -> stream of StepOutput
    worker -> store    Hello, Reserve, Seal, Finish, Revoke, Hold, Release, Session
    reader -> store    Follow -> stream of Fragment, then one FollowEnd
    anybody -> store   StatRequest -> StoreStat
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from cluster.errors import ProtocolError

Role = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length"]


# ---------------------------------------------------------------------------------------------- request to worker
@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; a pure function of (logits, this, the tokens so far, position)."""

    max_tokens: int = 16  # new tokens in all, those of earlier attempts included
    min_tokens: int = 0  # no stop token before this many new tokens
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, arXiv:1909.05858)
    frequency_penalty: float = 0.0  # over output only, as OpenAI defines them
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    stop_token_ids: tuple[int, ...] = ()  # the model's end-of-sequence ids are in here too unless ignore_eos
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate, the same for whichever worker does it. `output` holds tokens that earlier attempts produced."""

    id: str  # unique per request, choice and attempt
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: Sampling
    salt: bytes  # HMAC of tenant and cache_salt under the cluster secret: part of every block hash
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class Handoff:
    """Where a prefill's blocks can be followed; travels from prefill worker to router to decode worker untouched."""

    store: str  # host:port of the store that holds them
    epoch: int
    transfer_id: str


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """Compute the KV of prompt + output, emit one token, leave the blocks in the store under a hold."""

    generation: Generation


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Generate to the end. With a handoff, follow its blocks first and compute only what did not arrive."""

    generation: Generation
    handoff: Handoff | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    handoff: Handoff | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A typed no: `code` is an error code of `cluster.errors`."""

    code: str
    message: str
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Abort:
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outputs:
    """Opens the output stream of one router; when it breaks, that router's jobs are aborted."""

    router_id: str


@dataclass(frozen=True, slots=True)
class Submit:
    router_id: str
    job: PrefillJob | DecodeJob


@dataclass(frozen=True, slots=True)
class SetRole:
    role: Role


@dataclass(frozen=True, slots=True)
class Ack:
    pass


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """New tokens of one generation. `start` is the index of the first among all new tokens, so that a repeated or
    re-placed leg can never be delivered twice."""

    id: str
    start: int
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    cached_tokens: int = 0  # prompt tokens this worker did not have to compute


@dataclass(frozen=True, slots=True)
class JobFailed:
    id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's gauges and lifetime counters, sent with every frame."""

    role: Role
    running: int
    waiting: int
    waiting_tokens: int  # uncomputed prompt tokens queued or running
    blocks_free: int  # not referenced by any sequence; cached ones count as free
    blocks_cached: int  # of the free ones, those a prefix hit can still use
    blocks_total: int
    steps_total: int
    prompt_tokens_total: int  # computed, not hit
    cached_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    handoff_bytes_total: int  # KV bytes copied out of the store into this worker's cache
    handoff_seconds_total: float
    handoff_failures_total: int  # handoffs that ended in (partial) recomputation


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One engine step's results for one router; also sent empty once a second as a sign of life."""

    outputs: tuple[TokenOutput | JobFailed, ...]
    load: Load


# ------------------------------------------------------------------------------------------------------ membership
@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker registers in Redis; a new `incarnation` at every start tells a restart from a hiccup."""

    id: str
    address: str
    node: str
    pid: int
    role: Role
    namespace: str  # model fingerprint: router, workers and stores of one model share it
    incarnation: int
    max_context: int
    block_size: int


@dataclass(frozen=True, slots=True)
class StoreInfo:
    id: str
    address: str
    node: str
    pid: int
    namespace: str
    epoch: int


# ----------------------------------------------------------------------------------------------------- block store
@dataclass(frozen=True, slots=True)
class Hello:
    client_id: str
    layout: bytes  # kvstore.layout.Layout.fingerprint
    hash_vectors: bytes  # kvstore.hashing.vectors_digest()


@dataclass(frozen=True, slots=True)
class Welcome:
    epoch: int
    machine: str  # boot id: equal on client and store means shared memory can be mapped
    arena: str  # path of the arena file
    slabs: int


@dataclass(frozen=True, slots=True)
class BlockKey:
    hash: bytes  # 32 bytes; empty for the partial last block, which is never published
    tokens: int


@dataclass(frozen=True, slots=True)
class Reserve:
    """Space for a whole handoff, or nothing."""

    transfer_id: str
    client_id: str
    blocks: tuple[BlockKey, ...]
    hold_ms: int


@dataclass(frozen=True, slots=True)
class Slab:
    index: int
    generation: int
    sealed: bool  # the store holds these bytes already: nothing to copy


@dataclass(frozen=True, slots=True)
class Reserved:
    slabs: tuple[Slab, ...]


@dataclass(frozen=True, slots=True)
class Sealed:
    position: int  # index of the block within the transfer
    checksums: bytes  # u32le CRC-32 per (head, layer) cell, head-major


@dataclass(frozen=True, slots=True)
class Seal:
    transfer_id: str
    blocks: tuple[Sealed, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The writer is done; `first_token` is what it sampled after the last prompt token (None: nothing was)."""

    transfer_id: str
    first_token: int | None


@dataclass(frozen=True, slots=True)
class Revoke:
    transfer_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    transfer_id: str
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Held:
    remaining_ms: int


@dataclass(frozen=True, slots=True)
class Release:
    transfer_id: str


@dataclass(frozen=True, slots=True)
class Session:
    """Lives as long as the writer's process: when it closes, what that writer had not sealed is revoked."""

    client_id: str


@dataclass(frozen=True, slots=True)
class Follow:
    """Blocks `start`.. of a transfer, each as soon as it is sealed; pinned while the stream is open."""

    transfer_id: str
    epoch: int
    start: int
    inline: bool  # True: bytes come in the frames; False: the reader maps the arena


@dataclass(frozen=True, slots=True)
class Fragment:
    position: int
    tokens: int
    slab: Slab
    checksums: bytes
    offset: int  # of `data` within the block's bytes
    data: bytes  # empty when the reader maps the arena
    last: bool  # last frame of this block


@dataclass(frozen=True, slots=True)
class FollowEnd:
    first_token: int | None
    code: str  # empty when the transfer is whole, else an error code of `cluster.errors`
    message: str


@dataclass(frozen=True, slots=True)
class StatRequest:
    pass


@dataclass(frozen=True, slots=True)
class StoreStat:
    """Every slab is in exactly one of the five states, so they add up to `slabs`."""

    slabs: int
    free: int
    reserved: int  # handed to a writer, not sealed
    held: int  # sealed and under a hold or pin
    cached: int  # sealed, evictable
    quarantined: int  # a hung writer may still touch it
    transfers: int
    block_bytes: int
    epoch: int
    sealed_bytes_total: int
    evictions_total: int
    expired_total: int


MESSAGES: tuple[type, ...] = (
    Sampling, Generation, Handoff, PrefillJob, DecodeJob, Accepted, Refused, Abort, Outputs, Submit, SetRole, Ack,
    TokenOutput, JobFailed, Load, StepOutput, WorkerInfo, StoreInfo,
    Hello, Welcome, BlockKey, Reserve, Slab, Reserved, Sealed, Seal, Finish, Revoke, Hold, Held, Release, Session,
    Follow, Fragment, FollowEnd, StatRequest, StoreStat,
)  # fmt: skip
_CODES: dict[type, int] = {cls: code for code, cls in enumerate(MESSAGES)}
_FIELDS: dict[type, tuple[str, ...]] = {cls: tuple(f.name for f in dataclasses.fields(cls)) for cls in MESSAGES}


def _pack(message: Any) -> msgpack.ExtType:
    code = _CODES.get(type(message))
    if code is None:
        raise TypeError(f"{type(message).__name__} is not a message")
    values = tuple(getattr(message, name) for name in _FIELDS[type(message)])
    return msgpack.ExtType(code, msgpack.packb(values, default=_pack))


def _unpack(code: int, data: bytes) -> Any:
    cls = MESSAGES[code]
    return cls(*msgpack.unpackb(data, ext_hook=_unpack, use_list=False, strict_map_key=False))


def encode(message: Any) -> bytes:
    return bytes(msgpack.packb(message, default=_pack))


def decode(data: bytes) -> Any:
    """The message in `data`. Raises ProtocolError for anything `encode` of this version cannot have written."""
    try:
        message = msgpack.unpackb(data, ext_hook=_unpack, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, IndexError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"not a message of this version ({error}); are all nodes on the same Tandem?") from None
    if type(message) not in _CODES:
        raise ProtocolError(f"a bare {type(message).__name__} is not a message")
    return message
