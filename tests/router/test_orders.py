"""The routes by which operators order things, with a real Redis: what they write, who may, and what they refuse."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.messages import ControllerInfo
from kvstore.redis_server import EmbeddedRedis
from tests.router.fakes import NAMESPACE
from tests.router.harness import Api

CONTROLLER = ControllerInfo("controller", NAMESPACE, 5, 0, 0, 0, 0, 0, 0, 0.0, ())
NOTHING = {"drain": [], "roles": {}, "split": None, "scale": None, "restart": None, "log": None}
KEY = {"x-tandem-operator-key": "operator-key"}


@pytest.fixture(scope="module")
def served(model_directory: Path) -> Iterator[Api]:
    """A prefill and a decode worker, and room for two more."""
    redis = EmbeddedRedis()
    one = Api(model_directory)
    one.settings = dataclasses.replace(one.settings, redis_url=redis.url)
    one.membership.controllers = [CONTROLLER]
    try:
        with one.serving("pd", api_keys=("tenant-key",), operator_key="operator-key", scale="1..4") as api:
            yield api
    finally:
        redis.close()


@pytest.fixture
def fresh(served: Api) -> Iterator[Api]:
    yield served
    order(served, "roles", auto=True)
    order(served, "scale", auto=True)
    order(served, "restart", cancel=True)


def order(api: Api, what: str, **body: Any) -> dict[str, Any]:
    response = api.http.post(f"/orders/{what}", json=body, headers=KEY)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer == api.http.get("/orders", headers=KEY).json()
    return answer


def refusal(api: Api, what: str, **body: Any) -> str:
    response = api.http.post(f"/orders/{what}", json=body, headers=KEY)
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_what_is_ordered_is_told_until_it_is_withdrawn(fresh: Api) -> None:
    assert fresh.http.get("/orders", headers=KEY).json() == NOTHING
    assert order(fresh, "scale", least=2, most=4)["scale"] == {"least": 2, "most": 4}
    assert order(fresh, "roles", prefill=1, decode=1)["split"] == {"prefill": 1, "decode": 1}
    assert order(fresh, "restart")["restart"] == {"workers": ["d1", "p1"], "shards": 2}
    assert order(fresh, "log", level="debug")["log"] == "debug"
    assert order(fresh, "scale", auto=True)["scale"] is None
    assert order(fresh, "roles", auto=True)["split"] is None
    assert order(fresh, "restart", cancel=True) == NOTHING | {"log": "debug"}
    order(fresh, "log", level="info")


def test_a_split_and_roles_of_workers_replace_each_other(fresh: Api) -> None:
    order(fresh, "roles", prefill=1, decode=1)
    kept = order(fresh, "roles", workers={"p1": "prefill", "d1": "decode"})
    assert (kept["split"], kept["roles"]) == (None, {"p1": "prefill", "d1": "decode"})
    split = order(fresh, "roles", prefill=1, decode=1)
    assert (split["split"], split["roles"]) == ({"prefill": 1, "decode": 1}, {})


def test_nonsense_is_refused_and_nothing_is_ordered(fresh: Api) -> None:
    assert "no worker 'x'" in refusal(fresh, "drain", worker="x")
    assert "there are 2 workers" in refusal(fresh, "roles", prefill=3, decode=3)
    assert "left for prefill" in refusal(fresh, "roles", workers={"p1": "decode"})
    assert "more than this deployment may have, 4" in refusal(fresh, "scale", least=1, most=5)
    assert "give least and most" in refusal(fresh, "scale", least=1)
    assert "give prefill and decode" in refusal(fresh, "roles")
    assert "level" in refusal(fresh, "log", level="loud")
    assert "least" in refusal(fresh, "scale", least="2", most=3)
    assert "workrs" in refusal(fresh, "restart", workrs=["p1"])
    order(fresh, "restart")
    assert "a restart is under way" in refusal(fresh, "restart")
    order(fresh, "restart", cancel=True)
    assert fresh.http.get("/orders", headers=KEY).json()["drain"] == []


def test_only_operators_may(fresh: Api) -> None:
    for headers in ({}, {"x-tandem-operator-key": "wrong"}, {"authorization": "Bearer tenant-key"}):
        response = fresh.http.post("/orders/drain", json={"worker": "p1"}, headers=headers)
        assert response.status_code == 401
        assert "x-tandem-operator-key" in response.json()["error"]["message"]
        assert fresh.http.get("/orders", headers=headers).status_code == 401


def test_without_a_controller_nothing_is_ordered(fresh: Api) -> None:
    fresh.membership.controllers = []
    try:
        response = fresh.http.post("/orders/drain", json={"worker": "p1"}, headers=KEY)
        assert response.status_code == 503
        assert "no controller answers" in response.json()["error"]["message"]
    finally:
        fresh.membership.controllers = [CONTROLLER]


def test_tenants_without_an_operator_key_and_no_redis(model_directory: Path) -> None:
    with Api(model_directory).serving("b", api_keys=("tenant-key",)) as closed:
        assert closed.http.get("/orders").status_code == 403
    with Api(model_directory).serving("b") as alone:
        alone.membership.controllers = [CONTROLLER]
        assert alone.http.get("/orders").status_code == 503
