"""What the shards of one worker say to each other while they compute a step: sums, gathers and activations.

Every call is collective: all ranks that it concerns make the same calls in the same order, which following the same
step plans ensures. Only the compute thread of a shard calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a simulated worker has no use for torch, which takes seconds to import
    import torch
    from torch import Tensor


class Links(Protocol):
    def sum_inplace(self, x: Tensor) -> None:
        """Replace x by its sum over the tensor ranks of this stage, the same bits on all of them."""
        ...

    def gather(self, x: Tensor) -> Tensor:  # [...] -> [tp, ...]
        """x of every tensor rank of this stage, in rank order; of the same shape everywhere."""
        ...

    def send(self, x: Tensor) -> None:
        """Give x to the same tensor rank of the next stage. It is the links' from now on: nobody writes to it."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What the same tensor rank of the previous stage sends next."""
        ...

    def close(self) -> None: ...


class NoLinks:
    """Of a worker that is one shard."""

    def sum_inplace(self, x: Tensor) -> None:
        pass

    def gather(self, x: Tensor) -> Tensor:
        return x[None]

    def send(self, x: Tensor) -> None:
        raise AssertionError("a single shard has no next stage")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise AssertionError("a single shard has no previous stage")

    def close(self) -> None:
        pass
