import pytest

from cluster.errors import ConfigError
from loadtests.simulator.load import copies_for, scaled, work
from loadtests.simulator.trace import Trace, TraceRequest
from loadtests.simulator.transform import faster, superpose
from tests.loadtests.runs import requests, settings

TRACE = Trace("made", 64, tuple(requests(200, 10.0, shared=2, groups=3)))


def key(r: TraceRequest) -> tuple[float, int, str]:
    return r.arrival_s, r.prompt_tokens, r.tenant


def test_superposed_lazily_is_superposed() -> None:
    lazily = list(scaled(TRACE, 3, 2.0, seed=5))
    at_once = faster(superpose(TRACE, 3, seed=5), 2.0).requests
    assert [r.arrival_s for r in lazily] == pytest.approx([r.arrival_s for r in at_once])
    assert [(r.blocks, r.prompt_tokens, r.output_tokens) for r in lazily] == [
        (r.blocks, r.prompt_tokens, r.output_tokens) for r in at_once
    ]


def test_work_is_that_of_the_scarcer_pool() -> None:
    asked = work(TRACE, settings())
    assert asked.busy(settings(workers=4, prefill=2)) == pytest.approx(max(asked.prefill, asked.decode) / 2)
    assert asked.busy(settings(workers=4, prefill=0)) == pytest.approx((asked.prefill + asked.decode) / 4)
    split = asked.split(8)
    assert asked.busy(settings(workers=8, prefill=split)) == min(
        asked.busy(settings(workers=8, prefill=prefill)) for prefill in range(1, 8)
    )
    assert asked.split(1) == 0


def test_copies_keep_a_fleet_as_busy_as_was_asked() -> None:
    copies = copies_for(0.6, TRACE, settings())
    assert work(TRACE, settings(), copies).busy(settings()) * copies == pytest.approx(0.6, rel=0.05)
    assert copies_for(0.6, TRACE, settings(workers=8)) > 1.8 * copies


def test_a_request_that_fits_no_worker_is_an_error() -> None:
    with pytest.raises(ConfigError, match="longest request"):
        work(TRACE, settings(kv_tokens=640))
