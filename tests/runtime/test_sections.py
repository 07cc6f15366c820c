"""Which tokens a message's text is found at, against the definition read out character by character."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.sections import _closed_occurrence, _TokenFinder


@st.composite
def offsets(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Of tokens as tokenizers give them: mostly rising, some empty, some of one character's bytes."""
    starts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=20))
    if draw(st.booleans()):
        starts.sort()
    return [(start, start + draw(st.integers(0, 4))) for start in starts]


@given(offsets=offsets(), first=st.integers(0, 35), length=st.integers(1, 10))
def test_tokens_of_a_text_run_from_the_first_that_ends_in_it_to_the_last_that_starts_in_it(
    offsets: list[tuple[int, int]], first: int, length: int
):
    end, num_tokens = first + length, len(offsets)
    start = next((i for i in range(num_tokens) if offsets[i][1] > first), num_tokens)
    stop = next((i for i in range(start, num_tokens) if offsets[i][0] >= end), num_tokens)
    assert _TokenFinder(offsets).tokens_of(first, end) == (start, stop)


@given(text=st.text("ab<", max_size=30), content=st.text("ab<", min_size=1, max_size=4), search_from=st.integers(0, 30))
def test_a_text_counts_where_a_special_token_or_the_end_follows(text: str, content: str, search_from: int):
    hits = [i for i in range(search_from, len(text)) if text.startswith(content, i)]
    closed = [i for i in hits if text[i + len(content) :][:1] in ("", "<")]
    assert _closed_occurrence(text, content, search_from) == (closed[0] if closed else -1)
