"""Small random models of every family, written by transformers, and a driver that runs them as an engine would."""

import random
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cluster.messages import Generation, Sampling
from kernels.quantization import dequantize, quantize
from kvstore.layout import Layout
from workers.model_runner import ModelRunner
from workers.runner import Chunk
from workers.sequence import Sequence

VOCAB = 199
BLOCK = 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-biased": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "num_key_value_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    },
    "llama-multi-head": {"model_type": "llama", "num_key_value_heads": 6, "num_hidden_layers": 2},
    "llama-linear": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "llama-dynamic": {
        "model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN},
    "llama-yarn-mscale": {
        "model_type": "llama", "rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 11},
    "mistral-whole": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3"},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
}  # fmt: skip


def build(name: str, directory: Path, **changes: Any) -> Any:
    """Write the model to the directory and return it, in fp32. All parameters are random, biases and norms too."""
    settings = {**SIZES, **MODELS[name], **changes}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    torch.manual_seed(sum(map(ord, name)))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.2)
    model.save_pretrained(directory)
    return model


def load(directory: Path, dtype: str = "float32", blocks: int = 96, block_size: int = BLOCK) -> ModelRunner:
    """A runner whose whole cache is NaN, so that reading a slot nobody wrote shows."""
    probe = ModelRunner.load(directory, dtype, block_size, 2**26, 0)
    runner = ModelRunner.load(directory, dtype, block_size, blocks * probe.layout.block_bytes, 0)
    for index in range(runner.num_blocks):
        runner.block(index)[:] = 0xFF
    return runner


def sequence(name: str, prompt: list[int], blocks: list[int], sampling: Sampling) -> Sequence:
    generation = Generation(name, tuple(prompt), (), sampling, b"", 0)
    made = Sequence(generation, "router", b"", 0.0)
    made.block_table = blocks
    return made


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(token) for token in rng.integers(3, VOCAB, length)] for length in lengths]


class Computes(Protocol):
    """What `generate` drives."""

    layout: Layout
    num_blocks: int

    def run(self, chunks: list[Chunk]) -> list[int | None]: ...


def generate(
    runner: Computes,
    given: list[list[int]],
    new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    largest_chunk: int = 7,
) -> list[list[int]]:
    """New tokens per prompt, computed in random chunks, random batches and shuffled blocks."""
    rng = random.Random(seed)
    free = list(range(runner.num_blocks))
    rng.shuffle(free)
    sequences = []
    for index, prompt in enumerate(given):
        need = -(-(len(prompt) + new_tokens) // runner.layout.tokens)
        sequences.append(sequence(str(index), prompt, [free.pop() for _ in range(need)], sampling))
    while unfinished := [s for s in sequences if s.new_tokens < new_tokens]:
        batch = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        chunks = [Chunk(s, s.computed, rng.randint(1, min(s.gap, largest_chunk))) for s in batch]
        for chunk, token in zip(chunks, runner.run(chunks), strict=True):
            assert (token is not None) == chunk.samples
            chunk.sequence.computed += chunk.take
            if token is not None:
                chunk.sequence.tokens.append(token)
    return [s.tokens[s.prompt_length :] for s in sequences]


class EightBits(DynamicCache):
    """Of transformers: keys and values as they come back from 8 bits, those of the tokens being computed included."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.eight_bits = dtype

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, values = (dequantize(*quantize(x, self.eight_bits), x.dtype) for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)


def reference(model: Any, prompt: list[int], new_tokens: int, kv_dtype: str = "") -> list[int]:
    """What transformers generates greedily, with KV of another dtype where one is named; it does not stop at the
    end-of-sequence token."""
    ids = torch.tensor([prompt])
    cache = {"past_key_values": EightBits(getattr(torch, kv_dtype))} if kv_dtype else {}
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            **cache,
        )
    return [int(token) for token in out[0, len(prompt) :]]
