"""Prompts of a given length: random token ids for pairs of one vocabulary, words for aligned pairs.

An aligned pair fuses the texts of messages, so its prompts are chats; the words are ordinary, since only their number
matters.
"""

from dataclasses import dataclass

import numpy as np

from c2c_export.errors import UsageError
from runtime import C2CPipeline, Message
from runtime.prompt import Plan

_WORDS = [
    "the",
    "river",
    "that",
    "runs",
    "through",
    "the",
    "old",
    "town",
    "is",
    "wide",
    "and",
    "slow",
    "and",
    "on",
    "a",
    "warm",
    "day",
    "people",
    "sit",
    "by",
    "the",
    "water",
    "and",
    "read",
    "or",
    "talk",
    "about",
    "what",
    "they",
    "saw",
    "in",
    "the",
    "market",
    "where",
    "farmers",
    "sell",
    "apples",
    "bread",
    "cheese",
    "and",
    "flowers",
    "from",
    "the",
    "hills",
    "around",
]
_FILLER = " a"


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt, and how it was planned with all sharers."""

    asked_tokens: int
    prompt: str | list[int]
    """One user turn, or token ids; what `C2CPipeline.prefill` takes."""
    plan: Plan


def make_prompt(pipeline: C2CPipeline, num_tokens: int, random: np.random.Generator) -> BenchPrompt:
    """A prompt of `num_tokens` receiver tokens, or the nearest number below that words make.

    Raises `UsageError` when the chat template alone takes more.
    """
    manifest = pipeline.bundle.manifest
    sharers = tuple(range(len(manifest.sharers)))
    if manifest.aligned:
        text = _text_of(pipeline, num_tokens, int(random.integers(len(_WORDS))))
        return BenchPrompt(num_tokens, text, pipeline.make_plan([Message("user", text)], [], sharers))
    vocabularies = [manifest.receiver.vocab_size, *(sharer.model.vocab_size for sharer in manifest.sharers)]
    ids = random.integers(0, min(vocabularies), num_tokens).tolist()
    return BenchPrompt(num_tokens, ids, pipeline.make_plan(None, ids, sharers))


def _text_of(pipeline: C2CPipeline, num_tokens: int, first_word: int) -> str:
    def text(num_words: int) -> str:
        return " ".join(_WORDS[(first_word + index) % len(_WORDS)] for index in range(num_words))

    def fits(content: str) -> bool:
        try:
            plan = pipeline.make_plan([Message("user", content)], [], ())
        except UsageError:  # longer than the capacity, and so than what is asked for
            return False
        return len(plan.receiver.ids) <= num_tokens

    if not fits(text(1)):
        raise UsageError(f"--prompt-tokens {num_tokens}: the chat template alone takes as many; ask for more")
    fitting, too_many = 1, num_tokens + 1  # a word is at least one token
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(text(middle)) else (fitting, middle)
    content = text(fitting)
    while fits(content + _FILLER):
        content += _FILLER
    return content
