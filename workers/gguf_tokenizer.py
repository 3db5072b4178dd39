"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library so that it splits text as llama.cpp does.

Two kinds exist: "gpt2" (byte-level BPE; how text is cut before merging is named by `tokenizer.ggml.pre`, which
transformers' own GGUF loader ignores) and "llama" (SentencePiece BPE with byte fallback). Anything else is refused by
name: a tokenizer that is almost right gives answers that are almost right. Works on metadata alone; reads no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from cluster.errors import ModelError

Metadata = Mapping[str, Any]  # GGUF key -> str, int, float, bool or list of them

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# Texts that end a turn or a document: the file names one end-of-sequence id, chat models stop at several.
END_TEXTS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
)  # fmt: skip

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The published patterns say (?i:'s|...), which also folds U+017F onto s; spelled out, it does not.
_CASELESS = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_NEWLINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASELESS + r"\p{N}{1,3}" + _NEWLINES
_QWEN2 = _CASELESS + r"\p{N}" + _NEWLINES

# tokenizer.ggml.pre -> patterns applied one after the other, each cutting what the ones before it left
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # these take a whole word that is a token without merging


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Raises ModelError for a tokenizer this file does not know or that contradicts itself."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported, only gpt2 and llama are; use the original model")
    tokens = _tokens(metadata)
    try:
        tokenizer = _byte_level(metadata, tokens) if kind == "gpt2" else _sentence_piece(metadata, tokens)
    except KeyError as error:
        raise ModelError(f"the GGUF file lacks {error}; download it again") from None
    except Exception as error:  # `tokenizers` raises bare Exception, with the offending merge or token in the text
        if type(error) is not Exception:
            raise
        raise ModelError(f"the GGUF file's tokenizer contradicts itself ({error}); download it again") from None
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_begin_and_end(tokenizer, metadata, tokens)
    return tokenizer


def end_token_ids(metadata: Metadata) -> list[int]:
    """Ids at which generation stops: the end of sequence first, then the ends of turn that chat models emit."""
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    ids = [int(token) for token in named if token is not None]
    special = set(_special_ids(metadata, _tokens(metadata)))
    ids += [index for index, text in enumerate(_tokens(metadata)) if text in END_TEXTS and index in special]
    return list(dict.fromkeys(ids))


def tokenizer_config(metadata: Metadata, max_context: int) -> dict[str, Any]:
    """tokenizer_config.json: what a chat template needs to know, and which class transformers must not replace."""
    tokens = _tokens(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # keeps tokenizer.json as it is
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            config[f"{role}_token"] = tokens[index]
    return config


def _tokens(metadata: Metadata) -> list[str]:
    """id -> text, with llama.cpp's names for empty ones."""
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelError("the GGUF file carries no tokenizer; use one made with its vocabulary")
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(metadata["tokenizer.ggml.tokens"])]
    if len(set(tokens)) != len(tokens):
        raise ModelError("the GGUF file's vocabulary lists a token twice; download it again")
    return tokens


def _byte_level(metadata: Metadata, tokens: list[str]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre") or "default"
    patterns = PRE_TOKENIZERS.get(name)
    if patterns is None:
        raise ModelError(f"GGUF pre-tokenizer {name!r} is not supported; supported are {', '.join(PRE_TOKENIZERS)}")
    # the separator is the first space that is not the left part itself
    splits = [(merge, merge.find(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(tokens)},
            merges=[(merge[:at], merge[at + 1 :]) for merge, at in splits],
            ignore_merges=name in LLAMA3_NAMES,
        )
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Metadata, tokens: list[str]) -> Tokenizer:
    vocab = {text: index for index, text in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_from_scores(vocab, metadata["tokenizer.ggml.scores"], _types(metadata, tokens))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # A normalizer sees each stretch between special tokens, so that each gets its prefix, as in llama.cpp.
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_from_scores(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins whichever neighbours make the best-scored token; as merge rules, the best score ranks first.

    Control, unknown and byte tokens are never the result of joining text.
    """
    ranked: list[tuple[float, int, int, str]] = []  # (-score, id of the joined token, where it is cut, its text)
    for text, index in vocab.items():
        if types[index] in (NORMAL, USER_DEFINED):
            cuts = (at for at in range(1, len(text)) if text[:at] in vocab and text[at:] in vocab)
            ranked += [(-scores[index], index, at, text) for at in cuts]
    return [(text[:at], text[at:]) for _, _, at, text in sorted(ranked)]


def _types(metadata: Metadata, tokens: list[str]) -> list[int]:
    return list(metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))


def _special_ids(metadata: Metadata, tokens: list[str]) -> list[int]:
    """Control and unknown tokens; also ends of turn that a converter forgot to mark (llama.cpp overrides them too)."""
    types = _types(metadata, tokens)
    return [i for i, text in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN) or text in END_TEXTS]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str]) -> None:
    """Tokens recognised in raw text before anything else; the user-defined ones survive skip_special_tokens."""
    special = set(_special_ids(metadata, tokens))
    types = _types(metadata, tokens)
    tokenizer.add_tokens(
        [
            AddedToken(text, special=index in special, normalized=False)
            for index, text in enumerate(tokens)
            if index in special or types[index] == USER_DEFINED
        ]
    )


def _add_begin_and_end(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str]) -> None:
    llama = metadata["tokenizer.ggml.model"] == "llama"
    begins_by_default = llama or metadata.get("tokenizer.ggml.pre") in LLAMA3_NAMES
    begin = _edge(metadata, tokens, "bos") if metadata.get("tokenizer.ggml.add_bos_token", begins_by_default) else None
    end = _edge(metadata, tokens, "eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if begin is None and end is None:
        return
    first, second = ([item for item in (begin, f"${name}", end) if item] for name in ("A", "B"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=first,
        pair=first + second,
        special_tokens=[(text, tokens.index(text)) for text in {begin, end} - {None} if text],
    )


def _edge(metadata: Metadata, tokens: list[str], name: str) -> str:
    index = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if index is None or index >= len(tokens):
        raise ModelError(f"the GGUF file asks for a {name} token around every text but names none; download it again")
    return tokens[index]
