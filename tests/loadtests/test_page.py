"""The report needs nothing from a network, explains its terms, and shows what a run has."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from loadtests import figures, page, slo
from loadtests.measurements import Measurements
from tests.loadtests.test_measurements import answer, filled, take


def run(measurements: Measurements, name: str = "run", **limits: float) -> dict[str, Any]:
    found = {name: figures.scenario(measurements.whole(name), 20.0) for name in measurements.slots}
    for scenario, values in found.items():
        values["series"] = figures.series(measurements, scenario)
    verdicts = slo.judge({"every": limits}, found, list(found), {})
    return {
        "name": name, "url": "http://h/?<x>", "model": "m", "window_s": 20.0, "settings": {"seed": 1},
        "scenarios": found,
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "errors": [["chat", "<script>alert(1)</script>", 3]],
    }  # fmt: skip


def test_it_stands_alone(tmp_path: Path) -> None:
    page.write([run(filled())], tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text()
    # names of XML vocabularies are addresses that nobody opens
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<link|<iframe""", text) == []
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert len(text) < 1_000_000


def test_terms_figures_and_plots_are_there() -> None:
    text = page.page([run(filled())])
    for term in ("TTFT", "ITL", "TPOT", "goodput", "send delay"):
        assert f"<dt>{term}</dt>" in text
    titles = ("Time to first token", "Time between tokens", "Time per output token", "TTFT by when", "ITL by when",
              "Requests sent, and good", "Output tokens")  # fmt: skip
    assert [title for title in titles if f">{title}" not in text] == []
    assert text.count("<svg") == len(titles), "nothing had a send delay"
    assert re.search(r"<tr><td>answered</td><td></td><td>40</td><td>1</td>", text)


def test_what_was_missed_stands_first() -> None:
    text = page.page([run(filled(), failed=1.0, ttft_p95_ms=50.0)])
    assert "2 of 6 limits were missed" in text
    assert text.index(">missed<") < text.index(">kept<")
    kept = page.page([run(filled(), failed=1.0)])
    assert "All of 4 limits were kept" in kept
    assert ">missed<" not in kept


def test_runs_stand_beside_one_another_and_one_with_nothing_is_no_mistake() -> None:
    other = Measurements()
    take(other, "chat", answer(50, [0.1, 0.2], tokens=2))
    text = page.page([run(filled(), "tandem"), run(other, "vllm"), run(Measurements(), "none")])
    assert "tandem: chat" in text
    assert "vllm: chat" in text


def test_several_files_become_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(run(filled(), "a")))
    monkeypatch.setattr("sys.argv", ["page", "--out", str(tmp_path / "x.html"), str(tmp_path / "a.json")])
    page.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "x.html")
    assert "chat" in (tmp_path / "x.html").read_text()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        page.write([run(filled())], tmp_path)
