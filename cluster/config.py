"""Every knob, in one frozen class: defaults < TOML file < `TANDEM_*` environment < command line flags.

A key that is not a field is an error that names the nearest field. Values that say "auto" (0 or None) are resolved
once, by `resolved`, into a new Config; nothing is filled in later.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import pydantic
from pydantic import Field

from cluster.errors import ConfigError
from cluster.messages import Role

ENV_PREFIX = "TANDEM_"
SHM = "/dev/shm"
MIB = 2**20
SMALL_SHM = 128 * MIB  # a quarter of it that is less is no store worth having
SECRET_CHARACTERS = 16
# values of `kv_quantization` that are about the workers' caches -> dtype, as torch names it
KV_DTYPES = {"int8-cache": "int8", "e4m3-cache": "float8_e4m3fn"}
LISTS = ("api_keys", "sim_ms")  # separated by commas in the environment
LOG_FORMAT = "log"  # TANDEM_LOG is no setting of a deployment: each process goes by its own (`cluster/logs.py`)
SCALE = re.compile(r"(\d+)\.\.(\d+)")
Placement = Literal["least_time", "round_robin", "random", "least_loaded", "prefix_affinity", "power_of_two"]
log = logging.getLogger(__name__)


class Config(pydantic.BaseModel):
    """One deployment. Sizes are bytes, durations seconds."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    # what is served
    model: str = Field("", description="GGUF file, Hugging Face directory, or hub id; empty: the demo model")
    served_model_name: str = Field("", description="name in the API; empty: derived from `model`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="weights, activations and KV")
    max_context: int = Field(0, ge=0, description="tokens per request, prompt and output; 0: the model's own limit")

    # where it listens
    host: str = Field("127.0.0.1", description="address of the HTTP endpoint and of every internal server")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0: a free one")
    api_keys: tuple[str, ...] = Field((), repr=False, description="accepted bearer keys; empty: no key is asked for")
    operator_key: str = Field("", repr=False, description="key of operators' commands; needed once `api_keys` is set")

    # who serves it
    prefill: int = Field(1, ge=0, le=1024, description="prefill workers; 0: decode workers do both")
    decode: int = Field(1, ge=1, le=1024, description="decode workers")
    prefill_tp: int = Field(1, ge=1, le=64, description="tensor parallel ranks of a prefill worker")
    prefill_pp: int = Field(1, ge=1, le=64, description="pipeline stages of a prefill worker")
    decode_tp: int = Field(1, ge=1, le=64, description="tensor parallel ranks of a decode worker")
    decode_pp: int = Field(1, ge=1, le=64, description="pipeline stages of a decode worker")
    threads: int = Field(0, ge=0, description="CPU threads per shard; 0: cores / most shards")
    runner: Literal["torch", "cuda", "sim"] = Field(
        "torch", description="torch: on CPUs; cuda: a GPU per shard; sim: no weights, tokens from a hash"
    )
    sim_ms: tuple[float, float, float] = Field(
        (0.0, 0.0, 0.0), description="sim runner: milliseconds of a step, per computed token, per token of context"
    )

    # KV blocks
    block_size: int = Field(16, ge=1, le=256, description="tokens per KV block")
    kv_memory: int = Field(
        0, ge=0, description="KV cache per worker; 0: a quarter of the free memory, shared, or what its GPUs have left"
    )
    store_memory: int = Field(
        0, ge=0, description="memory of a node's block stores; 0: a quarter of the free shared memory"
    )
    stores: int = Field(1, ge=1, le=64, description="block stores per node, which share `store_memory`")
    disk: str = Field("", description="folder of the disk tier on every node; empty: there is none")
    disk_memory: int = Field(8 * 1024 * MIB, ge=MIB, description="size of the disk tier of a node")
    kv_quantization: Literal["none", "int8", "int8-cache", "e4m3-cache"] = Field(
        "none", description="int8: what stores keep beyond handoffs; int8-cache, e4m3-cache: all KV, on GPUs"
    )
    tenant_share: float = Field(1.0, gt=0, le=1, description="part of a store that one tenant's cached blocks may fill")
    secret: str = Field("", repr=False, description="shared by the cluster; empty: random, kept beside a disk tier")
    redis_url: str = Field(
        "", repr=False, description="redis://... or rediss://... of the index; empty: start the embedded server"
    )

    # scheduling
    token_budget: int = Field(512, ge=16, description="tokens an engine computes per step")
    max_sequences: int = Field(64, ge=1, description="sequences an engine runs at once")
    max_queue: int = Field(256, ge=1, description="requests that wait for a worker before new ones get 429")
    request_timeout: float = Field(600.0, gt=0, description="longest life of a request")
    worker_timeout: float = Field(10.0, gt=0, description="silence after which a worker counts as lost")
    step_timeout: float = Field(
        60.0, gt=0, description="longest step of a worker's shards before they count as stalled"
    )

    # placement and scaling
    placement: Placement = Field("least_time", description="how workers are chosen; others than the default compare")
    autoscaling: str = Field(
        "slo", description="slo, utilization[:PART], schedule:HH:MM=N,..., fixed, or module:function"
    )
    scale: str = Field("", description="least and most shards (GPUs) as MIN..MAX; empty: as many as are started")
    ttft_slo: float = Field(2.0, gt=0, description="time to first token to keep, in seconds")
    itl_slo: float = Field(0.2, gt=0, description="time between tokens to keep, in seconds")
    trace: str = Field("", description="folder where routers record requests, without texts, for `tandem simulate`")

    @property
    def roles(self) -> tuple[tuple[Role, int], ...]:
        """(role, how many workers start in it)."""
        if self.prefill == 0:
            return (("both", self.decode),)
        return (("prefill", self.prefill), ("decode", self.decode))

    def grid(self, role: Role) -> tuple[int, int]:
        """(tensor parallel ranks, pipeline stages) of a worker that starts in that role."""
        return (self.prefill_tp, self.prefill_pp) if role == "prefill" else (self.decode_tp, self.decode_pp)

    @property
    def kv_dtype(self) -> str:
        """What all KV is kept in, as torch names it, where that is 8 bits; empty: it is in `dtype`."""
        return KV_DTYPES.get(self.kv_quantization, "")

    @property
    def shards(self) -> int:
        """Of all workers together."""
        return sum(count * math.prod(self.grid(role)) for role, count in self.roles)

    @property
    def budget(self) -> tuple[int, int]:
        """(least, most) shards."""
        match = SCALE.fullmatch(self.scale)
        return (int(match[1]), int(match[2])) if match else (self.shards, self.shards)

    @pydantic.field_validator("sim_ms")
    @classmethod
    def _no_negative_time(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) < 0:
            raise ValueError("is negative; give three times in milliseconds")
        return value

    @pydantic.field_validator("secret")
    @classmethod
    def _long_secret(cls, value: str) -> str:
        if 0 < len(value) < SECRET_CHARACTERS:
            raise ValueError(
                f"is shorter than {SECRET_CHARACTERS} characters; take the output of `openssl rand -hex 32`"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _own_operator_key(self) -> Self:
        if self.operator_key and self.operator_key in self.api_keys:
            raise ValueError("operator_key: is one of api_keys too; give operators a key that no tenant has")
        return self

    @pydantic.model_validator(mode="after")
    def _shards_of_somebody(self) -> Self:
        if self.prefill == 0 and (self.prefill_tp, self.prefill_pp) != (1, 1):
            raise ValueError(
                "prefill_tp, prefill_pp: there are no prefill workers (prefill = 0); set decode_tp and decode_pp"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _room_to_scale(self) -> Self:
        match = SCALE.fullmatch(self.scale)
        if self.scale and (match is None or not int(match[1]) <= self.shards <= int(match[2])):
            raise ValueError(f"scale: {self.scale!r} is not MIN..MAX around the {self.shards} shards that are started")
        return self

    @pydantic.model_validator(mode="after")
    def _numbers_to_quantize(self) -> Self:
        if self.kv_quantization != "none" and self.runner == "sim":
            raise ValueError("kv_quantization: the sim runner's KV is token ids, which have no approximation; use none")
        if self.kv_dtype and self.runner != "cuda":
            raise ValueError(
                f"kv_quantization: {self.kv_quantization} is read by kernels for GPUs only; set runner to cuda, or use "
                "int8, which is for stores"
            )
        return self


def load(path: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> Config:
    """The merged configuration. `flags` holds only those the user gave. Raises ConfigError with the source named."""
    merged, origin = _merged(path, environment, flags)
    try:
        return Config(**merged)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # what is wrong between two fields names them itself
            raise ConfigError(f"configuration: {message}") from None
        key = str(first["loc"][0])
        raise ConfigError(f"{origin.get(key, 'configuration')}: {key}: {message}") from None


def origins(path: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> where `load` finds its value; those that have their default are not in it. Raises as `load`."""
    return _merged(path, environment, flags)[1]


def _merged(
    path: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(setting -> value, setting -> its source), of those that are given somewhere."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def add(values: Mapping[str, Any], source: str) -> None:
        for key, value in values.items():
            if key not in Config.model_fields:
                raise ConfigError(f"{source}: unknown key {key!r}{_nearest(key)}")
            merged[key], origin[key] = value, source

    if path is not None:
        add(_read_toml(path), str(path))
    env = {k.removeprefix(ENV_PREFIX).lower(): v for k, v in environment.items() if k.startswith(ENV_PREFIX)}
    env.pop(LOG_FORMAT, None)
    add({k: v.split(",") if k in LISTS else v for k, v in env.items()}, f"environment ({ENV_PREFIX}*)")
    add(flags, "command line")
    return merged, origin


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, Config.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(Config.model_fields)}"


def resolved(config: Config) -> Config:
    """The same configuration with every "auto" replaced by a value for this machine."""
    most = config.budget[1]  # those that may be started later need their part, too
    workers = -(-(config.prefill + config.decode) * most // config.shards)
    on_gpus = config.runner == "cuda"
    # bf16 is only faster where the CPU multiplies it natively; elsewhere torch emulates it
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if on_gpus or _native_bf16() else "float32")
    # a worker on GPUs looks for itself what they have left
    kv_memory = config.kv_memory if on_gpus else psutil.virtual_memory().available // (4 * workers)
    return config.model_copy(
        update={
            "dtype": dtype,
            "threads": config.threads or max(1, (os.cpu_count() or 1) // most),
            "kv_memory": config.kv_memory or kv_memory,
            "store_memory": config.store_memory or _store_memory(Path(SHM), Path(tempfile.gettempdir())),
        }
    )


def _store_memory(shared: Path, temporary: Path) -> int:
    """A quarter of the free shared memory. A container often has next to none: then the arena is a file in the temp
    folder, which the page cache holds as long as there is memory."""
    free = psutil.disk_usage(str(shared)).free if shared.is_dir() else 0
    if free // 4 >= SMALL_SHM:
        return int(free) // 4
    size = min(psutil.disk_usage(str(temporary)).free, psutil.virtual_memory().available) // 4
    log.warning(
        "%s has only %d MiB free: block stores use %d MiB of files in %s, which is slower; give the container more"
        " shared memory (--shm-size)",
        shared, free // MIB, size // MIB, temporary,
    )  # fmt: skip
    return int(size)


def _native_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
