"""A report shows what there is, leaves out what there is not, and needs nothing from a network."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from cluster.errors import ConfigError
from loadtests.simulator import report
from loadtests.simulator.plots import drawings

TIMES = [float(second) for second in range(5_000)]
FULL: dict[str, Any] = {
    "name": "least_time <8>",
    "requests": 12_031,
    "request_rps": 3.4,
    "goodput_rps": 3.1,
    "hit_ratio": 0.365,
    "ttft_mean_ms": 1234.567,
    "itl_mean_ms": 21.25,
    "ttft_slo_ms": 5000.0,
    "series": {"time_s": TIMES, "waiting": TIMES, "prefill": [3] * 5_000, "decode": [1] * 5_000},
    "ttft_quantiles_ms": [1.0 + i for i in range(101)],
    "itl_quantiles_ms": [10.0 + i for i in range(101)],
    "settings": {"placement": "least_time", "note": "</pre><script>"},
}


def text_of(results: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.show(results, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_table_has_a_column_per_run_and_no_row_that_nobody_has() -> None:
    text = text_of([FULL, {"name": "random", "requests": 5, "hit_ratio": 0.1}])
    assert row(text, "prompt tokens hit") == ["prompt tokens hit", "%", "36.5", "10"]
    assert row(text, "TTFT mean") == ["TTFT mean", "ms", "1,235", ""]
    assert row(text, "requests offered")[2:] == ["3.4", ""]
    assert "peak memory" not in text
    assert "least_time <8>" in text


def test_rows_are_shown_in_their_own_order() -> None:
    console = Console(file=io.StringIO(), width=200)
    report.show_rows("ladder", [{"policy": "random", "ttft": 12.5}, {"policy": "least", "ttft": None}], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert row(text, "random") == ["random", "12.5"]
    assert text.index("random") < text.index("least")


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    report.write_json(FULL, tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == FULL


def test_the_page_stands_alone_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    report.write_html([FULL, FULL | {"name": "other"}], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    # names of XML vocabularies are addresses that nobody opens
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", page) == []
    assert "<script" not in page
    assert "least_time &lt;8&gt;" in page
    assert page.count("<svg") == 4
    assert len(page) < 1_000_000  # five thousand points were drawn as fewer
    report.write_html([FULL, FULL | {"name": "other"}], tmp_path / "b.html")
    assert (tmp_path / "b.html").read_text() == page


def test_drawings_are_those_that_a_run_has_data_for() -> None:
    titles = [title(svg) for svg in drawings([("a", FULL)])]
    assert titles == [
        "Requests that wait for a worker",
        "Workers by role",
        "Time to first token",
        "Time between tokens",
    ]
    assert list(drawings([("a", {"name": "a"})])) == []
    only = {"series": {"time_s": [0.0, 1.0], "waiting": [1, 2]}}
    assert [title(svg) for svg in drawings([("a", only)])] == titles[:1]


def test_goodput_is_drawn_where_rates_differ() -> None:
    runs = [(f"{rate}", {"request_rps": rate, "goodput_rps": min(rate, 5.0), "curve": "x"}) for rate in (2.0, 4.0, 8.0)]
    assert [title(svg) for svg in drawings(runs)] == ["Goodput against rate"]
    assert list(drawings(runs[:1])) == []


def title(svg: str) -> str:
    """The first left-aligned large text of a drawing, which parses as XML."""
    texts = [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    known = ("Requests that", "Workers by", "Time to first token", "Time between tokens", "Goodput against")
    return next(text for text in texts if text.startswith(known))


def test_files_that_cannot_be_written_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write_json({}, tmp_path / "no" / "folder.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write_html([FULL], tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (12_031, "12,031"),
        (1234.5, "1,234"),
        (123.45, "123.5"),
        (12.345, "12.3"),
        (0.01234, "0.0123"),
        ("x", "x"),
    ],
)
def test_figures_have_the_digits_they_deserve(value: Any, text: str) -> None:
    assert report.shown(value) == text
