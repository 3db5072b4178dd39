"""docs/metrics.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from router.families import SCENARIOS
from router.metrics import FAMILIES
from router.metrics_reference import SECTIONS, document

FILE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_document_is_up_to_date() -> None:
    """Else: python -m router.metrics_reference > docs/metrics.md"""
    assert FILE.read_text() == document()


def test_every_metric_is_in_one_section() -> None:
    documented = [family.name for _, families in SECTIONS for family in families]
    assert sorted(documented) == sorted(family.name for family in FAMILIES)
    assert len(documented) == len(set(documented))


def test_names_say_what_they_are() -> None:
    for family in FAMILIES:
        assert family.name.startswith("tandem_")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.meaning
        assert family.unit


def test_every_scenario_moves_something() -> None:
    assert {family.moved_by for family in FAMILIES} == SCENARIOS.keys()
