"""Operators' routes against real block stores: what they see, pin, drop and verify, and who may ask."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvstore.hashing import tenant_tag
from tests.router.fakes import MODEL_KEY, SECRET
from tests.router.harness import Api
from tests.router.store_site import LAYOUT, PROMPT, Site, site


@pytest.fixture
def kv(model_directory: Path, tmp_path: Path) -> Iterator[Site]:
    with site(model_directory, tmp_path / "disk") as made:
        yield made


def by_store(answer: dict[str, Any], what: str) -> dict[str, int]:
    return {store["store"]: store[what] for store in answer["stores"]}


# ------------------------------------------------------------------------------------------------------------- looking
def test_the_overview_adds_up_the_stores(kv: Site) -> None:
    kv.write(0)
    kv.write(1)
    kv.write(1, PROMPT[1:])
    answer = kv.get("/kv")
    memory, disk = answer["tiers"]["memory"], answer["tiers"]["disk"]
    assert (memory["blocks"], memory["bytes"]) == (15, 15 * LAYOUT.block_bytes)
    assert memory["limit_bytes"] == sum(store["slabs"] for store in answer["stores"]) * LAYOUT.block_bytes
    assert disk["bytes"] > 5 * LAYOUT.block_bytes
    assert disk["limit_bytes"] == 2**20
    assert [(store["store"], store["cached"]) for store in answer["stores"]] == [("s0", 5), ("s1", 10)]
    assert answer["tenants"] == [tenant_tag(SECRET, "")]
    assert answer["index"] is None, "there is no Redis here"
    status = kv.get("/status")["stores"]
    assert [store["kv_tiers"]["memory"]["blocks"] for store in status] == [5, 10]
    assert [store["kv_tiers"]["disk"]["blocks"] for store in status] == [5, 0]


def test_listing_by_prefix_of_the_hash(kv: Site) -> None:
    hashes = kv.write(0)
    kv.write(1)
    listed = kv.get("/kv/blocks")
    assert [(block["hash"], block["store"]) for block in listed["blocks"]] == sorted(
        (name, store) for name in hashes for store in ("s0", "s1")
    )
    assert by_store(listed, "blocks") == {"s0": 5, "s1": 5}
    first = next(block for block in listed["blocks"] if block["hash"] == hashes[1])
    assert (first["parent"], first["tokens"], first["tier"], first["pinned"]) == (hashes[0], 16, "memory", False)
    assert first["tenant"] == tenant_tag(SECRET, "")
    assert {block["hash"] for block in kv.get("/kv/blocks", prefix=hashes[2][:10])["blocks"]} == {hashes[2]}
    assert len(kv.get("/kv/blocks", limit=3)["blocks"]) == 3


# ------------------------------------------------------------------------------------------------------- pin and drop
def test_pin_and_unpin_a_prompt(kv: Site) -> None:
    hashes = kv.write(0)
    answer = kv.post("/kv/pin", prompt=PROMPT)
    assert answer["asked"] == 5
    assert by_store(answer, "pinned")["s0"] == 5
    assert all(block["pinned"] for block in kv.get("/kv/blocks")["blocks"])
    assert kv.get("/kv")["tiers"]["memory"]["pinned_blocks"] == 5
    assert kv.post("/kv/unpin", hashes=hashes[:2])["asked"] == 2
    assert {b["hash"] for b in kv.get("/kv/blocks")["blocks"] if b["pinned"]} == set(hashes[2:])


def test_what_is_named_is_what_requests_have(kv: Site) -> None:
    """The hashes of a chat's and a text's blocks, computed here from what a worker was really sent."""
    system, text = "the quick brown fox " * 8, "hello world, hello there " * 9
    kv.api.chat(messages=[{"role": "system", "content": system}, {"role": "user", "content": "hi"}], max_tokens=1)
    kv.api.complete(prompt=text, max_tokens=1)
    chat, plain = [list(generation.prompt) for generation in kv.api.workers["b1"].generations]
    kv.write(0, chat)
    asked = kv.post("/kv/pin", messages=[{"role": "system", "content": system}])
    assert by_store(asked, "pinned")["s0"] == asked["asked"] >= 2
    hashes = kv.write(1, plain)
    assert by_store(kv.post("/kv/drop", prompt=text), "dropped") == {"s0": 0, "s1": len(hashes)}


def test_with_int8_a_prompt_stands_for_its_approximate_blocks_too(model_directory: Path) -> None:
    with site(model_directory, None, kv_quantization="int8") as kv:
        kv.write(0)
        kv.write(1, model_key=MODEL_KEY.approximate)
        assert by_store(kv.post("/kv/drop", prompt=PROMPT), "dropped") == {"s0": 5, "s1": 5}


def test_where_all_kv_is_in_8_bits_a_prompt_stands_for_one_kind(model_directory: Path) -> None:
    with site(model_directory, None, kv_quantization="int8-cache", runner="cuda") as kv:
        kv.write(0)
        assert kv.post("/kv/pin", prompt=PROMPT)["asked"] == 5


def test_a_cache_salt_is_part_of_the_name(kv: Site) -> None:
    kv.write(0, cache_salt="mine")
    assert by_store(kv.post("/kv/drop", prompt=PROMPT), "dropped") == {"s0": 0, "s1": 0}
    assert by_store(kv.post("/kv/drop", prompt=PROMPT, cache_salt="mine"), "dropped") == {"s0": 5, "s1": 0}


def test_drop_takes_it_from_every_tier(kv: Site) -> None:
    hashes = kv.write(0)
    assert by_store(kv.post("/kv/drop", hashes=hashes[3:]), "dropped") == {"s0": 2, "s1": 0}
    stat = kv.stat(0)
    assert (stat.cached, stat.disk_blocks) == (3, 3)


def test_drop_all_walks_every_page(kv: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.kv.PAGE", 3)
    kv.write(0)
    kv.write(1)
    kv.write(1, PROMPT[1:])
    assert by_store(kv.post("/kv/drop", all=True), "dropped") == {"s0": 5, "s1": 10}
    assert kv.get("/kv/blocks")["blocks"] == []
    assert by_store(kv.post("/kv/drop", all=True), "dropped") == {"s0": 0, "s1": 0}


# -------------------------------------------------------------------------------------------------------------- verify
def test_verify_finds_what_is_corrupt_in_memory_and_on_disk(
    kv: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.kv.PAGE", 2)
    kv.write(0)
    kv.write(1)
    assert kv.post("/kv/verify")["stores"] == [
        {"store": "s0", "checked": 5, "corrupt": 0},
        {"store": "s1", "checked": 5, "corrupt": 0},
    ]
    file = max((tmp_path / "disk").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    with file.open("r+b") as block:
        block.seek(-1, os.SEEK_END)
        last = block.read(1)
        block.seek(-1, os.SEEK_END)
        block.write(bytes([last[0] ^ 1]))
    answer = kv.post("/kv/verify")
    assert by_store(answer, "corrupt") == {"s0": 1, "s1": 0}
    assert by_store(kv.post("/kv/verify"), "corrupt") == {"s0": 0, "s1": 0}, "it has been dropped"
    page = kv.api.http.get("/metrics").text
    assert 'tandem_store_corrupt_blocks_total{store="s0"} 1.0' in page


# ------------------------------------------------------------------------------------------------------ a store is gone
def test_a_store_that_is_gone_is_an_error_in_its_place(kv: Site) -> None:
    hashes = kv.write(0)
    kv.api.run(kv.servers.pop().stop())
    for answer in (
        kv.post("/kv/pin", hashes=hashes),
        kv.get("/kv/blocks"),
        kv.post("/kv/verify"),
        kv.post("/kv/drop", all=True),
    ):
        good, gone = answer["stores"]
        assert "error" not in good
        assert gone["store"] == "s1"
        assert set(gone) == {"store", "error"}
    assert [store["answers"] for store in kv.get("/kv")["stores"]] == [True, False]


# ------------------------------------------------------------------------------------------------- what is not accepted
@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("pin", {}, "exactly one of these ways: prompt, messages, hashes"),
        ("pin", {"prompt": "x", "hashes": ["00" * 32]}, "exactly one"),
        ("pin", {"all": True}, "all"),
        ("drop", {"all": False}, "exactly one of these ways: prompt, messages, hashes, all"),
        ("drop", {"all": True, "prompt": "x"}, "exactly one"),
        ("pin", {"prompt": "hi"}, "less than one block of 16"),
        ("pin", {"prompt": []}, "less than one block of 16"),
        ("pin", {"prompt": [1] * 15 + [99999]}, "outside the vocabulary"),
        ("pin", {"prompt": [-1] * 16}, "outside the vocabulary"),
        ("pin", {"hashes": ["abc"]}, "hexadecimal"),
        ("pin", {"hashes": ["ab"]}, "64 hexadecimal digits"),
        ("pin", {"hashes": []}, "hashes"),
        ("pin", {"messages": []}, "messages"),
        ("pin", {"prompt": [1] * 16, "tenant": "nobody"}, "GET /kv lists them"),
        ("unpin", {"prompts": "x"}, "prompts"),
    ],
)
def test_a_wrong_body_says_what_is_wrong(api: Api, path: str, body: dict[str, Any], complaint: str) -> None:
    response = api.post(f"/kv/{path}", **body)
    assert response.status_code == 400
    assert complaint in response.json()["error"]["message"]


@pytest.mark.parametrize("query", ["prefix=zz", "prefix=abc", "limit=0", "limit=x", "limit=999999"])
def test_a_wrong_query_is_a_400(api: Api, query: str) -> None:
    assert api.http.get(f"/kv/blocks?{query}").status_code == 400


def test_without_stores_there_is_nothing_to_tell(api: Api) -> None:
    assert api.post("/kv/verify").json() == {"stores": []}
    assert api.post("/kv/drop", all=True).json() == {"stores": []}
    assert api.http.get("/kv").json()["tiers"]["memory"]["blocks"] == 0


# ------------------------------------------------------------------------------------------------------------- who may
ROUTES = [("GET", "/kv"), ("GET", "/kv/blocks"), *[("POST", f"/kv/{verb}") for verb in ("pin", "unpin", "drop")]]


def statuses(api: Api, key: str | None) -> set[int]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    bodies = {"json": {"hashes": ["00" * 32]}}

    def send(method: str, path: str) -> httpx.Response:
        return api.http.request(method, path, headers=headers, **(bodies if method == "POST" else {}))

    return {send(*route).status_code for route in [*ROUTES, ("POST", "/kv/verify")]}


def test_only_the_operator_key_opens_them(model_directory: Path) -> None:
    with Api(model_directory).serving("", api_keys=("tenant-key",), operator_key="operator-key") as api:
        for key in (None, "tenant-key", "wrong", "operator-kez", "operator-key2"):
            assert statuses(api, key) == {401}
        assert statuses(api, "operator-key") == {200}
        refused = api.http.get("/v1/models", headers={"authorization": "Bearer operator-key"})
        assert refused.status_code == 401, "and it is no tenant's"


def test_tenants_without_an_operator_key_close_them_and_say_how_to_open(model_directory: Path) -> None:
    with Api(model_directory).serving("", api_keys=("tenant-key",)) as api:
        assert statuses(api, "tenant-key") == statuses(api, None) == statuses(api, "") == {403}
        assert "TANDEM_OPERATOR_KEY" in api.http.get("/kv").json()["error"]["message"]


def test_an_operator_key_alone_is_asked_for_too(model_directory: Path) -> None:
    with Api(model_directory).serving("", operator_key="operator-key") as api:
        assert statuses(api, None) == {401}
        assert statuses(api, "operator-key") == {200}


def test_a_prompt_means_every_tenants_unless_one_is_named(model_directory: Path) -> None:
    keys = ("first", "second")
    with site(model_directory, None, api_keys=keys, operator_key="op") as kv:
        kv.api.http.headers["authorization"] = "Bearer op"
        for key in keys:
            kv.write(0, key=key)
        first = tenant_tag(SECRET, hashlib.sha256(b"first").hexdigest())
        assert first in kv.get("/kv")["tenants"]
        assert by_store(kv.post("/kv/pin", prompt=PROMPT, tenant=first), "pinned")["s0"] == 5
        assert {block["tenant"] for block in kv.get("/kv/blocks")["blocks"] if block["pinned"]} == {first}
        assert by_store(kv.post("/kv/drop", prompt=PROMPT), "dropped")["s0"] == 10
