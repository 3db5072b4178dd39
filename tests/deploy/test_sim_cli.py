import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app

TRACE = "shared:rate=4,seconds=20"


def simulate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["simulate", *arguments])
    return result.exit_code, result.output


def figures(tmp_path: Path, *arguments: str) -> dict[str, object]:
    path = tmp_path / "figures.json"
    code, output = simulate("--trace", TRACE, "--json", str(path), *arguments)
    assert code == 0, output
    found: dict[str, object] = json.loads(path.read_text())
    return found


def test_the_json_has_what_programs_look_for(tmp_path: Path) -> None:
    found = figures(tmp_path, "--workers", "4", "--html", str(tmp_path / "page.html"))
    expected = {
        "ttft_mean_ms", "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "itl_mean_ms", "itl_p99_ms", "hit_ratio",
        "goodput_rps", "load_max_over_mean", "flips", "requests_per_wall_second", "peak_memory_mib", "seed", "settings",
    }  # fmt: skip
    assert expected <= found.keys()
    assert found["finished"] == found["requests"]
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_load_takes_as_many_copies_as_keep_the_workers_busy(tmp_path: Path) -> None:
    found = figures(tmp_path, "--workers", "4", "--load", "0.5", "--limit", "300")
    assert isinstance(found["copies"], int)
    assert found["copies"] > 1
    busy = found["utilisation"]
    assert isinstance(busy, float)
    assert 0.3 < busy < 0.75


def test_a_failing_worker_and_aggregated_serving(tmp_path: Path) -> None:
    assert figures(tmp_path, "--prefill", "2", "--decode", "1")["workers"] == 3
    found = figures(tmp_path, "--workers", "3", "--aggregated", "--failures", "5:1", "--start-s", "1")
    assert found["finished"] == found["requests"]
    assert found["network_bytes"] == 0


def test_rates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    rates = {
        "prefill": [1, 0.01, 0],
        "decode": [7.0, 0, 0],
        "memory": [1, 1e-8],
        "disk": [1, 1e-8],
        "remote": [1, 1e-8],
    }
    path.write_text(json.dumps(rates | {"step_tokens": 2048}))
    found = figures(tmp_path, "--workers", "1", "--rates", str(path), "--aggregated", "--limit", "1")
    assert found["itl_mean_ms"] == pytest.approx(7.0)


@pytest.mark.parametrize(("arguments", "says"), [
    (("--trace", "nothing-of-that-name"), "nothing-of-that-name"),
    (("--trace", TRACE, "--failures", "soon"), "--failures soon"),
    (("--trace", TRACE, "--scale", "4"), "--scale 4"),
    (("--trace", TRACE, "--model", "none"), "Llama-3-70B"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments: tuple[str, ...], says: str) -> None:
    code, output = simulate(*arguments)
    assert code == 1
    assert says in output
