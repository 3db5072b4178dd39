"""No secret in logs: what is printed of the objects that carry one does not show it."""

from cluster.config import Config
from cluster.identity import Identity
from cluster.redis import redacted
from router.settings import RouterSettings

URL = "redis://user:hunter2@127.0.0.1:7000/0"


def test_nothing_that_holds_a_secret_prints_it() -> None:
    settings = RouterSettings("directory", "name", "namespace", "hunter2", URL, 1, 1, (1,))
    shown = f"{settings} {Identity('namespace', URL, 'hunter2', 'host')} {Config(api_keys=('hunter2',), redis_url=URL)}"
    assert "namespace" in shown
    assert "hunter2" not in shown + redacted(URL)
