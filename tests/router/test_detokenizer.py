from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.detokenizer import INCOMPLETE, MAX_PENDING, Detokenizer
from router.text import Text
from tests.router.fakes import VOCAB

TEXTS = st.lists(
    st.sampled_from(
        ["a", " the", "é", "e\u0301", "你好", "🙂", "👩‍👩‍👧", "🇫🇷", "\u0915\u094d\u0937", "\n\n", "�", "\x00", "stop"]
    )
    | st.text(max_size=8).filter(lambda text: text.encode(errors="ignore").decode() == text),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def text(model_directory: Path) -> Text:
    return Text.load(model_directory)


def pieces(detokenizer: Detokenizer, tokens: list[int], per_feed: int) -> list[str]:
    parts = [detokenizer.feed(tokens[at : at + per_feed]) for at in range(0, len(tokens), per_feed)]
    return [*parts, detokenizer.flush()]


@given(content=TEXTS, per_feed=st.integers(1, 5))
def test_the_pieces_join_to_one_decode(tokenizer: Tokenizer, text: Text, content: str, per_feed: int) -> None:
    tokens = tokenizer.encode(content, add_special_tokens=False).ids
    parts = pieces(text.detokenizer([], 0), tokens, per_feed)
    assert "".join(parts) == content == text.decode(tokens)


@given(tokens=st.lists(st.integers(0, VOCAB - 1), max_size=60), per_feed=st.integers(1, 4))
def test_so_do_those_of_random_tokens(text: Text, tokens: list[int], per_feed: int) -> None:
    parts = pieces(text.detokenizer([], 0), tokens, per_feed)
    assert "".join(parts) == text.decode(tokens)


@given(content=st.text(alphabet="é你🙂\u0301", max_size=10))
def test_no_piece_ends_in_half_a_character(tokenizer: Tokenizer, text: Text, content: str) -> None:
    detokenizer = text.detokenizer([], 0)
    for token in tokenizer.encode(content, add_special_tokens=False).ids:
        assert INCOMPLETE not in detokenizer.feed([token])
    assert detokenizer.flush() == ""


@given(
    content=TEXTS,
    stops=st.lists(st.sampled_from(["stop", "op", "a t", "🙂", "好", "\n"]), min_size=1),
    size=st.integers(1, 4),
)
@settings(max_examples=200)
def test_stop_strings_cut_the_text(tokenizer: Tokenizer, text: Text, content: str, stops: list[str], size: int) -> None:
    detokenizer = text.detokenizer(stops, 0)
    joined = "".join(pieces(detokenizer, tokenizer.encode(content, add_special_tokens=False).ids, size))
    # what one token at a time sees first decides; cutting the whole text may choose an earlier start of a longer stop
    assert content.startswith(joined)
    assert detokenizer.stopped == any(stop in content for stop in stops)
    assert not any(stop in joined for stop in stops)
    if detokenizer.stopped:
        assert any(content[len(joined) :].startswith(stop) for stop in stops)
    else:
        assert joined == content


def test_text_that_may_become_a_stop_string_is_held(text: Text, tokenizer: Tokenizer) -> None:
    detokenizer = text.detokenizer(["</end>"], 0)
    for character in "x</en":
        detokenizer.feed(tokenizer.encode(character, add_special_tokens=False).ids)
    assert detokenizer.feed(tokenizer.encode("!", add_special_tokens=False).ids) == "</en!"


def test_nothing_after_a_stop_string_is_consumed(text: Text, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.encode(character, add_special_tokens=False).ids[0] for character in "ab#cd"]
    detokenizer = text.detokenizer(["#"], 0)
    assert detokenizer.feed(tokens) == "ab"
    assert detokenizer.stopped
    assert detokenizer.tokens == 3
    assert detokenizer.feed(tokens) == detokenizer.flush() == ""


def test_stop_strings_wait_for_min_tokens(text: Text, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.encode(character, add_special_tokens=False).ids[0] for character in "#a#b"]
    detokenizer = text.detokenizer(["#"], 2)
    assert detokenizer.feed(tokens) == "#a"
    assert detokenizer.tokens == 3


def test_bytes_that_never_become_a_character_do_not_pile_up(text: Text, tokenizer: Tokenizer) -> None:
    byte = next(token for token in range(VOCAB) if text.decode([token]) == INCOMPLETE)
    count = 0

    def decode(tokens: object) -> str:
        nonlocal count
        assert isinstance(tokens, list)
        count = max(count, len(tokens))
        return text.decode(tokens)

    detokenizer = Detokenizer(decode, [], 0)
    parts = pieces(detokenizer, [byte] * 1000, 1)
    assert "".join(parts) == text.decode([byte] * 1000)
    assert count <= 2 * MAX_PENDING


def test_special_tokens_are_silent_and_do_not_pile_up(text: Text, tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("hello", add_special_tokens=False).ids
    detokenizer = text.detokenizer([], 0)
    assert "".join(pieces(detokenizer, [*word, *[1] * 500, *word], 1)) == "hellohello"


def test_a_decoder_that_strips_the_first_space() -> None:
    """The Llama kind of decoder gives a token other text at the beginning than in the middle."""
    vocabulary = {"<unk>": 0, "▁": 1, "▁a": 2, "b": 3, "<0xF0>": 4, "<0x9F>": 5, "<0x99>": 6, "<0x82>": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    for tokens in ([2, 2, 3], [1, 2, 3, 1, 1, 2], [2, 4, 5, 6, 7, 2], [1, 1, 1, 3]):
        detokenizer = Detokenizer(lambda ids: str(tokenizer.decode(list(ids))), [], 0)
        assert "".join(pieces(detokenizer, tokens, 1)) == tokenizer.decode(tokens)
