"""The next token of a sequence, without logits: what it is drawn by, and whether it is the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.messages import FinishReason, Sampling

GREEDY_TEMPERATURE = 1e-5  # below this a softmax is an argmax in fp32 anyway


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: the next of `tokens`, of which the first `prompt_length` are the prompt."""

    sampling: Sampling
    tokens: Sequence[int]
    prompt_length: int

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_TEMPERATURE or self.sampling.top_k == 1

    @property
    def adjusted(self) -> bool:
        """Something changes the logits before they are compared."""
        s = self.sampling
        penalised = s.repetition_penalty != 1.0 or s.frequency_penalty != 0.0 or s.presence_penalty != 0.0
        return penalised or bool(s.logit_bias) or len(self.tokens) - self.prompt_length < s.min_tokens


def finish(sampling: Sampling, tokens: Sequence[int], prompt_length: int, max_context: int) -> FinishReason | None:
    """Why generation ends with the last of `tokens`, if it does."""
    new_tokens = len(tokens) - prompt_length
    if new_tokens > sampling.min_tokens and tokens[-1] in sampling.stop_token_ids:
        return "stop"
    if new_tokens >= sampling.max_tokens or len(tokens) >= max_context:
        return "length"
    return None
