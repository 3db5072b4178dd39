"""What workers have measured, for those that have not: a decode worker that never saw a prompt is no faster at it.

A worker's rates begin with a prior, which may be far too good; placement would send every prompt to whoever has none of
the truth yet. Workers of one deployment run the same model, so until a worker has measured prompts (or decode steps)
itself, the latest that another one on the same kind of machine has told stands in. No clock, no network.
"""

from __future__ import annotations

import dataclasses

from cluster.messages import Rates


class Experience:
    def __init__(self) -> None:
        self._prefill: dict[str, Rates] = {}  # kind of machine -> the latest whose prefill was measured
        self._decode: dict[str, Rates] = {}

    def filled(self, rates: Rates, kind: str = "") -> Rates:
        """The rates that a worker has told, with what others know put in for what it does not. They are learnt from.
        `kind`: its GPU's name; empty: it has none. What an L40S does says nothing of an H200."""
        if rates.prefill_error > 0:
            self._prefill[kind] = rates
        elif (known := self._prefill.get(kind)) is not None:
            rates = dataclasses.replace(rates, prefill=known.prefill)
        if rates.decode_error > 0:
            self._decode[kind] = rates
        elif (known := self._decode.get(kind)) is not None:
            rates = dataclasses.replace(rates, decode=known.decode)
        return rates
