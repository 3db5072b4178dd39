"""Converted tokenizers split text exactly as llama.cpp does; the expected ids were recorded from llama.cpp itself."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cluster.errors import ModelError
from deploy.models import demo_file
from tests.workers.gguf_files import byte_vocabulary, sentence_piece_vocabulary
from workers.gguf_tokenizer import build_tokenizer, end_token_ids

CASES = json.loads(Path(__file__).with_name("tokenizer_goldens.json").read_text())["cases"]
TEXTS = [case["text"] for case in CASES]


@pytest.fixture(scope="module")
def smollm2_metadata() -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(demo_file()).fields.items()}


def differences(tokenizer: Tokenizer, golden: str) -> list[tuple[str, list[int], list[int]]]:
    """(text, our ids, llama.cpp's ids) wherever they differ."""
    ours = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    return [(case["text"], ids, case[golden]) for case, ids in zip(CASES, ours, strict=True) if ids != case[golden]]


def test_the_converted_demo_model_tokenizes_as_llama_cpp_does(smollm2: Path) -> None:
    assert differences(Tokenizer.from_file(str(smollm2 / "tokenizer.json")), "smollm") == []


def test_transformers_loads_the_same_tokenizer(smollm2: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(smollm2)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [case["smollm"] for case in CASES]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("pre", ["smollm", "default", "gpt-2", "llama-bpe", "qwen2"])
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(smollm2_metadata: dict[str, Any], pre: str) -> None:
    assert differences(build_tokenizer({**smollm2_metadata, "tokenizer.ggml.pre": pre}), pre) == []


@pytest.mark.parametrize(("golden", "prefix"), [("sentencepiece", True), ("sentencepiece-no-prefix", False)])
def test_sentencepiece_tokenizes_as_llama_cpp_does(golden: str, prefix: bool) -> None:
    vocabulary = sentence_piece_vocabulary(**{"tokenizer.ggml.add_space_prefix": prefix})
    assert differences(build_tokenizer(vocabulary), golden) == []


@pytest.mark.parametrize("kind", ["smollm", "sentencepiece"])
def test_text_survives_encoding_and_decoding(smollm2_metadata: dict[str, Any], kind: str) -> None:
    tokenizer = build_tokenizer(smollm2_metadata if kind == "smollm" else sentence_piece_vocabulary())
    # sentencepiece writes a space as U+2581 and cannot tell the two apart again; special tokens gain spaces around them
    lossless = [text for text in TEXTS if kind == "smollm" or not ("▁" in text or "<" in text)]
    decoded = [tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=kind != "smollm") for text in lossless]
    assert decoded == lossless


def test_the_beginning_of_sequence_is_added_once_and_only_where_asked() -> None:
    tokenizer = build_tokenizer(sentence_piece_vocabulary(**{"tokenizer.ggml.add_eos_token": True}))
    plain = tokenizer.encode("hello", add_special_tokens=False).ids
    assert tokenizer.encode("hello").ids == [1, *plain, 2]
    assert tokenizer.encode("").ids == [1, 2]
    assert build_tokenizer(byte_vocabulary()).encode("hello").ids[0] != 1
    assert build_tokenizer(byte_vocabulary(pre="llama-bpe")).encode("hello").ids[0] == 1
    unasked = {"tokenizer.ggml.add_bos_token": False}
    assert build_tokenizer(byte_vocabulary(pre="llama-bpe") | unasked).encode("hello").ids[0] != 1


def test_special_tokens_are_skipped_in_decoding_and_user_defined_ones_are_not() -> None:
    tokenizer = build_tokenizer(sentence_piece_vocabulary())
    assert tokenizer.decode(tokenizer.encode("hello<|tool|></s>").ids) == "hello<|tool|>"


def test_generation_ends_at_the_end_of_sequence_and_at_the_ends_of_turn(smollm2_metadata: dict[str, Any]) -> None:
    assert end_token_ids(smollm2_metadata) == [2, 0]  # <|im_end|>, then <|endoftext|>
    assert end_token_ids({**smollm2_metadata, "tokenizer.ggml.eot_token_id": 7}) == [2, 7, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5' is not supported"),
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken' is not supported"),
        ({"tokenizer.ggml.merges": ["h q"]}, "contradicts itself"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "lists a token twice"),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 10**6}, "names none"),
    ],
)
def test_what_cannot_be_right_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_tokenizer(byte_vocabulary() | changes)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("model", "None is not supported"), ("tokens", "carries no tokenizer"), ("merges", "lacks 'tokenizer")],
)
def test_what_is_missing_is_named(missing: str, message: str) -> None:
    vocabulary = byte_vocabulary()
    del vocabulary[f"tokenizer.ggml.{missing}"]
    with pytest.raises(ModelError, match=message):
        build_tokenizer(vocabulary)
