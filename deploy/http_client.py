"""One question to a running deployment's HTTP API, as the commands ask it: the answer, or one line and exit code 1.

What the API refuses is shown in its own words. Nothing is tried again: who asks is a person.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from deploy.terminal import fail

LOCAL = "http://127.0.0.1:8000"
CALL_S = 30.0
OPERATOR_HEADER = "x-tandem-operator-key"

Url = Annotated[str, typer.Option(help="a running deployment")]
Key = Annotated[str, typer.Option(envvar="TANDEM_OPERATOR_KEY", show_envvar=True, help="the operator key, if it asks")]


def ask(
    url: str,
    method: str,
    path: str,
    key: str = "",
    body: dict[str, Any] | None = None,
    timeout_s: float = CALL_S,
) -> Any:
    """The JSON that comes back. `key`: the operator's."""
    key = key.encode().decode("latin-1")  # as the bytes are to be sent
    secret = {"authorization": f"Bearer {key}", OPERATOR_HEADER: key} if key else {}
    headers = {"content-type": "application/json"} | secret
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        fail(_reason(error))
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        fail(f"no deployment answers at {url} ({getattr(error, 'reason', error)}); is `tandem serve` running?")


def _reason(error: urllib.error.HTTPError) -> str:
    """The API's own words, if it is the API that answered."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answered {error.code} {error.reason}"
