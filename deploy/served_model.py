"""What a deployment serves, derived from its configuration and the model's files before anything is started.

Reads metadata and digests, no weights; starts nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cluster.config import Config
from cluster.errors import StartupError
from cluster.roofline import ModelShape
from deploy.hardware import Needs
from kvstore.hashing import ModelKey
from kvstore.layout import Layout
from workers.architecture import ITEMSIZE, Architecture, sizes
from workers.architecture import layout as model_layout
from workers.digest import weights_digest
from workers.shard import Sizes
from workers.sim import sim_layout, sim_sizes


def model_key(config: Config, directory: Path) -> ModelKey:
    """What block hashes are rooted in: two deployments share KV only when all of it is equal."""
    tokenizer = hashlib.sha256((directory / "tokenizer.json").read_bytes()).digest()
    weights = b"sim" if config.runner == "sim" else weights_digest(directory)
    dtype = f"{config.dtype}/{config.kv_dtype}" if config.kv_dtype else config.dtype
    return ModelKey(model=weights, tokenizer=tokenizer, dtype=dtype, block_size=config.block_size)


def block_layout(config: Config, architecture: Architecture) -> Layout:
    if config.runner == "sim":
        return sim_layout(config.block_size)
    return model_layout(architecture, config.dtype, config.block_size, config.kv_dtype)


def model_sizes(config: Config, architecture: Architecture) -> Sizes:
    """What of it shards divide."""
    if config.runner == "sim":
        return sim_sizes(sim_layout(config.block_size), architecture.vocab_size)
    return sizes(architecture)


def max_context(config: Config, architecture: Architecture) -> int:
    """Tokens per request. Raises StartupError when more was asked for than the model can."""
    if config.max_context > architecture.max_context:
        raise StartupError(
            f"max_context {config.max_context} is above the model's {architecture.max_context}; lower --max-context"
        )
    return config.max_context or architecture.max_context


def model_shape(architecture: Architecture, kv_bytes: int = 2) -> ModelShape:
    """As the performance model's prior wants it."""
    a = architecture
    return ModelShape(
        layers=a.num_layers,
        hidden=a.hidden_size,
        heads=a.num_heads,
        kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        mlp=a.intermediate_size,
        vocab=a.vocab_size,
        kv_bytes=kv_bytes,
    )


def gpu_needs(config: Config, architecture: Architecture, context: int) -> Needs | None:
    """What its shards need of GPUs. None: they compute on CPUs."""
    if config.runner != "cuda":
        return None
    return Needs(
        weights=model_shape(architecture).parameters * ITEMSIZE[config.dtype],
        kv_token=block_layout(config, architecture).token_bytes,
        kv_heads=architecture.num_kv_heads,
        context=context,
    )
