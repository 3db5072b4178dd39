"""Links between real processes: what arrives, and what a peer that dies or hangs does to the others."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cluster.errors import WorkerLost
from cluster.messages import Sampling
from tests.workers.shard_processes import ShardProcesses, State, join, leave, run, worker
from tests.workers.tiny_models import build, prompts, sequence
from workers.process_links import ProcessLinks, Rendezvous
from workers.runner import Chunk
from workers.shard import Shard, Sizes, shards

SIZES = Sizes(heads=4, kv_heads=4, layers=4, intermediate=4, vocabulary=4)
STALL_S = 2.0


def linked(processes: ShardProcesses, tp: int, pp: int, timeout: float = 20.0) -> Rendezvous:
    rendezvous = Rendezvous("127.0.0.1")
    processes.all(join, [(rendezvous.address, shard, timeout) for shard in shards(SIZES, tp, pp)])
    return rendezvous


# ------------------------------------------------------------------------------------------------------ tasks
def links(state: State) -> ProcessLinks:
    assert state.links is not None
    return state.links


def noise(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(33, 577, generator=torch.Generator().manual_seed(rank)).to(dtype)


def add_up(state: State, rank: int, dtype: torch.dtype) -> bytes:
    x = noise(rank, dtype)
    links(state).sum_inplace(x)
    return x.float().numpy().tobytes()  # a tensor would travel through shared memory


def add_up_words(state: State, rank: int) -> list[int]:
    x = torch.tensor([rank, 2**62, -rank])
    links(state).sum_inplace(x)
    return x.tolist()


def gather(state: State, rank: int) -> list[float]:
    found: list[float] = links(state).gather(torch.tensor([1.5 * rank], dtype=torch.float64)).flatten().tolist()
    return found


def pass_on(state: State, shard: Shard, count: int) -> list[list[float]]:
    """Each stage adds its rank to what comes and sends it on; the first begins with 0, 1, 2... The sizes differ."""
    seen = []
    for step in range(count):
        shape = (1 + step % 3, 5)
        if shard.first_stage:
            x = torch.full(shape, float(step), dtype=torch.bfloat16)
        else:
            x = links(state).receive(shape, torch.bfloat16)
        seen.append([x.shape[0], float(x.unique())])  # one value, or this raises
        if not shard.last_stage:
            links(state).send(x + shard.rank)
    return seen


def listening(state: State) -> list[str]:
    return [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]


# ------------------------------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_a_sum_has_the_same_bits_everywhere(processes: ShardProcesses, tp: int, dtype: torch.dtype) -> None:
    rendezvous = linked(processes, tp, 1)
    first, *others = processes.all(add_up, [(rank, dtype) for rank in range(tp)])
    assert all(other == first for other in others)
    found = torch.frombuffer(bytearray(first), dtype=torch.float32).view(33, 577)
    exact = torch.stack([noise(rank, dtype).double() for rank in range(tp)]).sum(0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=0.05 if dtype is torch.bfloat16 else 1e-5)
    processes.all(leave, [()] * tp)
    rendezvous.close()


def test_sums_and_gathers_stay_in_their_stage(processes: ShardProcesses) -> None:
    rendezvous = linked(processes, 2, 2)
    assert (
        processes.all(add_up_words, [(1,), (2,), (10,), (20,)]) == [[3, -(2**63), -3]] * 2 + [[30, -(2**63), -30]] * 2
    )
    assert processes.all(gather, [(1,), (2,), (10,), (20,)]) == [[1.5, 3.0]] * 2 + [[15.0, 30.0]] * 2
    processes.all(leave, [()] * 4)
    rendezvous.close()


@pytest.mark.parametrize(("tp", "pp"), [(1, 4), (2, 2)])
def test_activations_arrive_in_the_order_they_were_sent_in(processes: ShardProcesses, tp: int, pp: int) -> None:
    rendezvous = linked(processes, tp, pp)
    parts = shards(SIZES, tp, pp)
    for shard, seen in zip(parts, processes.all(pass_on, [(shard, 40) for shard in parts]), strict=True):
        added = sum(range(shard.tensor_rank, shard.rank, tp))
        assert seen == [[1 + step % 3, step + added] for step in range(40)]
    processes.all(leave, [()] * 4)
    rendezvous.close()


def test_nothing_listens_beyond_the_address_given(processes: ShardProcesses) -> None:
    rendezvous = linked(processes, 2, 2)
    found = processes.all(listening, [()] * 4)
    assert all(addresses and set(addresses) == {"127.0.0.1"} for addresses in found)
    ours = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert ("127.0.0.1", int(rendezvous.address.rpartition(":")[2])) in [tuple(each) for each in ours]
    assert {each.ip for each in ours} == {"127.0.0.1"}
    processes.all(leave, [()] * 4)
    rendezvous.close()


def test_who_waits_for_a_shard_that_never_joins_gives_up(processes: ShardProcesses) -> None:
    rendezvous = Rendezvous("127.0.0.1")
    processes.tell(0, join, rendezvous.address, shards(SIZES, 2, 1)[0], STALL_S)
    assert isinstance(processes.answer(0), WorkerLost)
    rendezvous.close()


@pytest.mark.parametrize(("tp", "pp", "victim"), [(3, 1, 1), (1, 3, 0)])
def test_a_step_without_a_stopped_shard_fails_in_time(
    processes: ShardProcesses, tp: int, pp: int, victim: int, tmp_path: Path
) -> None:
    def stop() -> None:
        os.kill(pid(processes, victim), signal.SIGSTOP)

    try:
        fail_a_step(processes, tp, pp, victim, stop, STALL_S, tmp_path)
    finally:
        os.kill(pid(processes, victim), signal.SIGCONT)


def test_a_step_fails_at_once_when_a_shard_is_killed_in_it(processes: ShardProcesses, tmp_path: Path) -> None:
    """Only the death of the peer can end the step: the links' own limit is longer than the test's."""
    victim = 3

    def kill() -> None:
        os.kill(pid(processes, victim), signal.SIGKILL)

    fail_a_step(processes, 2, 2, victim, kill, 300.0, tmp_path)
    processes.restart(victim)


def pid(processes: ShardProcesses, index: int) -> int:
    found = processes.processes[index].pid
    assert found is not None
    return found


def fail_a_step(
    processes: ShardProcesses,
    tp: int,
    pp: int,
    victim: int,
    strike: Callable[[], None],
    timeout: float,
    directory: Path,
) -> None:
    """All others begin a step. Those who wait for the victim, or for somebody who does, must find out; the stages
    before it have nothing to wait for."""
    build("llama", directory)
    (prompt,) = prompts([9])
    chunk = Chunk(sequence("a", prompt, [0, 1, 2], Sampling(temperature=0.0)), 0, 9)
    parts = shards(SIZES, tp, pp)
    with worker(processes, directory, tp, pp, timeout=timeout):
        others = [shard for shard in parts if shard.rank != victim]
        for shard in others:
            processes.tell(shard.rank, run, [chunk])
        strike()
        for shard in others:
            answer = processes.answer(shard.rank)
            if shard.stage >= parts[victim].stage:
                assert isinstance(answer, WorkerLost), shard.rank
                assert "has to start again" in str(answer)
