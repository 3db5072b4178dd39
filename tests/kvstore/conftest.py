"""A Redis of its own for each test, which may stop, flush or kill it."""

from collections.abc import Iterator

import pytest

from kvstore.redis_server import EmbeddedRedis


@pytest.fixture
def server() -> Iterator[EmbeddedRedis]:
    made = EmbeddedRedis()
    yield made
    made.close()
