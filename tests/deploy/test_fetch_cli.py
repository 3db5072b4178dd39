"""`tandem fetch`: where a model is, or why it cannot be had."""

from pathlib import Path

from typer.testing import CliRunner

from deploy.cli import app


def test_it_says_where_the_model_is(tiny: Path) -> None:
    fetched = CliRunner().invoke(app, ["fetch", str(tiny)])
    assert fetched.exit_code == 0, fetched.output
    assert fetched.output.strip() == str(tiny)


def test_a_name_of_nothing_is_one_line_and_a_failure() -> None:
    refused = CliRunner().invoke(app, ["fetch", "no-such-model.gguf"])
    assert refused.exit_code == 1
    assert "no such file or directory: no-such-model.gguf" in refused.output
