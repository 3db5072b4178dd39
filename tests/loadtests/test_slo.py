"""Limits are read, mistakes in them named, and each is kept or missed on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConfigError
from loadtests import slo

SCENARIOS = ("chat", "turns", "rag")
FIGURES = {"requests": 50.0, "failed": 0.02, "ttft_p95_ms": 900.0, "good": 0.93, "goodput_rps": 2.0, "late_share": 0.0}


def written(folder: Path, text: str) -> Path:
    path = folder / "slo.toml"
    path.write_text(text)
    return path


def judge(
    limits: dict[str, slo.Limits], measured: dict[str, dict[str, float]], due: dict[str, int], *more: str
) -> list[slo.Verdict]:
    """What was measured or due was chosen, and `more`."""
    return slo.judge(limits, measured, list(dict.fromkeys((*measured, *due, *more))), due)


def missed(verdicts: list[slo.Verdict]) -> list[tuple[str, str]]:
    return [(verdict.scenario, verdict.limit) for verdict in verdicts if not verdict.kept]


def test_one_scenarios_limits_go_before_everyones(tmp_path: Path) -> None:
    text = "[every]\nfailed = 0.05\nttft_p95_ms = 800\n[chat]\nttft_p95_ms = 1000\ngood = 0.9\n"
    limits = slo.load(written(tmp_path, text), SCENARIOS)
    assert missed(judge(limits, {"chat": FIGURES, "rag": FIGURES}, {})) == [("rag", "ttft_p95_ms")]


def test_limits_hold_to_the_last_digit() -> None:
    for limit, kept, lost in (("ttft_p95_ms", 900, 899.9), ("good", 0.93, 0.931), ("goodput_rps", 2, 2.1)):
        assert missed(judge({"chat": {"failed": 1, limit: kept}}, {"chat": FIGURES}, {})) == []
        assert missed(judge({"chat": {"failed": 1, limit: lost}}, {"chat": FIGURES}, {})) == [("chat", limit)]


def test_failures_and_nothing_at_all_are_missed_without_a_file() -> None:
    assert slo.load(None, SCENARIOS) == {}
    assert missed(judge({}, {"chat": FIGURES}, {})) == [("chat", "failed")]
    assert missed(judge({}, {"chat": {"requests": 0.0}}, {})) == [("chat", "requests"), ("chat", "failed")]


def test_a_scenario_that_was_chosen_has_to_be_measured_and_no_other() -> None:
    limits = {"every": {"failed": 1.0}, "rag": {"ttft_p95_ms": 1.0}}
    assert missed(judge(limits, {"chat": FIGURES}, {})) == []
    verdicts = judge(limits, {"chat": FIGURES}, {}, "rag")
    assert missed(verdicts) == [("rag", "requests"), ("rag", "failed"), ("rag", "ttft_p95_ms")]
    assert "MISSED rag: ttft_p95_ms at most 1: nothing was measured" in map(str, verdicts)
    assert "kept chat: failed at most 1: 0.02" in map(str, verdicts)


def test_what_has_times_has_to_be_sent_all_and_on_time() -> None:
    sent = FIGURES | {"failed": 0.0, "sent": 50.0}
    assert missed(judge({}, {"trace": sent}, {"trace": 50})) == []
    assert missed(judge({}, {"trace": sent}, {"trace": 51})) == [("trace", "sent")]
    assert missed(judge({}, {"trace": sent | {"late_share": 0.06}}, {"trace": 50})) == [("trace", "late_share")]
    assert ("trace", "sent") in missed(judge({}, {}, {"trace": 50}))


def test_being_late_is_asked_of_everyone_who_can_be() -> None:
    every = {"every": {"failed": 1.0, "late_p99_ms": 20.0}}
    late = FIGURES | {"sent": 50.0, "late_p99_ms": 30.0}
    assert missed(judge(every, {"chat": FIGURES, "trace": late}, {"trace": 50})) == [("trace", "late_p99_ms")]
    named = {"chat": {"failed": 1.0, "late_p99_ms": 20.0}}
    assert missed(judge(named, {"chat": FIGURES}, {})) == [("chat", "late_p99_ms")], "nobody can have kept that"


def test_a_request_is_good_within_both_limits() -> None:
    limits = {"within_ttft_ms": 500.0, "within_tpot_ms": 50.0}
    assert slo.within(limits, 0.5, 0.05)
    assert not slo.within(limits, 0.501, 0.05)
    assert not slo.within(limits, 0.5, 0.051)
    assert slo.within(limits, 0.5, None), "a single token has no time per output token"
    assert slo.within({}, 100.0, 100.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[every]\nttft_p95 = 3\n", "unknown limit 'ttft_p95'.*ttft,itl"),
        ("[chat]\nfailed = -1\n", "failed of .chat. is -1"),
        ("[chat]\nfailed = true\n", "is True"),
        ("failed = 0\n", "no section"),
        ("[chat\n", "cannot be read"),
        ("[chta]\nfailed = 0\n", "no scenario 'chta'; there are chat, turns, rag"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        slo.load(written(tmp_path, text), SCENARIOS)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        slo.load(tmp_path / "none.toml", SCENARIOS)


def test_those_that_come_with_it_can_be_read() -> None:
    files = sorted(Path("loadtests/slos").glob("*.toml"))
    assert [path.name for path in files] == ["chat.toml", "smoke.toml"]
    assert all(slo.load(path, SCENARIOS) for path in files)
