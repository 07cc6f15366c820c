"""A stream that broke off is gone on with: what two runs deliver is the answer, once, wherever the first one ended."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import C2CError, Chunk, Generation, Timings, TokenLogprob
from runtime.server.ray.resumption import Resumption

TEXT = "Paris – the city of light, it is. 𝕏"
WHOLE = Generation(TEXT, list(range(len(TEXT))), "stop", Timings(0.0, 0.0, 0.0, 0.0, 0.0))


def cut(at: list[int], *, with_logprobs: bool = False) -> list[Chunk]:
    """The answer, a token for each character, in pieces that end at these places; the last has the generation."""
    places = [0, *sorted(at), len(TEXT)]
    chunks = []
    for start, stop in pairwise(places):
        ids = list(range(start, stop))
        logprobs = [TokenLogprob(token_id, -0.5 * token_id) for token_id in ids] if with_logprobs else None
        chunks.append(Chunk(TEXT[start:stop], ids, None, logprobs))
    return [*chunks, Chunk("", [], WHOLE, [] if with_logprobs else None)]


def deliver(resumption: Resumption, chunks: list[Chunk]) -> list[Chunk]:
    return [rest for chunk in chunks if (rest := resumption.advance(chunk)) is not None]


cuts = st.lists(st.integers(0, len(TEXT)), max_size=8)


@given(cuts, cuts, st.integers(0, 8), st.booleans())
def test_two_runs_deliver_the_answer_once(first: list[int], second: list[int], broken_at: int, with_logprobs: bool):
    resumption = Resumption()
    delivered = deliver(resumption, cut(first, with_logprobs=with_logprobs)[:-1][:broken_at])
    resumption.restart()
    delivered += deliver(resumption, cut(second, with_logprobs=with_logprobs))
    assert "".join(chunk.text for chunk in delivered) == TEXT
    assert [token_id for chunk in delivered for token_id in chunk.token_ids] == WHOLE.token_ids
    assert [chunk.generation for chunk in delivered if chunk.generation is not None] == [WHOLE]
    if with_logprobs:
        told = [logprob for chunk in delivered for logprob in chunk.logprobs or ()]
        assert [logprob.token_id for logprob in told] == WHOLE.token_ids


def test_text_that_comes_later_than_its_tokens_is_delivered_once():
    resumption = Resumption()
    deliver(resumption, [Chunk("", [1]), Chunk("ab", [2])])
    resumption.restart()
    assert deliver(resumption, [Chunk("", [1, 2]), Chunk("abc", []), Chunk("d", [3])]) == [
        Chunk("c", []),
        Chunk("d", [3]),
    ]


@pytest.mark.parametrize("other", [Chunk("ab", [1, 9]), Chunk("aX", [1, 2])])
def test_an_answer_that_begins_otherwise_is_not_gone_on_with(other: Chunk):
    resumption = Resumption()
    deliver(resumption, [Chunk("ab", [1, 2])])
    resumption.restart()
    with pytest.raises(C2CError, match=r"another one began it otherwise.*run one engine on machines of one kind"):
        resumption.advance(other)
