"""What users ask is determined by the seed, begins alike where it should, and nowhere else."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import pytest

from loadtests.client import CHAT, COMPLETIONS, Ask
from loadtests.prompts import code, text
from loadtests.scenarios import SCENARIOS, TENANTS, Population, asks


def some(name: str, count: int = 30, user: int = 0, seed: int = 1, length: float = 0.2) -> list[Ask]:
    """The first asks of a user whose every answer is "ANSWER"."""
    made = asks(name, Population(seed, length), user)
    found = [next(made)]
    while len(found) < count:
        found.append(made.send("ANSWER"))
    return found


def contents(ask: Ask) -> list[str]:
    messages: list[dict[str, Any]] = ask.body["messages"]
    return [message["content"] for message in messages]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_user_asks_the_same_in_every_run_and_another_something_else(name: str) -> None:
    assert some(name) == some(name)
    assert some(name)[0].body != some(name, user=1)[0].body
    assert some(name)[0].body != some(name, seed=2)[0].body


@pytest.mark.parametrize("name", SCENARIOS)
def test_bodies_hold_nothing_but_what_every_server_knows(name: str) -> None:
    for ask in some(name):
        assert ask.body.keys() in ({"messages", "max_tokens", "temperature"}, {"prompt", "max_tokens", "temperature"})
        assert ask.path == (CHAT if "messages" in ask.body else COMPLETIONS)
        assert ask.body["max_tokens"] >= 1
        assert ask.think_s >= 0


def test_chats_share_a_few_system_prompts_and_no_question() -> None:
    asked = some("chat", 60) + some("chat", 60, user=1)
    systems = {contents(ask)[0] for ask in asked}
    assert 1 < len(systems) <= TENANTS
    assert len({contents(ask)[1] for ask in asked}) == len(asked)
    assert {contents(ask)[0] for ask in some("chat", 60, seed=2)}.isdisjoint(systems)


def test_a_turn_begins_with_all_that_was_said_before() -> None:
    asked = some("turns", 40)
    for before, after in pairwise(asked):
        if len(contents(after)) > 2:
            assert contents(after)[:-2] == contents(before)
            assert contents(after)[-2] == "ANSWER"
        else:
            assert len(contents(before)) >= 2 * 4
    assert max(len(contents(ask)) for ask in asked) <= 2 * 8
    assert sum(len(contents(ask)) == 2 for ask in asked) >= 5


def test_documents_come_back_and_their_prompts_are_long() -> None:
    asked = some("rag", 60, length=1.0)
    begins = [contents(ask)[0].split("\n\n")[0] for ask in asked]
    assert 1 < len(set(begins)) < len(begins) / 3
    assert min(len(contents(ask)[0].split()) for ask in asked) > 800
    assert max(ask.body["max_tokens"] for ask in asked) <= 48


def test_a_file_grows_from_request_to_request() -> None:
    asked = [ask.body["prompt"] for ask in some("code", 40)]
    grown = sum(after.startswith(before) for before, after in pairwise(asked))
    assert grown >= 20


def test_a_soak_has_all_kinds_and_some_who_leave() -> None:
    asked = some("soak", 300)
    assert {ask.path for ask in asked} == {CHAT, COMPLETIONS}
    assert any("ANSWER" in contents(ask) for ask in asked if ask.path == CHAT)
    assert 3 <= sum(ask.leave_after > 0 for ask in asked) <= 40


def test_lengths_scale() -> None:
    long, short = (some("rag", 20, length=length) for length in (1.0, 0.1))
    assert sum(len(contents(a)[0]) for a in long) > 5 * sum(len(contents(a)[0]) for a in short)


def test_texts_have_the_length_asked_for_and_differ_from_the_first_word_on() -> None:
    assert len(text("a", 50).split()) == 50
    assert text("a", 50) == text("a", 50)
    assert len({text(str(seed), 5).split()[0] for seed in range(200)}) == 200
    assert len(code("a", 12).splitlines()) == 12
    assert list(islice(code("a", 3), 2)) == ["#", " "]
