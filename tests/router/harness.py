"""A whole router over HTTP: uvicorn, the application and fake workers in one thread's event loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

from cluster.config import Config
from cluster.messages import Role
from router.app import create_app
from router.settings import RouterSettings
from tests.router.fakes import EOS, MODEL_KEY, NAMESPACE, SECRET, VOCAB, FakeWorker, StaticMembership, Transfers

T = TypeVar("T")
MODEL = "org/test-model"
MAX_CONTEXT = 256
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "b": "both"}


class Api:
    """What a test holds: the address, an HTTP client, the workers."""

    def __init__(self, model_directory: Path) -> None:
        self.settings = RouterSettings(
            str(model_directory), MODEL, NAMESPACE, SECRET, "", MAX_CONTEXT, VOCAB, (EOS,), MODEL_KEY
        )
        self.membership = StaticMembership()
        self.workers: dict[str, FakeWorker] = {}
        self.url = ""
        self.http: httpx.Client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def run(self, coroutine: Awaitable[T]) -> T:
        """Run in the server's loop."""

        async def bounded() -> T:
            async with asyncio.timeout(20):
                return await coroutine

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result(30)

    def set(self, action: Callable[[], Any]) -> None:
        """Call in the server's loop: asyncio's events are not for other threads."""

        async def call() -> None:
            action()

        self.run(call())

    def wait(self, condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.002)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", **({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | body)
        )

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", **({"model": MODEL, "prompt": "hi"} | body))

    def quiet(self) -> None:
        """No worker runs anything any more."""
        self.wait(lambda: not any(worker.running for worker in self.workers.values()))

    def reset(self) -> None:
        """Workers forget their scripts and what they were asked."""
        for worker in self.workers.values():
            self.set(worker.go.set)
        self.quiet()
        for worker in self.workers.values():
            self.set(worker.reset)

    async def _start_workers(self, roles: str) -> None:
        transfers: Transfers = {}
        for at, kind in enumerate(roles):
            worker_id = f"{kind}{roles[: at + 1].count(kind)}"
            self.workers[worker_id] = await FakeWorker(worker_id, ROLES[kind], transfers).start()
        self.membership.workers = [worker.info for worker in self.workers.values()]

    async def _stop_workers(self) -> None:
        for worker in self.workers.values():
            await worker.die()

    @contextmanager
    def serving(self, roles: str, **config: Any) -> Iterator[Api]:
        self._thread.start()
        self.run(self._start_workers(roles))
        app = create_app(Config(**config), self.settings, self.membership)
        server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
        )
        done = asyncio.run_coroutine_threadsafe(server.serve(), self._loop)
        try:
            self.wait(lambda: server.started or done.done())
            port = server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=self.url, timeout=20) as self.http:
                if roles:
                    self.wait(lambda: len(self.http.get("/status").json()["workers"]) == len(roles))
                    self.wait(lambda: self.http.get("/ready").is_success)
                yield self
        finally:
            server.should_exit = True
            done.result(15)
            self.run(self._stop_workers())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()


def prompt_of(api: Api) -> list[int]:
    """The prompt as the workers got it last."""
    return list(api.workers["p1"].generations[-1].prompt)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a finished stream, whose last frame must be [DONE]."""
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
