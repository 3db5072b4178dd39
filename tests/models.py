"""A complete small model directory for tests that serve: random Llama weights, a tokenizer, a chat template.

Small enough to load in a second, sharp enough that greedy decoding has one answer: the two best logits of a step lie
far apart, so that a different order of summation cannot change a token. It knows nothing; its text is noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512
BEGIN, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
BEGIN_ID, END_ID = 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = """
The capital of France is Paris. The capital of Italy is Rome. What is the capital of Spain? It is Madrid.
You are a helpful assistant. The user asks a question and the assistant answers it in one or two sentences.
In the beginning there was a request; the request was split into tokens, and the tokens were kept in blocks.
Prefill reads the whole prompt at once and is bound by arithmetic; decode reads the whole model for every token.
def add(first: int, second: int) -> int:
    return first + second
Once upon a time a small lighthouse stood on a rock far out at sea, and its keeper counted every passing ship.
The quick brown fox jumps over the lazy dog while seven wizards quietly mix jugs of very bright purple liquid.
"""


def tiny_model(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write the model and return the directory. `overrides` are fields of transformers' LlamaConfig."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "pad_token_id": END_ID,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    _tokenizer().save(str(directory / "tokenizer.json"))
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END_OF_TEXT, "pad_token": END}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.max_position_embeddings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | special, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def _tokenizer() -> Tokenizer:
    """Byte-level BPE with exactly VOCAB_SIZE tokens; every byte is one of them, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in (END_OF_TEXT, BEGIN, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "TEXT is too short to learn that many merges"
    return tokenizer
