"""`tandem config`: every setting with its value and where it comes from, and no secret."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.config import Config
from deploy.cli import app

SECRETS = {
    "TANDEM_API_KEYS": "first-hidden,second-hidden",
    "TANDEM_OPERATOR_KEY": "operator-hidden",
    "TANDEM_SECRET": "cluster-secret-hidden",
    "TANDEM_REDIS_URL": "redis://user:redis-hidden@redis.example:6380/0",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tandem.toml"
    path.write_text('decode = 2\nport = 9001\nmodel = "from-the-file"\n')
    return path


def config(*arguments: str, **environment: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["config", "--json", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_setting_and_its_origin(file: Path) -> None:
    found = config("mine", "--config", str(file), "--port", "9003", "--decode-tp", "2", TANDEM_PORT="9002",
                   TANDEM_DTYPE="float32")  # fmt: skip
    assert found.keys() == Config.model_fields.keys()
    shown = {name: (found[name]["value"], found[name]["origin"]) for name in found}
    assert shown["decode"] == ("2", str(file))
    assert shown["dtype"] == ("float32", "environment (TANDEM_*)")
    assert shown["port"] == ("9003", "command line")
    assert shown["model"] == ("mine", "command line")
    assert shown["decode_tp"] == ("2", "command line")
    assert shown["prefill"] == ("1", "default")
    assert (found["threads"]["value"], int(found["threads"]["here"]) > 0) == ("0", True)


def test_secrets_are_not_shown() -> None:
    found = config(**SECRETS)
    assert [found[name]["value"] for name in ("api_keys", "operator_key", "secret")] == ["***"] * 3
    assert found["redis_url"]["value"] == "redis://redis.example:6380/0"
    assert found["secret"]["origin"] == "environment (TANDEM_*)"
    assert "hidden" not in json.dumps(found)
    table = CliRunner().invoke(app, ["config"], env=SECRETS)
    assert "***" in table.stdout
    assert "hidden" not in table.output


def test_what_serve_would_refuse_is_refused() -> None:
    wrong = CliRunner().invoke(app, ["config", "--decode", "0"])
    assert wrong.exit_code == 1
    assert "command line: decode: " in wrong.stderr
    unknown = CliRunner().invoke(app, ["config", "--decod", "1"])
    assert unknown.exit_code == 2
    assert "--decod" in unknown.output


def test_how_it_logs_is_no_setting() -> None:
    assert "log" not in config(TANDEM_LOG="json")
