"""The words that routers and workers say to each other, and what members say of themselves.

Frozen dataclasses without tensors or behaviour; `cluster/codec.py` puts them on the wire. Durations are remaining
milliseconds, re-based by the receiver on its own monotonic clock; no wall clock crosses a process.

    router -> worker   Submit(PrefillJob | DecodeJob) -> Accepted | Refused;  Abort;  Outputs -> stream of StepOutput
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    tenant: str = ""  # opaque tag of the tenant: the unit of quotas in the stores
    exact: bool = True  # False: KV that is only close to the right one will do, where the deployment keeps such


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
class Drain:
    """Leave the membership and take in nothing that was not on its way; what is there is finished."""


@dataclass(frozen=True, slots=True)
class Migrate:
    """Give every sequence that is decoding up as Moved: its router places it again, on what it has in the stores."""


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
    fetched_memory_tokens_total: int = 0  # prompt tokens whose KV came from a store's memory on this machine
    fetched_disk_tokens_total: int = 0  # ... from its disk
    fetched_remote_tokens_total: int = 0  # ... from a store on another machine
    fetched_bytes_total: int = 0
    fetch_seconds_total: float = 0.0
    fetch_failures_total: int = 0  # fetches that brought less than was asked for
    recomputed_tokens_total: int = 0  # tokens a store had, computed because that was predicted to be faster
    offloaded_blocks_total: int = 0  # blocks written to the store outside handoffs
    offload_failures_total: int = 0  # blocks that the store had no room for, or could not take
    context_tokens: int = 0  # tokens whose KV the running sequences have in their blocks
    device_tokens_total: int = 0  # prompt tokens whose KV was in this worker's own cache, of jobs without a handoff
    handoffs_total: int = 0  # handoffs followed to their end, whole or not
    fetches_total: int = 0  # times that fetching was predicted to be faster than computing ...
    recomputes_total: int = 0  # ... and that computing was, of runs of blocks that a store had
    model_seconds_total: float = 0.0  # the engine's thread waited for the model
    busy_seconds_total: float = 0.0  # ... and had something to do, that included
    idle_seconds_total: float = 0.0  # ... and had nothing to do


@dataclass(frozen=True, slots=True)
class Rates:
    """What a worker's steps and fetches take, as coefficients in milliseconds; `cluster/perfmodel.py` applies them."""

    prefill: tuple[float, float, float]  # per step, per token, per pair of a token and one it attends to
    decode: tuple[float, float, float]  # per step, per sequence, per token of context
    memory: tuple[float, float]  # per fetch and per byte: from a store on the same machine
    disk: tuple[float, float]  # ... from its disk
    remote: tuple[float, float]  # ... from a store on another machine
    step_tokens: int  # most tokens of a step
    start_s: float = 0.0  # from the process's start to its first registration
    prefill_error: float = 0.0  # mean of |predicted - measured| / measured lately
    decode_error: float = 0.0
    fetch_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a worker's node, as its driver sees it now."""

    id: str  # the driver's UUID: several workers of a node tell of the same ones
    name: str
    utilization: float  # part of the last second in which a kernel ran, 0 to 1
    memory_used: int  # bytes
    memory_total: int
    power_w: float


@dataclass(frozen=True, slots=True)
class CacheChange:
    """What became of the blocks in a worker's KV cache that a prefix hit can use, since the frame before."""

    put: bytes = b""  # hashes of blocks, one after the other
    delete: bytes = b""
    reset: bool = False  # forget everything that was said before; `put` and the next changes say what there is


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One engine step's results for one router; also sent empty once a second as a sign of life."""

    outputs: tuple[TokenOutput | JobFailed, ...]
    load: Load
    rates: Rates | None = None  # with the first frame and then about once a second
    cache: CacheChange | None = None
    gpus: tuple[Gpu, ...] = ()  # with `rates`; empty: the node has none


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
    tp: int = 1  # tensor parallel ranks
    pp: int = 1  # pipeline stages
    shard_pids: tuple[int, ...] = ()  # rank -> process; the first is `pid`
    block_bytes: int = 0  # of a whole block in the stores
    started_s: float = 0.0  # from its process's start to this registration


@dataclass(frozen=True, slots=True)
class StoreInfo:
    id: str
    address: str
    node: str
    pid: int
    namespace: str
    epoch: int


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """What a router says of the requests it has seen. The counters are its own lifetime's."""

    id: str
    namespace: str
    pid: int
    requests_total: int  # that had their turn
    prompt_tokens_total: int  # of those
    uncached_tokens_total: int  # those of them that were computed, counted with the first token
    output_tokens_total: int  # delivered
    waiting: int  # requests held back in it
    waiting_tokens: int  # uncached prompt tokens of those
    ttft_ms: float  # mean of those that began in the last seconds; 0: none
    itl_ms: float


@dataclass(frozen=True, slots=True)
class ControllerInfo:
    """What the controller did, for people: counters and the latest actions in words, newest last."""

    id: str
    namespace: str
    pid: int
    moves_total: int  # times that roles were changed, however many workers at a time
    starts_total: int
    stops_total: int
    migrations_total: int
    starting: int
    draining: int
    last_drain_s: float  # from the order to drain to the end of the process
    events: tuple[str, ...]
