"""What /metrics says of a server that ought to be idle."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from loadtests.quiet import busy, leaks
from tests.loadtests.test_client import server

IDLE = """# TYPE tandem_worker_running gauge
tandem_worker_running{worker="a"} 0
tandem_worker_waiting{worker="a"} 0
tandem_queue_requests{priority="normal"} 0
tandem_worker_kv_blocks_used{worker="a"} 0
tandem_store_slabs{store="s",state="free"} 9
tandem_store_slabs{store="s",state="cached"} 5
tandem_store_slabs{store="s",state="held"} 0
tandem_store_slabs{store="s",state="reserved"} 0
"""


def test_cached_and_free_blocks_are_no_leak() -> None:
    assert busy(IDLE) == []


@pytest.mark.parametrize(
    ("idle", "used", "says"),
    [
        ('running{worker="a"} 0', 'running{worker="a"} 2', "2 sequences run"),
        ('used{worker="a"} 0', 'used{worker="a"} 3', "3 KV blocks are in use"),
        ('state="held"} 0', 'state="held"} 4', "4 slabs are held in stores"),
    ],
)
def test_what_is_in_use_is_said(idle: str, used: str, says: str) -> None:
    assert busy(IDLE.replace(idle, used)) == [says]


def test_a_metric_that_is_gone_hides_no_leak() -> None:
    with pytest.raises(ConfigError, match="tandem_worker_kv_blocks_used"):
        busy(IDLE.replace("kv_blocks_used", "kv_used"))


def page(text: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nconnection: close\r\n\r\n{text}".encode()


def test_only_tandem_is_asked() -> None:
    with server(head=page("vllm:num_requests_running 7\n")) as made:
        assert leaks(made.url, 0) == []
    with server(head=page("", "404 no")) as made:
        assert leaks(made.url, 0) == []
    with server(head=page(IDLE.replace('running{worker="a"} 0', 'running{worker="a"} 2'))) as made:
        assert leaks(made.url, 0) == ["2 sequences run"]
