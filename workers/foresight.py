"""Which sequences a step may go on with before their last token is known here, because it still is on the device.

A runner that is `ahead` has one step more in flight than it computes: while a step runs, the next one is decided and
written down, of sequences whose token the step in flight chooses. If that token turns out to end one, a row of the next
step was computed for nobody, and its blocks stay its own until that step has ended. What can be known before, is: the
limits of its length, and that a token is chosen on the host.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.draw import Draw
from workers.sequence import Sequence


def foresight(ahead: bool, max_context: int) -> Callable[[Sequence], bool] | None:
    """For a sequence whose next token is about to be chosen: may the one after be, too? None: of no sequence."""

    def goes_on(sequence: Sequence) -> bool:
        s = sequence.generation.sampling
        tokens = len(sequence.tokens) + sequence.pending + 1
        ends = tokens >= max_context or tokens - sequence.prompt_length >= s.max_tokens or bool(sequence.transfer_id)
        return not ends and not Draw(s, sequence.tokens, sequence.prompt_length).adjusted

    return goes_on if ahead else None
