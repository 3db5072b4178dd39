"""The names that placement looks for are those that workers give."""

import asyncio
from dataclasses import replace

import pytest

from kvstore.hashing import extend
from router import chains
from tests.router.fakes import MODEL_KEY


@pytest.mark.parametrize("length", [0, 15, 16, 100, chains.LONG + 5])
@pytest.mark.parametrize("exact", [True, False])
def test_hashes_are_those_of_the_full_blocks(length: int, exact: bool) -> None:
    expected: list[bytes] = []
    key = MODEL_KEY if exact else MODEL_KEY.approximate
    extend(expected, key.root(b"salt"), range(length), 16)
    assert len(expected) == length // 16
    assert asyncio.run(chains.hashes(MODEL_KEY, tuple(range(length)), b"salt", exact)) == tuple(expected)


def test_another_salt_or_model_has_other_names() -> None:
    async def names() -> list[bytes]:
        keys = (MODEL_KEY, replace(MODEL_KEY, model=b"another"))
        return [(await chains.hashes(key, range(16), salt, True))[0] for key in keys for salt in (b"a", b"b")]

    assert len(set(asyncio.run(names()))) == 4
