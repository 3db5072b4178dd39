"""What a router must know beyond the operator's knobs: facts about the model and the cluster it belongs to.

`cluster.config.Config` holds what people choose, this what the launcher found out. Frozen, complete at birth, and
plain values only, so that it can be sent to wherever a router replica starts. It reads no file and no environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.hashing import ModelKey


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """One model of one cluster, as a router needs to see it."""

    model_directory: str  # holds tokenizer.json, tokenizer_config.json and, perhaps, chat_template.jinja
    served_model_name: str
    namespace: str  # model fingerprint that workers register under
    cluster_secret: str = field(repr=False)  # authorises every internal call, and keys the block hashes
    redis_url: str = field(repr=False)  # may hold a password
    max_context: int  # tokens of prompt and output together
    vocab_size: int  # the model's: ids from 0 to this minus one are legal in prompts and biases
    eos_token_ids: tuple[int, ...]
    model_key: ModelKey  # what block hashes begin with
    store_namespaces: tuple[str, ...] = ()  # that block stores register under; empty: `namespace` alone
