"""Hashes are pinned: a change of scheme must be a decision, and every input must matter."""

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hashing import HASH_BYTES, ModelKey, block_hash, extend, salt, vectors_digest

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "hash_vectors.json").read_text())
KEY = ModelKey(b"weights", b"tokenizer", "float32", 16, b"lora")


def key_of(vector: dict[str, Any]) -> ModelKey:
    return ModelKey(
        bytes.fromhex(vector["model"]),
        bytes.fromhex(vector["tokenizer"]),
        vector["dtype"],
        vector["block_size"],
        bytes.fromhex(vector["lora"]),
    )


@pytest.mark.parametrize("vector", VECTORS["salts"])
def test_salts_are_pinned(vector: dict[str, Any]) -> None:
    assert salt(vector["secret"], vector["tenant"], vector["cache_salt"]).hex() == vector["salt"]


@pytest.mark.parametrize("vector", VECTORS["chains"])
def test_roots_and_chains_are_pinned(vector: dict[str, Any]) -> None:
    key = key_of(vector)
    root = key.root(bytes.fromhex(vector["salt"]))
    hashes: list[bytes] = []
    extend(hashes, root, vector["tokens"], key.block_size)
    assert root.hex() == vector["root"]
    assert key.namespace == vector["namespace"]
    assert [h.hex() for h in hashes] == vector["blocks"]


@pytest.mark.parametrize("vector", VECTORS["blocks"])
def test_blocks_are_pinned(vector: dict[str, Any]) -> None:
    extras = [(tag, bytes.fromhex(value)) for tag, value in vector["extras"]]
    assert block_hash(bytes.fromhex(vector["parent"]), vector["tokens"], extras).hex() == vector["hash"]


def test_the_digest_is_pinned_and_the_same_in_every_process() -> None:
    code = "from kvstore.hashing import vectors_digest; print(vectors_digest().hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert out.stdout.strip() == vectors_digest().hex() == VECTORS["digest"]


@pytest.mark.parametrize("field", ["model", "tokenizer", "dtype", "block_size", "lora"])
def test_every_field_of_the_root_matters(field: str) -> None:
    other = {"dtype": "bfloat16", "block_size": 32}.get(field, b"other")
    changed = dataclasses.replace(KEY, **{field: other})  # type: ignore[arg-type]
    assert changed.root(b"salt") != KEY.root(b"salt")
    assert changed.namespace != KEY.namespace


def test_the_salt_separates_tenants_but_not_namespaces() -> None:
    salts = [salt("s", "a", "b"), salt("t", "a", "b"), salt("s", "ab", ""), salt("s", "", "ab"), salt("s", "a", "")]
    assert len({KEY.root(s) for s in [*salts, b""]}) == 6


def test_fields_cannot_be_shifted_into_each_other() -> None:
    assert ModelKey(b"ab", b"c", "f", 1).root(b"") != ModelKey(b"a", b"bc", "f", 1).root(b"")
    assert salt("s", "ab", "c") != salt("s", "a", "bc")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.data())
def test_every_token_its_place_and_the_parent_matter(tokens: list[int], data: st.DataObject) -> None:
    parent = bytes(HASH_BYTES)
    reference = block_hash(parent, tokens)
    index = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:index], tokens[index] ^ 1, *tokens[index + 1 :]]
    assert block_hash(parent, changed) != reference
    assert block_hash(parent, tokens[:-1]) != reference
    assert block_hash(parent, [*tokens, 0]) != reference
    assert block_hash(reference, tokens) != reference
    assert block_hash(parent, tokens, [(1, b"")]) != reference
    if tokens != tokens[::-1]:
        assert block_hash(parent, tokens[::-1]) != reference


def test_extras_matter_by_tag_and_value_but_not_by_order() -> None:
    parent, tokens = bytes(32), [1, 2]
    found = {block_hash(parent, tokens, e) for e in ([], [(1, b"a")], [(2, b"a")], [(1, b"b")], [(1, b"a"), (2, b"b")])}
    assert len(found) == 5
    assert block_hash(parent, tokens, [(2, b"b"), (1, b"a")]) in found
    # an extra must not read like more tokens
    assert block_hash(parent, [1], [(1, b"a")]) != block_hash(parent, [1, 1, 1, *struct.unpack("<I", b"a\0\0\0")])


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 9), st.data())
def test_extending_step_by_step_is_a_chain_of_blocks(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    root, chain, parent = b"r" * 32, [], b"r" * 32
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_hash(parent, tokens[start : start + block_size])
        chain.append(parent)
    hashes: list[bytes] = []
    for length in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))):
        extend(hashes, root, tokens[:length], block_size)
        assert hashes == chain[: length // block_size]
    extend(hashes, root, tokens, block_size)
    assert hashes == chain


def test_approximate_kv_has_other_names_and_still_its_own_model_and_tenant() -> None:
    roots = {key.root(salt) for key in (KEY, KEY.approximate) for salt in (b"", b"tenant")}
    roots |= {dataclasses.replace(KEY, dtype="bfloat16").approximate.root(b"")}
    assert len(roots) == 5
    assert KEY.namespace != KEY.approximate.namespace
