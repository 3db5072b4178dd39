"""Which blocks an operator means: by prompt, by chat, by hash, or all of them.

A prompt has other blocks for every tenant, so one that names no tenant stands for all of them. Only full blocks have
names; what a chat's template adds in front of the answer is left out, since a longer chat continues otherwise there.
"""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config import Config
from cluster.errors import InvalidRequest
from kvstore.hashing import HASH_BYTES, extend, salt, tenant_tag
from router.openai import Message
from router.settings import RouterSettings
from router.text import Text

MAX_SELECTED = 262_144  # blocks per request: 8 MiB of hashes


class Selection(BaseModel):
    """Exactly one of `prompt`, `messages` and `hashes`; the other fields say whose prompt it is."""

    WAYS: ClassVar[tuple[str, ...]] = ("prompt", "messages", "hashes")
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | list[int] | None = Field(None, description="text, or token ids")
    messages: list[Message] | None = Field(None, min_length=1, description="the beginning of a chat")
    hashes: list[str] | None = Field(None, min_length=1, max_length=MAX_SELECTED, description="of blocks, in hex")
    cache_salt: str | None = Field(None, min_length=1, max_length=128, description="as the prompt's requests have it")
    tenant: str | None = Field(None, description="as GET /kv shows it; without one: every tenant")

    @model_validator(mode="after")
    def _check(self) -> Selection:
        if sum(getattr(self, way) not in (None, False) for way in self.WAYS) != 1:
            raise InvalidRequest(f"say which blocks in exactly one of these ways: {', '.join(self.WAYS)}")
        return self


class DropSelection(Selection):
    WAYS: ClassVar[tuple[str, ...]] = (*Selection.WAYS, "all")

    all: bool = Field(False, description="every block of every store")


class Chains:
    """Hashes of the blocks of prompts, as the workers compute them."""

    def __init__(self, config: Config, settings: RouterSettings, text: Text) -> None:
        self._settings = settings
        self._text = text
        key = settings.model_key
        self._keys = [key, key.approximate] if config.kv_quantization == "int8" else [key]
        # as router/middleware.py names them; without keys there is one tenant, the empty one
        names = [hashlib.sha256(key.encode()).hexdigest() for key in config.api_keys] or [""]
        self.tenants = {tenant_tag(settings.cluster_secret, name): name for name in names}  # tag -> tenant

    async def hashes(self, selection: Selection) -> list[bytes]:
        """Raises InvalidRequest when the selection names no block."""
        if selection.hashes is not None:
            return [_hash(text) for text in selection.hashes]
        if selection.tenant is not None and selection.tenant not in self.tenants:
            raise InvalidRequest("there is no such tenant; GET /kv lists them", param="tenant")
        tokens, size = await self._tokens(selection), self._settings.model_key.block_size
        tenants = [self.tenants[selection.tenant]] if selection.tenant is not None else list(self.tenants.values())
        if not len(tokens) // size:
            raise InvalidRequest(f"these are {len(tokens)} tokens, less than one block of {size}")
        if len(tokens) // size * len(tenants) * len(self._keys) > MAX_SELECTED:
            raise InvalidRequest(f"these are more than {MAX_SELECTED} blocks; name one tenant", param="tenant")
        found: list[bytes] = []
        for tenant in tenants:
            tenant_salt = salt(self._settings.cluster_secret, tenant, selection.cache_salt or "")
            kinds: list[list[bytes]] = []
            for key in self._keys:
                kinds.append([])
                extend(kinds[-1], key.root(tenant_salt), tokens, size)
            # in turn: a store takes few pins, and the beginning of a chain is worth most
            found += chain.from_iterable(zip(*kinds, strict=True))
        return found

    async def _tokens(self, selection: Selection) -> tuple[int, ...]:
        if selection.messages is not None:
            messages = [message.for_template() for message in selection.messages]
            return await self._text.encode_chat(messages, answer=False)
        if isinstance(selection.prompt, str):
            return await self._text.encode(selection.prompt)
        tokens = tuple(selection.prompt or ())
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._settings.vocab_size:
            raise InvalidRequest(
                f"prompt holds a token id outside the vocabulary of {self._settings.vocab_size}", param="prompt"
            )
        return tokens


def _hash(text: str) -> bytes:
    name = hex_prefix(text, "hashes")
    if len(name) != HASH_BYTES:
        raise InvalidRequest(
            f"a hash has {2 * HASH_BYTES} hexadecimal digits; `tandem kv ls` shows them", param="hashes"
        )
    return name


def hex_prefix(text: str, field: str) -> bytes:
    """The bytes that hexadecimal digits stand for. Raises InvalidRequest naming the field."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidRequest(f"{field} must be an even number of hexadecimal digits", param=field) from None
