"""`tandem status` against a router with workers and stores: nothing is cut off, and `--json` is everything."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.messages import ControllerInfo
from deploy.cli import app
from tests.router.fakes import NAMESPACE
from tests.router.store_site import Site, site

EVENT = "12:00:00 " + "a-worker-with-a-long-name turns to prefill; " * 4


@pytest.fixture(scope="module")
def there(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(model_directory, tmp_path_factory.mktemp("disk")) as made:
        made.api.membership.controllers = [ControllerInfo("controller", NAMESPACE, 5, 1, 2, 3, 4, 0, 0, 7.5, (EVENT,))]
        yield made


def run(there: Site, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["status", *arguments, "--url", there.api.url], env={"COLUMNS": "80"})


def test_nothing_is_cut_off_in_a_narrow_terminal(there: Site) -> None:
    result = run(there)
    assert result.exit_code == 0, result.output
    for whole in ("KV blocks used", "quarantined", "node-1", "10 / 100", "Redis is", EVENT.strip()):
        assert whole in result.stdout
    assert "…" not in result.stdout


def test_json_is_the_answer_as_it_came(there: Site) -> None:
    state = json.loads(run(there, "--json").stdout)
    assert state.keys() == there.get("/status").keys()
    assert [worker["id"] for worker in state["workers"]] == ["b1"]


def test_nobody_there_is_one_line_and_exit_1() -> None:
    result = CliRunner().invoke(app, ["status", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "is `tandem serve` running?" in result.stderr
