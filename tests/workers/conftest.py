"""What tests of several modules share."""

from collections.abc import Iterator

import pytest

from tests.workers.shard_processes import ShardProcesses


@pytest.fixture(scope="session")
def processes() -> Iterator[ShardProcesses]:
    """Four processes for shards; each takes seconds to import torch."""
    made = ShardProcesses(4)
    yield made
    made.close()
