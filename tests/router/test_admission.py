import pytest

from cluster.errors import Overloaded
from router.admission import admit, retry_after_s


def test_admits_below_the_limit() -> None:
    admit(waiting=7, max_queue=8, throughput_per_s=1.0, jitter=0.5)


def test_refuses_at_the_limit_and_says_when_to_come_back() -> None:
    with pytest.raises(Overloaded, match="8 requests are waiting and the limit is 8") as refusal:
        admit(waiting=8, max_queue=8, throughput_per_s=2.0, jitter=0.5)
    assert refusal.value.retry_after_s == pytest.approx(2.0)  # half of the queue at 2 requests a second


@pytest.mark.parametrize("waiting", [1, 256, 10**6])
@pytest.mark.parametrize("throughput", [0.0, 1e-9, 0.3, 1e6])
@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_delay_stays_within_what_clients_obey(waiting: int, throughput: float, jitter: float) -> None:
    assert 1.0 <= retry_after_s(waiting, throughput, jitter) <= 30.0


def test_jitter_spreads_retries() -> None:
    assert retry_after_s(20, 1.0, 0.0) < retry_after_s(20, 1.0, 0.5) < retry_after_s(20, 1.0, 0.99)
