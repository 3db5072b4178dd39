"""The deployment that several end-to-end tests share: a real `tandem serve`, started when first asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served, serving


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[Served]:
    """The tests' own tiny model in fp32, 1+1; for tests that break things. A step of it costs next to nothing, so the
    default placement would hand nothing over."""
    with serving(str(tiny), "--dtype", "float32", "--placement", "least_loaded") as served:
        yield served
