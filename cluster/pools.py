"""What planning speaks of: members of the pools, the demand on them, what is asked for, what can be done, what is kept.

Values only. `cluster/plan.py` turns them into actions, `cluster/demand.py` makes the demand, and whoever acts (the
controller, the simulator) brings the members. Times are seconds of the caller's own monotonic clock, real or virtual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.messages import Rates, Role

State = Literal["starting", "serving", "draining"]


@dataclass(frozen=True, slots=True)
class Member:
    """One worker as its last frame described it. One that died and is being started again is "starting"."""

    id: str
    role: Role
    state: State
    shards: int
    rates: Rates | None = None  # None: it has not said yet
    running: int = 0  # sequences it has accepted and not finished, those that wait inside it included
    waiting_tokens: int = 0  # uncomputed prompt tokens
    context_tokens: int = 0  # tokens whose KV its sequences have
    since_s: float = 0.0  # when it came into this state and role
    kv_tokens: int = 0  # tokens its KV cache has room for; 0: not known


@dataclass(frozen=True, slots=True)
class Demand:
    """What clients ask for lately (`DemandMeter`), and what waits in the routers now."""

    requests_s: float = 0.0
    uncached_tokens_s: float = 0.0  # prompt tokens that no worker had
    output_tokens_s: float = 0.0  # delivered
    waiting: int = 0  # requests held back in routers
    waiting_tokens: int = 0  # uncached prompt tokens of those
    ttft_ms: float = 0.0  # mean lately; 0: none began
    itl_ms: float = 0.0
    prompt_tokens_s: float = 0.0  # cached ones included; 0: not known, taken as uncached
    requests: float = 0.0  # that the rates were counted over: what their noise is judged by


@dataclass(frozen=True, slots=True)
class Spec:
    """What the operator asked for. `least`..`most` are shards (GPUs) of all workers together."""

    policy: str  # as the setting `autoscaling` has it
    least: int
    most: int
    shards: Mapping[Role, int]  # role -> shards of a worker that is started in it
    ttft_slo_ms: float
    itl_slo_ms: float
    disaggregated: bool
    max_sequences: int = 64  # that an engine runs at once


@dataclass(frozen=True, slots=True)
class Now:
    """The time, for those who are told it: of the caller's monotonic clock, and of the day."""

    monotonic_s: float
    utc_s: float = 0.0  # since midnight UTC


@dataclass(frozen=True, slots=True)
class Start:
    """One more worker."""

    role: Role


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """A message: takes effect at once, what the worker has is finished."""

    id: str
    role: Role


@dataclass(frozen=True, slots=True)
class Drain:
    """Gets nothing new from now on. There is no way back: it ends in Stop, and who is missed then is started."""

    id: str


@dataclass(frozen=True, slots=True)
class Migrate:
    """Gives its decoding sequences to others; nothing happens when it has none."""

    id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the process of a drained worker, which has nothing left."""

    id: str


Action = Start | ChangeRole | Drain | Migrate | Stop


@dataclass(frozen=True, slots=True)
class Wish:
    """Something that has been worth doing since then; done once it has been so for long enough."""

    what: str
    since_s: float
    seen_s: float = 0.0  # when it last was so, where a moment in between in which it is not does not count


@dataclass(frozen=True, slots=True)
class Memory:
    """What the plan has to remember from one call to the next; a controller that lost it starts with `Memory()`."""

    ratio: Wish | None = None
    size: Wish | None = None
    cover: Wish | None = None
    moved_s: float | None = None  # when roles were last changed to move the ratio
    moved_to: str = ""  # the role that workers were changed to then
    began_s: float | None = None  # since when there has been something to do without a break; None: there is nothing
    busy_s: float | None = None  # when there was last something to do
    decoding: tuple[tuple[float, int], ...] = ()  # (time, sequences on decode workers) of the last seconds
    decoders: frozenset[str] = frozenset()  # the workers that those were counted on
    left_decoding: Mapping[str, float] = field(default_factory=dict)  # worker -> when it got prompts instead
    migrated: Mapping[str, float] = field(default_factory=dict)  # draining worker -> when it was last told to
    fault: str = ""  # what is wrong with the policy, as it was said
    notes: tuple[str, ...] = ()  # what the last call decided, in words


Decision = tuple[tuple[Action, ...], Memory]
