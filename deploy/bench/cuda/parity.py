"""Rows that are right or wrong: greedy tokens of the engine on the GPU, against its own CPU path and transformers.

One random model of four layers, written as a checkpoint. In fp32 the tokens must be the CPU's. In bfloat16 a sequence's
first token that is not transformers' own must be one whose logit, by transformers in fp32, is within GAP of the best,
or within what bfloat16 does to transformers' own logits there: two logits may move towards each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.messages import Generation, Sampling
from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.rows import Answer
from workers.runner import Chunk, Stage
from workers.sequence import Sequence as Tokens

GAP = 1e-2
BLOCK_SIZE = 16
PROMPTS = (1, 15, 16, 17, 200, 600)  # tokens
NEW = 48
CHUNK = 256  # tokens of a prefill
MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,  # larger ones make networks that amplify bfloat16's rounding
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Parity:
    name: str
    compare: Callable[[Path], Answer]
    moved: float = 0.0
    flop: float = 0.0

    def compile(self) -> None:
        """Its kernels are those of the other rows, in another dtype: the compile suite has them."""

    def run(self, limits: Limits) -> Answer:
        with tempfile.TemporaryDirectory(prefix="tandem-parity-") as folder:
            checkpoint(Path(folder))
            return self.compare(Path(folder))


def rows() -> Sequence[Parity]:
    return [
        Parity("parity: fp32, engine on the GPU and on the CPU", _against_cpu),
        Parity("parity: bfloat16, engine on the GPU and transformers", _against_transformers),
    ]


def checkpoint(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(directory)


def generate(runner: Stage, new: int = NEW) -> list[list[int]]:
    """Greedy continuations of prompts that are the same every time, all in one batch once they are prefilled."""
    random = torch.Generator().manual_seed(1)
    sequences, block = [], 0
    for length in PROMPTS:
        prompt = torch.randint(0, MODEL["vocab_size"], (length,), generator=random).tolist()
        sampling = Sampling(max_tokens=new, temperature=0.0)
        sequence = Tokens(Generation(str(length), tuple(prompt), (), sampling, b"", 0), "", b"", 0.0)
        blocks = -(-(length + new) // BLOCK_SIZE)
        sequence.block_table = list(range(block, block + blocks))
        block += blocks
        sequences.append(sequence)
    for sequence, length in zip(sequences, PROMPTS, strict=True):
        for first in range(0, length, CHUNK):
            _append(runner, [Chunk(sequence, first, min(CHUNK, length - first))])
    for _ in range(new - 1):
        _append(runner, [Chunk(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences])
    return [list(sequence.tokens) for sequence in sequences]


def _append(runner: Stage, chunks: list[Chunk]) -> None:
    for chunk, token in zip(chunks, runner.run(chunks), strict=True):
        if token is not None:
            chunk.sequence.tokens.append(token)


def _gpu(directory: Path, dtype: str) -> Stage:
    from workers.gpu_profile import Limits
    from workers.gpu_runner import GpuRunner

    limits = Limits(token_budget=512, max_sequences=len(PROMPTS), max_context=1024)
    return GpuRunner.load(directory, dtype, BLOCK_SIZE, 2**30, limits)


def _against_cpu(directory: Path) -> Answer:
    from workers.model_runner import ModelRunner

    ours = generate(_gpu(directory, "float32"))
    cpu = generate(ModelRunner.load(directory, "float32", BLOCK_SIZE, 2**30, 1024))
    same = sum(a == b for a, b in zip(ours, cpu, strict=True))
    detail = f"{same} of {len(ours)} sequences of {NEW} tokens are the same"
    return {"verdict": "met" if same == len(ours) else "missed", "detail": detail}


def _against_transformers(directory: Path) -> Answer:
    """Our tokens, judged at each position by what transformers, fed with them, would have chosen."""
    from transformers import AutoModelForCausalLM

    ours = generate(_gpu(directory, "bfloat16"))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.to("cuda").eval()
    theirs = [_logits(model, tokens, length) for tokens, length in zip(ours, PROMPTS, strict=True)]
    model = model.float()
    exact = [_logits(model, tokens, length) for tokens, length in zip(ours, PROMPTS, strict=True)]
    gaps, rounding = [], []
    for tokens, length, rounded, wanted in zip(ours, PROMPTS, theirs, exact, strict=True):
        chosen = torch.tensor(tokens[length:], device=rounded.device)
        diverged = (rounded.argmax(-1) != chosen).nonzero()
        if len(diverged):
            at = int(diverged[0])
            gaps.append(float(wanted[at].max() - wanted[at, chosen[at]]))
            rounding.append(float((rounded[at] - wanted[at]).abs().max()))
    explained = all(gap <= max(GAP, 2 * own) for gap, own in zip(gaps, rounding, strict=True))
    detail = (
        f"{len(gaps)} of {len(ours)} sequences diverge, first where logits are {_shown(gaps)} apart, "
        f"which bfloat16 moves by {_shown(rounding)} in transformers itself"
    )
    return {"verdict": "met" if explained else "missed", "detail": detail}


def _logits(model: Any, tokens: Sequence[int], prompt: int) -> Tensor:  # [new, V] fp32
    found: Tensor = model(torch.tensor([tokens], device=model.device)).logits[0, prompt - 1 : -1].float()
    return found


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values) or "nothing"
