"""`tandem plan` finds a deployment that meets the SLOs in the simulator, and says what is wrong otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app

TRACE = "poisson:rate=4,seconds=30,input=2000,output=100"


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--trace", TRACE, "--dtype", "fp8", "--tp", "2,4", *arguments])


def test_the_cheapest_comes_first_and_can_be_served(tmp_path: Path) -> None:
    result = plan("--ttft-slo", "2", "--itl-slo", "0.04", "--json", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert [row["GPUs"] for row in found] == sorted(row["GPUs"] for row in found)
    assert all(row["within SLO (%)"] >= 90 for row in found)
    assert found[0]["serve it with"] in result.output


def test_a_tighter_slo_is_not_cheaper(tmp_path: Path) -> None:
    def cheapest(itl: str) -> int:
        result = plan("--ttft-slo", "2", "--itl-slo", itl, "--json", str(tmp_path / "found.json"))
        assert result.exit_code == 0, result.output
        return int(json.loads((tmp_path / "found.json").read_text())["found"][0]["GPUs"])

    assert cheapest("0.016") >= cheapest("0.1")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--model", "nothing"), "Llama-3-8B"),
        (("--gpu", "abacus"), "H100"),
        (("--tp", "two"), "1,2,4"),
        (("--tp", "0"), "1 or more"),
        (("--tp", "1"), "allow a larger --tp"),
        (("--itl-slo", "0.001"), "longer SLOs"),
        (("--gpus", "1"), "more --gpus"),
    ],
)
def test_what_cannot_be_is_said_with_what_to_change(arguments: tuple[str, ...], cause: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 1
    assert cause in result.output
