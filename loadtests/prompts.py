"""Texts of a given length from a seed: the same seed is the same text on every machine, another seed shares nothing.

They are made of common English words, about a token each for most tokenizers; how many tokens a text has is for the
server to say. Which prompts begin alike is scenarios.py's.
"""

from __future__ import annotations

import random

WORDS = (
    "time", "people", "way", "water", "word", "day", "part", "number", "sound", "work", "place", "year", "back",
    "thing", "name", "help", "line", "turn", "cause", "mean", "move", "right", "boy", "old", "same", "tell", "set",
    "three", "want", "air", "well", "also", "play", "small", "end", "put", "home", "read", "hand", "port", "large",
    "spell", "add", "even", "land", "here", "must", "big", "high", "such", "follow", "act", "why", "ask", "men",
    "change", "went", "light", "kind", "off", "need", "house", "picture", "try", "us", "again", "animal", "point",
    "mother", "world", "near", "build", "self", "earth", "father", "head", "stand", "own", "page", "should",
    "country", "found", "answer", "school",
)  # fmt: skip
NAMES = ("index", "total", "cache", "queue", "block", "token", "worker", "router", "limit", "window", "first", "last")
CODE = (
    "def {0}_{1}({2}: int, {3}: int) -> int:",
    "    {0} = {1} + {2} * {3}",
    "    for {0} in range({1}):",
    "        {0} += {1}[{2}]",
    "    if {0} > {1}:",
    "        return {2} - {3}",
    "    return {0} + {1}",
    "",
)


def text(seed: str, words: int) -> str:
    """So many words; the first names the seed's text, so that no two begin alike."""
    rng = random.Random(seed)
    return " ".join([f"{rng.getrandbits(32):x}", *rng.choices(WORDS, k=max(1, words) - 1)])


def code(seed: str, lines: int) -> str:
    """So many lines that look like a program's, each with its end."""
    rng = random.Random(seed)
    made = [f"# {rng.getrandbits(32):x}"]
    made += [rng.choice(CODE).format(*rng.choices(NAMES, k=4)) for _ in range(max(1, lines) - 1)]
    return "\n".join(made) + "\n"
