"""Copies of block bytes, and the threads they run in.

A block is a numpy view [layout.block_bytes] of somebody's memory. Copies and checksums release the GIL; they run in
threads so that the event loop goes on, and never outlive the call that started them.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout

T = TypeVar("T")
Block = npt.NDArray[np.uint8]
log = logging.getLogger(__name__)


async def in_thread(work: Callable[[], T]) -> T:
    """Run in a thread. When cancelled, wait for its end first: its memory may have another owner right after."""
    task = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:  # cancelled once more, and the copy is still running
                continue
        if not task.cancelled() and task.exception() is not None:
            log.warning("a copy failed after it had been cancelled: %r", task.exception())
        raise


def checksums(block: Block, layout: Layout) -> bytes:
    """CRC-32 of each (head, layer) cell, head-major, u32le: what a reader of any rectangle can verify."""
    view, size = block.data, layout.cell_bytes
    return struct.pack(f"<{layout.cells}I", *(zlib.crc32(view[i : i + size]) for i in range(0, len(view), size)))
