"""What the tokens must be: transformers' greedy `generate` on the same fp32 weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

ENGLISH = (
    "The lighthouse keeper climbed the spiral stairs every evening before sunset, carrying a small brass lamp and a "
    "notebook in which he wrote the names of all the ships that had passed since the morning. "
)
MIXED = "In 1969, 3 astronauts flew 384400 km; 月に着陸したのは2人でした。C'était magnifique 🚀👩‍🚀! "
CODE = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# (text, tokens): the text is repeated and cut to exactly that many tokens; None keeps it whole
PROMPTS: list[tuple[str, int | None]] = [
    ("Once", 1),
    ("Once upon", 2),
    ("The capital of France is", None),
    ("1234567890 + 9876543210 =", None),
    ("东京是日本的首都，", None),
    ("I ❤️ pizza 🍕 and 👨‍👩‍👧‍👦 time: ", None),
    (CODE + "def factorial(n):\n", None),
    (CHAT.format("What is the capital of France?"), None),
    (CHAT.format("Count from 1 to 10."), None),
    (CHAT.format("Translate to English: 你好，世界。"), None),
    (CHAT.format("Write a haiku about rain 🌧️."), None),
    (ENGLISH, 15),
    (ENGLISH, 16),
    (ENGLISH, 17),
    (MIXED, 64),
    (CODE, 129),
    (ENGLISH, 512),
    (MIXED, 513),
    (ENGLISH + CODE, 1000),
    (CODE + ENGLISH + MIXED, 2001),
]


def prompts(model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    result = []
    for text, length in PROMPTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if length is not None:
            ids = (ids * (length // len(ids) + 1))[:length]
        result.append(ids)
    return result


@cache
def _model(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # generate() would take it from here when the caller gives none
    return model


@cache
def greedy(directory: Path, prompt: tuple[int, ...], new: int) -> list[int]:
    """`new` tokens whatever they are: no end-of-sequence token ends them."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = _model(directory).generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert output.shape[1] == len(prompt) + new
    return output[0, len(prompt) :].tolist()
