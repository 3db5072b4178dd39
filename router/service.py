"""From a validated API request to the choices that answer it: lengths, token ids, sampling, salt, admission.

What depends on the model is checked here: that the prompt fits, that token ids exist. Admission comes before
tokenizing, because refusing must be cheap when the server is busiest. Nothing here waits for a worker.
"""

from __future__ import annotations

import random
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

from cluster.config import Config
from cluster.errors import ContextLengthExceeded, InvalidRequest, UnknownModel
from cluster.messages import Sampling
from kvstore.hashing import salt, tenant_tag
from router.admission import admit
from router.choices import Choices, Plan
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.metrics import Metrics
from router.openai import ChatRequest, CompletionRequest, GenerationRequest
from router.request import Request
from router.settings import RouterSettings
from router.text import Text

SEED_MASK = 2**63 - 1
THROUGHPUT_WINDOW = 64  # admitted requests whose times give the recent throughput


class Service:
    """The model this router serves."""

    def __init__(self, config: Config, settings: RouterSettings, fleet: Fleet, metrics: Metrics) -> None:
        """Raises ModelError when the model directory has no usable tokenizer."""
        self._config = config
        self._settings = settings
        self._fleet = fleet
        self._metrics = metrics
        self.text = Text.load(settings.model_directory)
        self._dispatcher = Dispatcher(fleet, config.request_timeout)
        self._preparing = 0  # requests admitted whose choices are not made yet
        self._open: WeakSet[Choices] = WeakSet()
        self._admitted: deque[float] = deque(maxlen=THROUGHPUT_WINDOW)  # monotonic seconds

    async def chat(self, body: ChatRequest, tenant: str, request_id: str) -> Choices:
        with self._admission(body):
            prompt = await self.text.encode_chat([message.for_template() for message in body.messages])
            return self._plan(body, [(prompt, "")], "messages", tenant, request_id)

    async def completion(self, body: CompletionRequest, tenant: str, request_id: str) -> Choices:
        with self._admission(body):
            prompts = []
            for prompt in body.prompt:
                if isinstance(prompt, str):
                    tokens, text = await self.text.encode(prompt), prompt
                else:
                    self._check_ids(prompt, "prompt")
                    tokens, text = tuple(prompt), self.text.decode(prompt) if body.echo else ""
                prompts.append((tokens, text if body.echo else ""))
            return self._plan(body, prompts, "prompt", tenant, request_id)

    async def close(self) -> None:
        await self._dispatcher.close()

    @contextmanager
    def _admission(self, body: GenerationRequest) -> Iterator[None]:
        """Around the making of choices, which count as waiting themselves. Raises UnknownModel, Overloaded, ..."""
        if body.model not in (None, self._settings.served_model_name):
            raise UnknownModel(
                f"the model {body.model[:100]!r} does not exist; this server serves"
                f" {self._settings.served_model_name!r}",
                param="model",
            )
        self._check_ids([token for token, _ in body.logit_bias], "logit_bias")
        self._check_ids(body.stop_token_ids or (), "stop_token_ids")
        # the workers' word is late by a frame, and their queues are shared with other routers: take what looks worse
        waiting = max(self._fleet.waiting(), self._preparing + sum(choices.waiting for choices in self._open))
        admit(waiting, self._config.max_queue, self._throughput(), random.random())
        self._admitted.append(time.monotonic())
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def _throughput(self) -> float:
        """Requests admitted per second lately: in a queue that is full, as many enter as leave."""
        if len(self._admitted) < 2:
            return 0.0
        return len(self._admitted) / max(0.001, time.monotonic() - self._admitted[0])

    def _check_ids(self, tokens: Sequence[int], field: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._settings.vocab_size):
            raise InvalidRequest(
                f"{field} holds a token id outside the vocabulary of {self._settings.vocab_size}", param=field
            )

    def _plan(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[tuple[int, ...], str]],
        field: str,
        tenant: str,
        request_id: str,
    ) -> Choices:
        """One plan per prompt and choice, the choices of a prompt next to each other as OpenAI numbers them."""
        secret = self._settings.cluster_secret
        hash_salt, tag = salt(secret, tenant, body.cache_salt or ""), tenant_tag(secret, tenant)
        exact = self._config.kv_quantization == "none" or bool(body.exact_kv)
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        unique = f"{request_id}-{secrets.token_hex(4)}"  # a client may send the same request id twice
        plans: list[Plan] = []
        for number, (tokens, echo) in enumerate(prompts):
            room = self._room(tokens, field)
            for choice in range(body.choices):
                sampling = self._sampling(body, room, (seed + choice) & SEED_MASK)
                request = Request(f"{unique}-{len(plans)}", tokens, sampling, hash_salt, tag, exact)
                plans.append(Plan(request, self.text.detokenizer(body.stop, sampling.min_tokens), number, echo))
        choices = Choices(plans, self._dispatcher.serve, self._metrics, bool(body.return_token_ids))
        self._open.add(choices)
        return choices

    def _room(self, prompt: Sequence[int], field: str) -> int:
        """New tokens that fit behind the prompt, at least one. Raises ContextLengthExceeded."""
        limit = self._settings.max_context
        if not prompt:
            raise InvalidRequest(f"{field} has no tokens; send some text", param=field)
        if len(prompt) >= limit:
            # clients recognise this sentence and this code, and shorten their history
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, your prompt contains"
                f" {len(prompt)} input tokens, which leaves no room for output. Please reduce the length of the input.",
                param=field,
            )
        return limit - len(prompt)

    def _sampling(self, body: GenerationRequest, room: int, seed: int) -> Sampling:
        """`max_tokens` is cut to what fits, as vLLM does: clients often send their favourite number."""
        max_tokens = min(room, body.token_limit or room)
        stops = (*(body.stop_token_ids or ()), *(() if body.ignore_eos else self._settings.eos_token_ids))
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(body.min_tokens or 0, max_tokens),
            temperature=1.0 if body.temperature is None else float(body.temperature),
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else float(body.top_p),
            min_p=float(body.min_p or 0.0),
            repetition_penalty=float(body.repetition_penalty or 1.0),
            frequency_penalty=float(body.frequency_penalty or 0.0),
            presence_penalty=float(body.presence_penalty or 0.0),
            logit_bias=body.logit_bias,
            stop_token_ids=tuple(dict.fromkeys(stops)),
            seed=seed,
        )
