"""Log-probabilities of generated tokens, in the forms that OpenAI's chats and completions have for them.

There is one entry for each generated token, the ending stop token included: they are as many as the usage counts, and
so may say more than the text. Probabilities are the model's, before any sampling option.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

from pydantic import BaseModel

from runtime.generation import TokenLogprob

TokenTexts = Callable[[int], str]
"""The text of a token by its id."""
_REPLACEMENT = "�"
_LOWEST = -9999.0
"""JSON has no infinity."""


class LikelyToken(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of the token's text in UTF-8; null where the token is only a part of a character."""


class ChosenToken(LikelyToken):
    """A token of the answer."""

    top_logprobs: list[LikelyToken]
    """The likeliest there, the likeliest first."""


class ChatLogprobs(BaseModel):
    """Those of an answer, or of a piece of it."""

    content: list[ChosenToken]
    refusal: None = None

    @classmethod
    def of(cls, tokens: Sequence[TokenLogprob] | None, texts: TokenTexts) -> "ChatLogprobs | None":
        """None where none were asked for."""
        if tokens is None:
            return None

        def likely(token: int, logprob: float) -> LikelyToken:
            text = texts(token)
            data = None if _REPLACEMENT in text else list(text.encode())
            return LikelyToken(token=text, logprob=max(logprob, _LOWEST), bytes=data)

        content = [
            ChosenToken(
                **likely(token.token_id, token.logprob).model_dump(),
                top_logprobs=[likely(*alternative) for alternative in token.alternatives],
            )
            for token in tokens
        ]
        return cls(content=content)


class CompletionLogprobs(BaseModel):
    """Those of an answer, or of a piece of it; the lists are as long as each other."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    """For each token the likeliest there; null where none were asked for."""
    text_offset: list[int]
    """The characters of the tokens before."""

    @classmethod
    def of(
        cls, tokens: Sequence[TokenLogprob] | None, texts: TokenTexts, offset: int = 0
    ) -> "CompletionLogprobs | None":
        """None where none were asked for. `offset` is that of the first token."""
        if tokens is None:
            return None
        names = [texts(token.token_id) for token in tokens]
        offsets = list(accumulate(map(len, names), initial=offset))[:-1]
        alternatives: list[dict[str, float]] = []
        for token in tokens:
            likeliest: dict[str, float] = {}
            for other, logprob in token.alternatives:
                # Of tokens with one text the likelier one comes first.
                likeliest.setdefault(texts(other), max(logprob, _LOWEST))
            alternatives.append(likeliest)
        return cls(
            tokens=names,
            token_logprobs=[max(token.logprob, _LOWEST) for token in tokens],
            top_logprobs=alternatives if any(alternatives) else None,
            text_offset=offsets,
        )

    @property
    def end(self) -> int:
        """The offset of the token that comes next."""
        return self.text_offset[-1] + len(self.tokens[-1])
