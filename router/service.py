"""From a validated API request to the choices that answer it: lengths, token ids, sampling, salt, its turn.

What depends on the model is checked here: that the prompt fits, that token ids exist. A request waits for its turn
before it is tokenized, because refusing must be cheap when the server is busiest; until then its prompt's length is a
guess. Who is next is `router/gate.py`'s, and what became of a request is counted in `router/accounts.py`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from cluster import telemetry
from cluster.config import Config
from cluster.errors import ContextLengthExceeded, Forbidden, InvalidRequest, UnknownModel
from cluster.messages import Sampling
from cluster.telemetry import INVALID_SPAN, Span
from kvstore.hashing import salt, tenant_tag
from router import chains
from router.accounts import Account
from router.admission import MAX_WAIT_S, Limits
from router.choices import Choices, Plan
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.gate import Entering, Gate, GateSettings, Pass
from router.metrics import CANCELLED, Metrics
from router.openai import ChatRequest, CompletionRequest, GenerationRequest
from router.recorder import Recorder
from router.report import Reporter, Tally
from router.request import Request
from router.settings import RouterSettings
from router.tenant_metrics import GpuTime
from router.text import Text
from router.watch import Watch

SEED_MASK = 2**63 - 1
BYTES_PER_TOKEN = 4  # of text: the guess until it is tokenized, which the gate corrects by what came of earlier ones


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as `router/middleware.py` found out."""

    tenant: str
    operator: bool
    request_id: str
    span: Span = INVALID_SPAN  # where the request is traced


class Service:
    """The model this router serves. Start, use and close it in the loop that serves."""

    def __init__(
        self, config: Config, settings: RouterSettings, fleet: Fleet, metrics: Metrics, router_id: str
    ) -> None:
        """Raises ModelError when the model directory has no usable tokenizer."""
        self._config = config
        self._settings = settings
        self._metrics = metrics
        self.text = Text.load(settings.model_directory)
        self._dispatcher = Dispatcher(fleet, config.request_timeout)
        self.watch = Watch(self._dispatcher.serve, config.ttft_slo, config.itl_slo)
        limits = Limits(config.max_queue, min(config.request_timeout, MAX_WAIT_S))
        from_zero = config.budget[0] == 0  # a controller starts a worker when something waits for one
        self._gate = Gate(fleet, GateSettings(limits, config.max_sequences, config.request_timeout, from_zero), metrics)
        self.queue = self._gate.queue
        self._tally = Tally()
        self._recorder = Recorder(config.trace, router_id, config.block_size) if config.trace else None
        self._gpu_time = GpuTime(settings.served_model_name, fleet.links, metrics.tenants)
        self._reporter: Reporter | None = None
        if settings.redis_url:
            self._reporter = Reporter(settings.redis_url, settings.namespace, router_id, self._tally, self._gate)

    async def start(self) -> None:
        for part in (self._gate, self._gpu_time, self._recorder, self._reporter):
            if part is not None:
                await part.start()

    async def close(self) -> None:
        for part in (self._gate, self._dispatcher, self._gpu_time, self._recorder, self._reporter):
            if part is not None:
                await part.close()

    async def chat(self, body: ChatRequest, caller: Caller) -> Choices:
        """Returns when it is the request's turn. Raises what `Gate.enter` does, and InvalidRequest."""
        arrival_s = time.monotonic()
        estimate = _guess(message.content or "" for message in body.messages)
        async with self._turn(body, caller, estimate, body.choices) as passage:
            prompt = await self.text.encode_chat([message.for_template() for message in body.messages])
            return await self._choices(body, [(prompt, "")], "messages", caller, passage, arrival_s)

    async def completion(self, body: CompletionRequest, caller: Caller) -> Choices:
        """As `chat`."""
        arrival_s = time.monotonic()
        for prompt in body.prompt:
            if not isinstance(prompt, str):
                self._check_ids(prompt, "prompt")
        texts = _guess(prompt for prompt in body.prompt if isinstance(prompt, str))
        estimate = texts + sum(len(prompt) for prompt in body.prompt if not isinstance(prompt, str))
        async with self._turn(body, caller, estimate, len(body.prompt) * body.choices) as passage:
            prompts = []
            for prompt in body.prompt:
                if isinstance(prompt, str):
                    tokens, text = await self.text.encode(prompt), prompt
                else:
                    tokens, text = tuple(prompt), self.text.decode(prompt) if body.echo else ""
                prompts.append((tokens, text if body.echo else ""))
            return await self._choices(body, prompts, "prompt", caller, passage, arrival_s)

    @asynccontextmanager
    async def _turn(
        self, body: GenerationRequest, caller: Caller, estimate: int, sequences: int
    ) -> AsyncIterator[Pass]:
        """Checks what needs no tokens, then waits. Inside, choices are made; if none are, nothing went to a worker."""
        if body.model not in (None, self._settings.served_model_name):
            raise UnknownModel(
                f"the model {body.model[:100]!r} does not exist; this server serves"
                f" {self._settings.served_model_name!r}",
                param="model",
            )
        self._check_ids([token for token, _ in body.logit_bias], "logit_bias")
        self._check_ids(body.stop_token_ids or (), "stop_token_ids")
        if body.exact_kv and self._config.kv_dtype:
            raise InvalidRequest(
                f"all KV of this server is approximate (kv_quantization {self._config.kv_quantization}); leave "
                "exact_kv out, or ask a server without it",
                param="exact_kv",
            )
        priority = body.priority or 0
        if priority < 0 and not caller.operator:
            raise Forbidden(
                "a priority below 0 needs the operator key as x-tandem-operator-key; send 0 or more", param="priority"
            )
        ttft_s = None if body.ttft_deadline_ms is None else body.ttft_deadline_ms / 1000
        entering = Entering(secrets.token_hex(8), caller.tenant, priority, estimate, sequences, ttft_s)
        passage = None
        try:
            with telemetry.span("queue", caller.span, {"tandem.priority": priority, "tandem.estimate": estimate}):
                passage = await self._gate.enter(entering)
            yield passage
        except BaseException as error:
            if passage is not None:
                passage.withdraw()
            if not isinstance(error, Exception):
                self._metrics.ended(CANCELLED)  # errors are counted where they are answered
            raise

    def _check_ids(self, tokens: Sequence[int], field: str) -> None:
        if tokens and (min(tokens) < 0 or max(tokens) >= self._settings.vocab_size):
            raise InvalidRequest(
                f"{field} holds a token id outside the vocabulary of {self._settings.vocab_size}", param=field
            )

    async def _choices(
        self,
        body: GenerationRequest,
        prompts: Sequence[tuple[tuple[int, ...], str]],
        field: str,
        caller: Caller,
        passage: Pass,
        arrival_s: float,
    ) -> Choices:
        """One plan per prompt and choice, the choices of a prompt next to each other as OpenAI numbers them."""
        secret = self._settings.cluster_secret
        hash_salt, tag = salt(secret, caller.tenant, body.cache_salt or ""), tenant_tag(secret, caller.tenant)
        exact = self._config.kv_quantization != "int8" or bool(body.exact_kv)
        seed = body.seed if body.seed is not None else secrets.randbits(63)
        unique = f"{caller.request_id}-{secrets.token_hex(4)}"  # a client may send the same request id twice
        plans: list[Plan] = []
        for number, (tokens, echo) in enumerate(prompts):
            room = self._room(tokens, field)
            hashes = await chains.hashes(self._settings.model_key, tokens, hash_salt, exact)
            for choice in range(body.choices):
                sampling = self._sampling(body, room, (seed + choice) & SEED_MASK)
                name = f"{unique}-{len(plans)}"
                request = Request(name, tokens, sampling, hash_salt, tag, exact, hashes, [], [], arrival_s, caller.span)
                plans.append(Plan(request, self.text.detokenizer(body.stop, sampling.min_tokens), number, echo))
        passage.watch(plan.request.decisions for plan in plans)
        account = Account(self.watch.serve, passage, arrival_s, self._tally, self._recorder)
        return Choices(plans, account.serve, self._metrics, arrival_s, bool(body.return_token_ids))

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


def _guess(texts: Iterable[str]) -> int:
    """Tokens."""
    return 1 + sum(len(text.encode(errors="replace")) for text in texts) // BYTES_PER_TOKEN
