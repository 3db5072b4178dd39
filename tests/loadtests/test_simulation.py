import pytest

from cluster.errors import ConfigError
from loadtests.simulator.results import WALL, SimResult
from loadtests.simulator.simulation import simulate
from loadtests.simulator.trace import TraceRequest
from tests.loadtests.runs import RATES, Watched, requests, settings

ALONE = {"workers": 1}


def figures(result: SimResult) -> dict[str, float]:
    """Those that do not tell of this machine."""
    return {name: value for name, value in result.figures.items() if name not in WALL}


def later(request: TraceRequest, seconds: float) -> TraceRequest:
    return request._replace(arrival_s=request.arrival_s + seconds)


def prefill_ms(*chunks: tuple[int, int]) -> float:
    step, token, pair = RATES.prefill
    return sum(step + token * take + pair * take * (context + take / 2) for take, context in chunks)


def test_one_request_alone_takes_what_the_model_says() -> None:
    request = TraceRequest(1.0, 1000, 10, tuple(range(16)))
    result = simulate([request], settings(**ALONE))
    assert result.figures["ttft_mean_ms"] == pytest.approx(prefill_ms((512, 0), (488, 512)))
    step, sequence, token = RATES.decode
    gaps = [step + sequence + token * context for context in range(1000, 1009)]
    assert result.figures["itl_mean_ms"] == pytest.approx(sum(gaps) / 9)
    assert result.requests["itl_ms"][0] == pytest.approx(sum(gaps) / 9)
    assert result.requests["finish_s"][0] == pytest.approx(1 + (prefill_ms((512, 0), (488, 512)) + sum(gaps)) / 1000)


def test_a_handoff_exposes_its_last_step_only() -> None:
    """1,000 tokens in two steps: what the first computed travels while the second is computed."""
    request = TraceRequest(0.0, 1000, 2, tuple(range(16)))
    result = simulate([request], settings(workers=2, workers_per_node=1))
    call, byte = RATES.remote
    step, sequence, token = RATES.decode
    gap = call + byte * 488 * 1000 + step + sequence + token * 1000
    assert result.figures["itl_mean_ms"] == pytest.approx(gap)


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    first = TraceRequest(0.0, 640, 1, tuple(range(10)))
    second = TraceRequest(5.0, 700, 1, (*range(10), 99))
    result = simulate([first, second], settings(**ALONE))
    assert result.figures["hit_ratio"] == pytest.approx(640 / 1340)
    assert result.requests["ttft_ms"][1] == pytest.approx(prefill_ms((60, 640)))


def test_waiting_is_that_of_an_m_d_1_queue() -> None:
    """Prompts of exactly one step's tokens, one token of output: Pollaczek and Khinchine's mean."""
    service = prefill_ms((512, 0))
    load = 0.7
    trace = [
        TraceRequest(r.arrival_s, 512, 1, tuple(range(8 * i, 8 * i + 8)))
        for i, r in enumerate(requests(6_000, 1000 * load / service, seed=3))
    ]
    result = simulate(trace, settings(**ALONE))
    expected = service + load * service / (2 * (1 - load))
    assert result.figures["ttft_mean_ms"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("changes", [
    {}, {"prefill": 0}, {"prefill": 0, "workers": 1, "kv_tokens": 64 * 60}, {"kv_tokens": 64 * 40},
    {"store_tokens": 10**6},
])  # fmt: skip
def test_leaping_is_the_same_as_stepping(changes: dict[str, int]) -> None:
    """By a policy that does not look at loads: a report in the midst of a leap shows the contexts of its beginning."""
    trace = requests(300, 20.0, seed=5, shared=2, groups=5)
    leaps, steps = (Watched(trace, settings(leap=leap, placement="round_robin", **changes)) for leap in (True, False))
    leaps.check_whole()
    steps.check_whole()
    assert [job.number for job in leaps.finished] == [job.number for job in steps.finished]
    for name, values in steps.recorder.requests.items():
        assert list(leaps.recorder.requests[name]) == pytest.approx(list(values), rel=1e-9, abs=1e-6), name
    assert leaps.recorder.gaps.count == steps.recorder.gaps.count
    assert leaps.recorder.gaps.mean == pytest.approx(steps.recorder.gaps.mean, rel=1e-9)
    assert leaps.events.count < 0.7 * steps.events.count


def test_equal_runs_give_equal_results() -> None:
    trace = requests(300, 30.0, seed=1, shared=1, groups=3)
    runs = [simulate(trace, settings(placement=policy, seed=4)) for policy in ("random", "random", "least_time")]
    assert figures(runs[0]) == figures(runs[1])
    assert runs[0].requests == runs[1].requests
    assert figures(runs[0]) != figures(runs[2])


def test_everything_ends_once_when_blocks_run_out() -> None:
    """Room for three of the longest requests: sequences are preempted and go on."""
    run = Watched(requests(200, 40.0, seed=2), settings(prefill=0, workers=1, kv_tokens=64 * 45))
    run.check_whole()
    assert sum(worker.scheduler.preemptions for worker in run.router.fleet.everybody) > 0


def test_workers_that_die_lose_no_request() -> None:
    trace = requests(300, 30.0, seed=7, shared=2, groups=4)
    dying = settings(failures=((2.0, 0), (4.0, 3), (4.1, 2), (6.0, 1)), start_s=2.0)
    run = Watched(trace, dying)
    run.check_whole()
    assert len(run.finished) == 300
    assert run.recorder.placements > 300  # some had to go elsewhere
    assert [job.produced for job in run.finished] == [job.request.output_tokens for job in run.finished]
    expected = sum(r.output_tokens - 1 for r in trace)
    assert run.recorder.gaps.count == expected  # no token was delivered twice, none was left out


def test_when_all_have_died_requests_wait_for_who_is_started() -> None:
    run = Watched(requests(20, 10.0), settings(workers=2, failures=((0.5, 0), (0.5, 1)), start_s=30.0))
    run.check_whole()
    assert len(run.finished) == 20
    assert run.events.now > 30


def test_a_full_queue_refuses() -> None:
    result = simulate(requests(200, 1000.0), settings(**ALONE, max_queue=10))
    assert result.figures["refused"] > 0
    assert result.figures["refused"] + result.figures["finished"] == 200


def test_what_no_worker_can_hold_is_refused() -> None:
    large = TraceRequest(0.0, 64 * 20, 1, tuple(range(20)))
    result = simulate([large, TraceRequest(1.0, 64, 1, (50,))], settings(**ALONE, kv_tokens=64 * 20))
    assert (result.figures["refused"], result.figures["finished"]) == (1, 1)


def test_stores_keep_what_devices_have_lost() -> None:
    """Twenty prefixes that fit no device are asked for again and again."""
    trace = [TraceRequest(0.3 * i, 64 * 20, 2, tuple(range(100 * (i % 20), 100 * (i % 20) + 20))) for i in range(100)]
    small = {"workers": 2, "kv_tokens": 64 * 60}
    without, with_stores = (simulate(trace, settings(**small, store_tokens=tokens)) for tokens in (0, 64 * 1000))
    assert without.figures["hit_ratio"] < 0.2
    assert with_stores.figures["hit_ratio"] > 0.7
    assert with_stores.figures["fetched_memory_tokens"] > 0
    assert with_stores.figures["ttft_mean_ms"] < without.figures["ttft_mean_ms"]


def test_turns_wait_for_answers() -> None:
    trace = [
        TraceRequest(0.0, 640, 50, tuple(range(10)), session=1, turn=0, output_blocks=()),
        TraceRequest(0.1, 700, 5, (*range(10), 20), session=1, turn=1, think_s=3.0),
    ]
    result = simulate(trace, settings(**ALONE))
    assert result.requests["arrival_s"][1] == pytest.approx(result.requests["finish_s"][0] + 3.0)


def test_the_next_turn_hits_what_the_answer_filled() -> None:
    trace = [
        TraceRequest(0.0, 640, 129, tuple(range(10)), session=1, turn=0, output_blocks=(10, 11)),
        TraceRequest(9.0, 800, 5, (*range(13),), session=1, turn=1),
    ]
    result = simulate(trace, settings(**ALONE))
    assert list(result.requests["cached_tokens"]) == [0, 768]


def test_prompts_that_all_share_their_first_block_do_not_meet_on_one_worker() -> None:
    """The first comes alone, so that only one worker has that block when the others come."""
    trace = [TraceRequest(0.0, 100, 2, (0, 1)), *(later(r, 2.0) for r in requests(600, 60.0, seed=11, shared=1))]
    loads = {
        policy: simulate(trace, settings(workers=8, prefill=4, placement=policy)).figures["load_max_over_mean"]
        for policy in ("least_time", "prefix_affinity")
    }
    assert loads["least_time"] < 1.3
    assert loads["prefix_affinity"] > 1.3


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="nobody decodes"):
        settings(prefill=4)
    with pytest.raises(ConfigError, match="report_s"):
        settings(report_s=0)
    with pytest.raises(ConfigError, match="failure"):
        settings(failures=((1.0, 9),))
