"""Rows of sampling on the device: logits are read once for a greedy token or a draw, and more often for filters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deploy.bench.cuda.rows import Call, Case, Row, sets
from kernels.sampling import key, sample_rows

LLAMA, VOCABULARIES = 128_256, (32_000, 151_936)  # tokens
BATCHES = (1, 64, 256)
MODES = {  # name -> temperature, top-k, top-p
    "greedy": (0.0, 0, 1.0),
    "temperature": (0.8, 0, 1.0),
    "top-k 50": (0.8, 50, 1.0),
    "top-p 0.9": (0.8, 0, 0.9),
    "top-k 50, top-p 0.9": (0.8, 50, 0.9),
}
CHECKED = 8  # rows
FILTERED_US = 25.0


def rows() -> list[Row]:
    shapes = [*((batch, LLAMA) for batch in BATCHES), *((64, vocabulary) for vocabulary in VOCABULARIES)]
    return [_row(batch, vocabulary, mode) for batch, vocabulary in shapes for mode in MODES]


def _row(batch: int, vocabulary: int, mode: str) -> Row:
    moved = 2.0 * batch * vocabulary
    return Row(
        kernel="sample",
        shape=f"{batch} x {vocabulary}, {mode}",
        moved=moved,
        flop=0.0,
        build=functools.partial(_build, batch, vocabulary, mode, sets(moved)),
        most_us=FILTERED_US if batch <= 64 else None,
    )


def _build(batch: int, vocabulary: int, mode: str, count: int) -> Case:
    temperature, top_k, top_p = MODES[mode]
    inputs = [torch.randn(batch, vocabulary, dtype=torch.bfloat16, device="cuda") * 3 for _ in range(count)]
    words = torch.tensor([key(1, position) for position in range(batch)], dtype=torch.int64)

    def settings(rows: int, device: str) -> tuple[Tensor, ...]:
        def full(value: float) -> Tensor:
            return torch.full((rows,), value, device=device)

        ks = torch.full((rows,), top_k, dtype=torch.int32, device=device)
        return full(temperature), ks, full(top_p), full(0.0), words[:rows].to(device)

    given = settings(batch, "cuda")

    def check() -> float:
        """Part of the rows whose token is not the CPU's."""
        rows = min(batch, CHECKED)
        found = sample_rows(inputs[0], *given)[:rows].cpu()
        wanted = sample_rows(inputs[0][:rows].cpu(), *settings(rows, "cpu"))
        return float((found != wanted).float().mean())

    def call(logits: Tensor) -> Call:
        return lambda: sample_rows(logits, *given)

    def sorts(logits: Tensor) -> Call:
        """A draw the usual way: sort, cumulate, mask, draw."""

        def draw() -> Tensor:
            ordered, ids = (logits.float() / temperature).sort(-1, descending=True)
            if top_k:
                ordered[:, top_k:] = -torch.inf
            shares = ordered.softmax(-1)
            shares[shares.cumsum(-1) - shares >= top_p] = 0.0
            noise = torch.empty_like(shares).exponential_()
            return ids.gather(-1, (shares / noise).argmax(-1, keepdim=True))

        return draw

    filtered = top_k > 0 or top_p < 1.0
    peers = {"torch, sorting": lambda: [sorts(each) for each in inputs]} if filtered else {}
    return Case([call(each) for each in inputs], check, 0.0, peers)
