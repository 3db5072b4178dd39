"""Text to tokens: the tokenizer of a model directory and its chat template, without transformers.

Templates come with the model and are programs, so they run sandboxed; they render exactly what transformers'
`apply_chat_template` renders (the tests compare). Tokenizing a long prompt takes long, so it happens in a thread.
Special tokens are added once: by the tokenizer's post-processor to plain prompts, by the template to chats.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from cluster.errors import InvalidRequest, ModelError
from router.detokenizer import Detokenizer

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes HTML, which a prompt is not
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


class Text:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError when `template` is not valid jinja."""
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)  # name as templates know it -> text
        try:
            self._template = _compile(template) if template is not None else None
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the chat template is broken at line {error.lineno}: {error.message}") from None

    @classmethod
    def load(cls, model_directory: str | Path) -> Text:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja. Raises ModelError naming the bad file."""
        directory = Path(model_directory)
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for a missing and for a malformed file
            raise ModelError(f"cannot load {path}: {error}") from None
        config = _read_config(directory / "tokenizer_config.json")
        special_tokens = {name: text for name in SPECIAL_TOKENS if (text := _token_text(config.get(name)))}
        return cls(tokenizer, _read_template(directory, config), special_tokens)

    async def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a plain prompt, with the special tokens the tokenizer adds to one."""
        return await asyncio.to_thread(self._encode, text, True)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> tuple[int, ...]:
        """Tokens of a conversation, up to where the assistant's answer begins (or, without `answer`, up to where the
        next message would). Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return await asyncio.to_thread(lambda: self._encode(self.render(messages, answer), False))

    def render(self, messages: Sequence[Mapping[str, str]], answer: bool = True) -> str:
        """The conversation as one text. Raises InvalidRequest with the template's complaint."""
        assert self._template is not None
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            # what a template asserts (alternating roles, say) is about the messages; nothing else varies
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def detokenizer(self, stops: Sequence[str], min_tokens: int) -> Detokenizer:
        return Detokenizer(self.decode, stops, min_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return config


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The file wins over the configuration, which holds one template or a list of named ones."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as {"content": text, ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
