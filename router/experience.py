"""What workers have measured, for those that have not: a decode worker that never saw a prompt is no faster at it.

A worker's rates begin with a prior, which may be far too good; placement would send every prompt to whoever has none of
the truth yet. Workers of one deployment run the same model on much the same machines, so until a worker has measured
prompts (or decode steps) itself, the latest that one of the others has told stands in. No clock, no network.
"""

from __future__ import annotations

import dataclasses

from cluster.messages import Rates


class Experience:
    def __init__(self) -> None:
        self._prefill: Rates | None = None  # the latest whose prefill was measured
        self._decode: Rates | None = None

    def filled(self, rates: Rates) -> Rates:
        """The rates a worker has told, with what others know put in for what it does not. They are learnt from."""
        if rates.prefill_error > 0:
            self._prefill = rates
        elif self._prefill is not None:
            rates = dataclasses.replace(rates, prefill=self._prefill.prefill)
        if rates.decode_error > 0:
            self._decode = rates
        elif self._decode is not None:
            rates = dataclasses.replace(rates, decode=self._decode.decode)
        return rates
