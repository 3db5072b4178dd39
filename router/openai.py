"""What clients may send: the bodies of /v1/chat/completions and /v1/completions, checked strictly.

Three kinds of fields: those below are obeyed; those in `UNSUPPORTED` mean something this server does not do, so asking
for them is an error that names the field (silence would be a lie); all others are accepted and reported back in the
`x-ignored-fields` header. Nothing here knows the model: lengths and token ids are checked in `router/service.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from cluster.errors import InvalidRequest

MAX_CHOICES = 256  # prompts x n: each is a generation of its own
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1_000  # every new piece of text is compared with every stop string
MAX_BIASES = 1_024
MAX_TOKENS = 2**31 - 1
MAX_PRIORITY = 100
MAX_DEADLINE_MS = 3_600_000

# field -> values that ask for nothing and are therefore accepted; None always is
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),  # a field of completions only
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
_CONTROL = re.compile(r"[^\x20-\x7e]")


def _refuse_unsupported(fields: dict[str, Any], prefix: str = "") -> None:
    for name, value in fields.items():
        harmless = UNSUPPORTED.get(name)
        if harmless is None or value is None:
            continue
        # 0 == False in Python, but `logprobs: 0` asks for something and `logprobs: false` does not
        if not any(type(value) is type(ok) and value == ok for ok in harmless):
            raise InvalidRequest(f"{prefix}{name} is not supported by this server; leave it out", param=prefix + name)


def _prompts(value: Any) -> list[str | list[int]]:
    """The four shapes of `prompt`, as a list. By hand: a union would build an error per token of a long list."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not all(_is_prompt(item) for item in value):
        raise InvalidRequest(
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
            param="prompt",
        )
    if not value or not all(value):
        raise InvalidRequest("prompt must not be empty", param="prompt")
    return value


def _is_prompt(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, list) and all(type(token) is int for token in item))


def _content(value: Any) -> str | None:
    """The text of a message; several text parts become lines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest("content must be a string or a list of text parts", param="messages")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise InvalidRequest(f"content of type {kind[:40]!r} is not supported; send text only", param="messages")
        if kind is None or not isinstance(part.get("text"), str):
            raise InvalidRequest('a content part must be {"type": "text", "text": "..."}', param="messages")
    return "\n".join(part["text"] for part in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters", param="stop"
        )
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise InvalidRequest(
            f"logit_bias must map at most {MAX_BIASES} token ids to numbers from -100 to 100", param="logit_bias"
        )
    for token, bias in value.items():
        if not re.fullmatch(r"[0-9]{1,9}", token):
            raise InvalidRequest("a key of logit_bias is not a token id", param="logit_bias")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InvalidRequest("a value of logit_bias is not a number from -100 to 100", param="logit_bias")
    return tuple(sorted((int(token), float(bias)) for token, bias in value.items()))


_STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_TOKENS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {"anyOf": [*_STRING_OR_STRINGS["anyOf"][:2], _TOKENS, {"type": "array", "items": _TOKENS}]}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_BIAS = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, PlainValidator(_content), WithJsonSchema(_CONTENT)] = None
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        extra = self.model_extra or {}
        if any(extra.get(name) for name in ("tool_calls", "function_call", "audio")):
            raise InvalidRequest("tool calls and audio in messages are not supported; send text only", param="messages")
        if self.content is None:
            raise InvalidRequest(f"a {self.role} message needs content", param="messages")
        return self

    def for_template(self) -> dict[str, str]:
        """What a chat template sees. Templates know `system`; OpenAI renamed it `developer`."""
        role = "system" if self.role == "developer" else self.role
        fields = {"role": role, "content": self.content, "name": self.name, "tool_call_id": self.tool_call_id}
        return {name: value for name, value in fields.items() if value is not None}


class GenerationRequest(BaseModel):
    """The fields that both endpoints share; null means the default, as OpenAI's clients expect."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKENS, description="0 or -1 keeps all tokens")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=16)
    best_of: int | None = Field(None, ge=1, le=16)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(_STRING_OR_STRINGS)] = ()
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases), WithJsonSchema(_BIAS)] = ()
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = Field(None, description="the new tokens' ids too, as `token_ids` of each choice")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=128, description="keeps this prompt's cache apart")
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="lower is earlier; below 0 is for operators"
    )
    ttft_deadline_ms: float | None = Field(
        None, gt=0, le=MAX_DEADLINE_MS, description="refuse the request when its first token would come later"
    )
    exact_kv: bool | None = Field(
        None, description="use no KV that was kept in 8 bits; refused where all of it is, without effect where none is"
    )
    user: Any = None  # this and the next three: accepted as OpenAI defines them, without effect
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _check(self) -> GenerationRequest:
        _refuse_unsupported(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequest("best_of must equal n; choosing among more is not supported", param="best_of")
        limit = self.token_limit
        if self.min_tokens and limit is not None and self.min_tokens > limit:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, above max_tokens {limit}", param="min_tokens")
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """New tokens asked for; None: whatever the context has room for."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ignored_fields(self) -> str:
        """Names of the fields nobody here knows, fit for a header."""
        names = (name for name in self.model_extra or {} if name not in UNSUPPORTED)
        return _CONTROL.sub("?", ", ".join(sorted(name[:64] for name in names)))[:1_024]


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="wins over max_tokens")

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationRequest):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_choices(self) -> CompletionRequest:
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise InvalidRequest(f"one request may ask for at most {MAX_CHOICES} choices (prompts x n)", param="prompt")
        return self

    @property
    def token_limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens
