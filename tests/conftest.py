"""Models that many tests serve, made once per session."""

from __future__ import annotations

import os

# before torch is imported: two workers with two threads each on two cores wait for each other at every barrier
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from deploy.models import resolve


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the demo model, converted from its GGUF file (downloaded when it is not there)."""
    return resolve("", lambda fraction: None).directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a tokenizer and a chat template (see tests/models.py)."""
    from tests.models import tiny_model  # imports torch and transformers: seconds that most tests can do without

    return tiny_model(tmp_path_factory.mktemp("tiny"))
