"""The line that a request leaves in the log when it ends."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.router.harness import Api

SECRET_TEXT = "hello world hello there"


@pytest.fixture(scope="module")
def served(model_directory: Path) -> Iterator[Api]:
    with Api(model_directory).serving("pd") as api:
        yield api


@pytest.fixture
def records(served: Api, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    served.reset()
    caplog.set_level(logging.INFO, "router.request_log")
    return caplog


def fields(records: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in records.records if record.name == "router.request_log"]


def test_a_request_that_finished(served: Api, records: pytest.LogCaptureFixture) -> None:
    response = served.http.post(
        "/v1/completions", json={"prompt": SECRET_TEXT, "max_tokens": 4}, headers={"x-request-id": "mine"}
    )
    assert response.is_success
    served.wait(lambda: fields(records))
    (line,) = fields(records)
    assert line["request_id"].startswith("mine-")
    assert (line["outcome"], line["output_tokens"], line["placements"]) == ("length", 4, 1)
    assert (line["prefill"], line["decode"]) == ("p1", "d1")
    assert line["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert line["ttft_ms"] > 0
    assert line["itl_ms"] >= 0
    everything = str([record.__dict__ for record in records.records])
    assert SECRET_TEXT not in everything
    assert response.json()["choices"][0]["text"] not in everything


def test_a_line_per_choice(served: Api, records: pytest.LogCaptureFixture) -> None:
    assert served.complete(prompt=SECRET_TEXT, max_tokens=2, n=3).is_success
    served.wait(lambda: len(fields(records)) == 3)
    assert len({line["request_id"] for line in fields(records)}) == 3


def test_a_request_that_failed_and_one_whose_client_left(served: Api, records: pytest.LogCaptureFixture) -> None:
    for worker in served.workers.values():
        worker.fail = ("deadline_exceeded", "too late")
    assert not served.complete(prompt=SECRET_TEXT, max_tokens=2).is_success
    served.wait(lambda: fields(records))
    assert fields(records)[0]["outcome"] == "deadline_exceeded"
    assert (fields(records)[0]["output_tokens"], fields(records)[0]["ttft_ms"]) == (0, None)
    served.reset()
    served.workers["d1"].hold_at = 2
    body = {"prompt": SECRET_TEXT, "max_tokens": 8, "stream": True, "return_token_ids": True}
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    served.wait(lambda: len(fields(records)) == 2)
    assert fields(records)[1]["outcome"] == "closed"
