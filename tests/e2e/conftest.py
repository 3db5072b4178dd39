"""Deployments shared by the end-to-end tests: each is a real `tandem serve`, started when first asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served, serving


@pytest.fixture(scope="package")
def disaggregated(smollm2: Path) -> Iterator[Served]:
    """SmolLM2 in fp32, one prefill and one decode worker. Every prompt is handed over: by time, those of a few tokens
    would be computed where they are decoded."""
    with serving(str(smollm2), "--dtype", "float32", "--placement", "least_loaded") as served:
        yield served


@pytest.fixture(scope="package")
def aggregated(smollm2: Path) -> Iterator[Served]:
    """SmolLM2 in fp32, one worker that does both."""
    with serving(str(smollm2), "--dtype", "float32", "--prefill", "0") as served:
        yield served


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[Served]:
    """The tests' own tiny model in fp32, 1+1; for tests that break things. A step of it costs next to nothing, so the
    default placement would hand nothing over."""
    with serving(str(tiny), "--dtype", "float32", "--placement", "least_loaded") as served:
        yield served
