"""What one worker says of itself, for somebody who sends it nothing: the reports on its output stream.

The same frames that routers get; without jobs of one's own they come once a second. A stream that breaks or stays
silent for too long means that the worker is lost, and is tried again until `close`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from cluster.errors import TandemError
from cluster.messages import Load, Outputs, Rates, StepOutput, WorkerInfo
from cluster.rpc import Client

BACKOFF_S = 0.5
log = logging.getLogger(__name__)


class WorkerReports:
    """Of one start of one worker. To be made and closed in the event loop that it lives in."""

    def __init__(self, info: WorkerInfo, reader_id: str, secret: str, timeout_s: float) -> None:
        self.info = info
        self.load: Load | None = None  # None: it is not connected
        self.rates: Rates | None = None  # None: it has not said
        self._reader_id = reader_id
        self._timeout_s = timeout_s
        self._client = Client(info.address, secret)
        self._task = asyncio.create_task(self._listen(), name=f"reports of {info.id}")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._client.close()

    async def _listen(self) -> None:
        while True:
            try:
                await self._follow()
            except (TandemError, TimeoutError) as error:
                if self.load is not None:
                    log.info("lost %s at %s: %s", self.info.id, self.info.address, error or "it is silent")
            self.load = None
            await asyncio.sleep(BACKOFF_S)

    async def _follow(self) -> None:
        """Until the stream ends."""
        stream = self._client.stream("Outputs", Outputs(self._reader_id), None)
        async with aclosing(stream) as frames:
            while True:
                async with asyncio.timeout(self._timeout_s):
                    frame = await anext(frames, None)
                if not isinstance(frame, StepOutput):
                    return
                self.load, self.rates = frame.load, frame.rates or self.rates
