"""Incremental detokenisation against `tokenizer.decode` of all ids at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from c2c_export.errors import UsageError
from runtime.detokenizer import Detokenizer

_GOLDEN = Path(__file__).parents[1] / "golden"
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _golden(path: str) -> Tokenizer:
    return Tokenizer.from_file(str(_GOLDEN / path / "tokenizer.json"))


def _sentencepiece_like(decoder: decoders.Decoder | None) -> Tokenizer:
    """Some pieces with word marks, all single bytes, odd near-bytes, one special and one plain added token."""
    pieces = [
        "▁",
        "▁▁",
        "▁hello",
        "he",
        "l",
        "o",
        "▁w",
        "or",
        "ld",
        "!",
        "é",
        "▁日本",
        "aa",
        "<0x+F>",
        "<0xG0>",
        " ",
        "a ",
    ]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *_BYTE_TOKENS, *pieces, *"abcdefg"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens([AddedToken("<tool▁call>", special=False, normalized=False)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


# one of every kind of golden tokenizer (the others are copies), and decoders of published model families
_TOKENIZERS = {
    "golden qwen": _golden("qwen3_from_qwen2/receiver"),
    "golden llama": _golden("qwen3_from_llama_aligned/sharer"),
    "golden gemma": _golden("llama_from_gemma3_aligned/sharer"),
    "llama 2": _sentencepiece_like(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    ),
    "gemma": _sentencepiece_like(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ),
    "strip three": _sentencepiece_like(
        decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 3, 0)]
        )
    ),
    "metaspace": _sentencepiece_like(decoders.Metaspace()),
    "metaspace, bytes": _sentencepiece_like(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    ),
    "metaspace, never": _sentencepiece_like(decoders.Metaspace(prepend_scheme="never")),
    "regex, strip": _sentencepiece_like(
        decoders.Sequence([decoders.Replace(Regex("a+|▁"), "_"), decoders.Strip("<", 1, 0), decoders.ByteFallback()])
    ),
    "byte level in a sequence": _sentencepiece_like(decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    "no decoder": _sentencepiece_like(None),
}
_NAMES = sorted(_TOKENIZERS)


def _stream(tokenizer: Tokenizer, ids: list[int], stop: list[str] | tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        assert detokenizer.text == "".join(pieces)
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces, detokenizer.stopped


def _cut(text: str, stop: list[str]) -> tuple[str, bool]:
    positions = [text.find(string) for string in stop if string in text]
    return (text[: min(positions)], True) if positions else (text, False)


def _ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    # byte tokens, in byte order, give long runs of bytes, mostly invalid UTF-8; the last id is one too many
    size = tokenizer.get_vocab_size()
    text_ids = st.text(max_size=12).map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    runs = st.one_of(st.lists(st.integers(0, size), max_size=8), text_ids)
    if tokenizer.token_to_id("<0x00>") is not None:
        byte_ids = [tokenizer.token_to_id(token) for token in _BYTE_TOKENS]
        utf8 = st.one_of(st.text(max_size=4).map(lambda text: text.encode()), st.binary(max_size=6))
        runs = st.one_of(runs, utf8.map(lambda data: [byte_ids[byte] for byte in data]))
    return st.lists(runs, max_size=6).map(lambda parts: [token_id for part in parts for token_id in part])


@pytest.mark.parametrize("path", sorted(str(p.parent.relative_to(_GOLDEN)) for p in _GOLDEN.glob("*/*/tokenizer.json")))
def test_golden_tokenizers_stream_any_text_back_whole(path):
    tokenizer = _golden(path)
    text = "Zero-width 👩‍👩‍👧 family, naïve café, 日本語, \u202e RTL, \x00 and 🇨🇭!\n"
    pieces, stopped = _stream(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    assert not stopped
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("name", _NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streamed_text_equals_decoding_all_ids(name, data):
    tokenizer = _TOKENIZERS[name]
    ids = data.draw(_ids(tokenizer))
    pieces, stopped = _stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not stopped


@pytest.mark.parametrize("name", _NAMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streamed_text_is_cut_at_the_first_stop_string(name, data):
    tokenizer = _TOKENIZERS[name]
    ids = data.draw(_ids(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    # substrings of the text are sure to appear, and overlap with each other
    starts = st.integers(0, max(0, len(text) - 1))
    inside = st.builds(lambda start, length: text[start : start + length], starts, st.integers(1, 6)).filter(bool)
    strings = st.one_of(inside, st.text(min_size=1, max_size=3)) if text else st.text(min_size=1, max_size=3)
    stop = data.draw(st.lists(strings, max_size=3))
    pieces, stopped = _stream(tokenizer, ids, stop)
    assert ("".join(pieces), stopped) == _cut(text, stop)


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=30), stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)
)
def test_overlapping_stop_strings_cut_where_the_earliest_begins(text, stop):
    tokenizer = _TOKENIZERS["gemma"]
    ids = [tokenizer.token_to_id(character) for character in text]
    pieces, stopped = _stream(tokenizer, ids, stop)
    assert ("".join(pieces), stopped) == _cut(text, stop)


def test_stop_string_across_token_borders_is_held_back_and_never_emitted():
    tokenizer = _TOKENIZERS["gemma"]
    detokenizer = Detokenizer(tokenizer, ["world!"])
    ids = [tokenizer.token_to_id(token) for token in ("▁hello", "▁w", "or", "ld", "!", "he")]
    assert [detokenizer.push(token_id) for token_id in ids] == [" hello", " ", "", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.finish() == ""
    assert detokenizer.text == " hello "


def test_beginning_of_a_stop_string_is_emitted_when_it_comes_to_nothing():
    tokenizer = _TOKENIZERS["gemma"]
    detokenizer = Detokenizer(tokenizer, ["world!"])
    ids = [tokenizer.token_to_id(token) for token in ("▁w", "or", "l", "▁w")]
    assert [detokenizer.push(token_id) for token_id in ids] == [" ", "", "", "worl "]
    assert detokenizer.finish() == "w"
    assert not detokenizer.stopped


def test_plain_text_is_emitted_at_once_and_characters_never_split():
    tokenizer = _TOKENIZERS["golden qwen"]
    detokenizer = Detokenizer(tokenizer)
    byte_ids = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a👍é")[0][0]
    pieces = [detokenizer.push(tokenizer.token_to_id(character)) for character in byte_ids]
    assert pieces == ["a", "", "", "", "👍", "", "é"]
    assert detokenizer.finish() == ""


def test_byte_run_is_final_only_when_another_token_closes_it():
    tokenizer = _TOKENIZERS["llama 2"]
    e_acute = [tokenizer.token_to_id(token) for token in ("<0xC3>", "<0xA9>")]
    stray, special, letter = (tokenizer.token_to_id(token) for token in ("<0xFF>", "<s>", "a"))
    assert _stream(tokenizer, [letter, *e_acute, letter])[0] == ["a", "", "", "éa", ""]
    assert _stream(tokenizer, [letter, *e_acute, special, stray, letter])[0] == [
        "a",
        "",
        "",
        "",
        "",
        "\ufffd" * 3 + "a",
        "",
    ]
    assert _stream(tokenizer, e_acute)[0] == ["", "", "é"]


def test_incomplete_character_at_the_end_becomes_a_replacement_character():
    tokenizer = _TOKENIZERS["golden qwen"]
    ids = tokenizer.encode("👍", add_special_tokens=False).ids[:1]
    assert _stream(tokenizer, ids)[0] == ["", tokenizer.decode(ids)] == ["", "\ufffd"]


def test_finishing_twice_returns_the_rest_once():
    tokenizer = _TOKENIZERS["golden qwen"]
    detokenizer = Detokenizer(tokenizer)
    detokenizer.push(tokenizer.encode("👍", add_special_tokens=False).ids[0])
    assert [detokenizer.finish(), detokenizer.finish()] == ["\ufffd", ""]


@pytest.mark.parametrize("stop", [[""], ["a", ""], "abc", [3], [None]])
def test_wrong_stop_strings_are_refused(stop):
    with pytest.raises(UsageError, match="stop: "):
        Detokenizer(_TOKENIZERS["golden qwen"], stop)
