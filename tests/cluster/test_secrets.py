"""No secret in logs: what is printed of the objects that carry one does not show it."""

import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.identity import Identity
from cluster.redis import Link, redacted
from kvstore.hashing import ModelKey
from router.settings import RouterSettings

KEY = ModelKey(b"", b"", "float32", 16)
URL = "redis://user:hunter2@127.0.0.1:7000/0"


def test_nothing_that_holds_a_secret_prints_it() -> None:
    settings = RouterSettings("directory", "name", "namespace", "hunter2", URL, 1, 1, (1,), KEY)
    config = Config(api_keys=("hunter2",), redis_url=URL, secret="hunter2" * 3, operator_key="hunter2!")
    shown = f"{settings} {Identity('namespace', URL, 'hunter2', 'host')} {config}"
    assert "namespace" in shown
    assert "hunter2" not in shown + redacted(URL)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "redis://127.0.0.1:7000/0"),
        ("rediss://h:1/0?password=hunter2&ssl_ca_certs=f", "rediss://h:1/0"),
        ("redis://:hun/ter2@h:1", "redis://h:1"),
        ("redis://:hun?hunter2@h:1", "redis://..."),
        ("redis://h:1?password=x@hunter2", "redis://..."),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_a_url_in_a_log_says_where_and_not_with_what(url: str, shown: str) -> None:
    assert redacted(url) == shown


@pytest.mark.parametrize("url", ["redis://u:pa/hunter2@h:1", "http://hunter2@h", "redis://:x@h:hunter2", "hunter2"])
def test_a_url_that_is_none_is_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url") as caught:
        Link(url, 1.0)
    assert "hunter2" not in str(caught.value)
