"""From generated token ids to text, one token at a time, cut at the first stop string.

In: a `tokenizers.Tokenizer`, stop strings, and token ids as they are generated. Out: pieces of text that no later
token can change; together they are exactly `tokenizer.decode(all ids, skip_special_tokens=True)`, cut where the
first stop string begins. Not covered: decoders other than those of byte-level and sentencepiece-like tokenizers
(`ByteLevel`, `Metaspace`, `ByteFallback`, `Replace`, `Fuse`, `Strip` and sequences of them, or no decoder): they are
refused with an error that names them.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tokenizers import Regex, Tokenizer, decoders

from c2c_export.errors import C2CError, UsageError

# the form that the ByteFallback decoder reads as a byte; its number parser also takes a plus sign
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class Detokenizer:
    """Turns token ids into text that is final as soon as it is returned.

    The tokenizer's decoder is rebuilt as a chain of incremental stages, each of which releases what can no longer
    change. The work per token is bounded (decoding everything at every step is quadratic), and the result is exact
    where decoding a window of recent tokens is not: a run of byte tokens of a `ByteFallback` decoder becomes one
    U+FFFD per byte if it turns out invalid at its end, so such a run is held back until another token closes it.

    `stop`: strings that end the text before their first occurrence; the earliest beginning counts. Raises
    `UsageError` for an empty or non-string stop string, `C2CError` for a decoder that cannot be run incrementally.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        added_tokens = tokenizer.get_added_tokens_decoder().values()
        self._special_tokens = {token.content for token in added_tokens if token.special}
        self._stages = _build_stages(tokenizer.decoder)
        self._stop_filter = _StopFilter(stop)
        self._emitted: list[str] = []
        self._finished = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string appeared; the text ends before it."""
        return self._stop_filter.stopped

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """Take the next token and return the new text that is final, "" if none is (or a stop string appeared).

        An id that the tokenizer does not know adds nothing, as in `decode`. Raises `RuntimeError` after `finish`.
        """
        if self._finished:
            raise RuntimeError("push after finish: the text is complete")
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special_tokens or self.stopped:
            return ""
        return self._emit(self._stop_filter.push("".join(_run(self._stages, [token]))))

    def finish(self) -> str:
        """Say that no token follows: return the text held back so far ("" after a stop string, or if called again)."""
        if self._finished:
            return ""
        self._finished = True
        rest = ""
        for i, stage in enumerate(self._stages):
            rest += "".join(_run(self._stages[i + 1 :], stage.finish()))
        return self._emit(self._stop_filter.push(rest) + self._stop_filter.finish())

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text


class _StopFilter:
    """Passes text on, except what is or could become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise UsageError(f"stop: {stop!r} is one string; expected a list of strings")
        for string in stop:
            if not isinstance(string, str) or not string:
                raise UsageError(f"stop: {string!r} is not allowed; expected strings of at least one character")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = self._first_occurrence()
        undecided = self._first_possible_beginning()
        # a stop string that may have begun earlier takes precedence over one already complete: wait for its rest
        if found is not None and found <= undecided:
            return self._stop_at(found)
        emitted, self._held = self._held[:undecided], self._held[undecided:]
        return emitted

    def finish(self) -> str:
        if self.stopped:
            return ""
        found = self._first_occurrence()
        if found is not None:
            return self._stop_at(found)
        emitted, self._held = self._held, ""
        return emitted

    def _stop_at(self, position: int) -> str:
        emitted, self._held = self._held[:position], ""
        self.stopped = True
        return emitted

    def _first_occurrence(self) -> int | None:
        positions = (self._held.find(string) for string in self._stop)
        return min((position for position in positions if position >= 0), default=None)

    def _first_possible_beginning(self) -> int:
        """Where the held text ends in the beginning of a stop string, or its length."""
        length = len(self._held)
        for position in range(max(0, length - self._longest + 1), length):
            rest = self._held[position:]
            if any(len(string) > len(rest) and string.startswith(rest) for string in self._stop):
                return position
        return length


class _Stage(Protocol):
    """One decoder, run incrementally: takes a token (after a fusing stage: a piece of text), gives what is final."""

    def push(self, token: str) -> list[str]: ...

    def finish(self) -> list[str]: ...


class _PerToken:
    """A decoder that treats every token by itself."""

    def __init__(self, decode: Callable[[str], str]) -> None:
        self._decode = decode

    def push(self, token: str) -> list[str]:
        return [self._decode(token)]

    def finish(self) -> list[str]:
        return []


class _FirstDiffers:
    """A decoder that treats the first token in one way and every other one in another."""

    def __init__(self, decode_first: Callable[[str], str], decode: Callable[[str], str]) -> None:
        self._decode_first = decode_first
        self._decode = decode
        self._at_start = True

    def push(self, token: str) -> list[str]:
        decode = self._decode_first if self._at_start else self._decode
        self._at_start = False
        return [decode(token)]

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """Every character of a token stands for a byte; the bytes of all tokens are one UTF-8 text."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> list[str]:
        if all(character in _BYTE_OF_CHARACTER for character in token):
            token_bytes = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        else:
            token_bytes = token.encode()  # an added token is written as it is
        return [self._utf8.decode(token_bytes)]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """A run of tokens `<0xHH>` is the text of these bytes if that is valid UTF-8, else one U+FFFD per byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, token: str) -> list[str]:
        byte_token = _BYTE_TOKEN.fullmatch(token)
        if byte_token:
            self._run.append(int(byte_token[1], 16))
            return []
        return [*self.finish(), token]

    def finish(self) -> list[str]:
        run = bytes(self._run)
        self._run.clear()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _StripStart:
    """Removes up to `count` times the character from the start of the fused text."""

    def __init__(self, character: str, count: int) -> None:
        self._character = character
        self._remaining = count

    def push(self, token: str) -> list[str]:
        stripped = _strip_start(token, self._character, self._remaining)
        self._remaining = 0 if stripped else self._remaining - len(token)
        return [stripped]

    def finish(self) -> list[str]:
        return []


def _strip_start(text: str, character: str, count: int) -> str:
    start = 0
    while start < min(count, len(text)) and text[start] == character:
        start += 1
    return text[start:]


def _run(stages: Sequence[_Stage], tokens: list[str]) -> list[str]:
    for stage in stages:
        tokens = [decoded for token in tokens for decoded in stage.push(token)]
    return tokens


def _build_stages(decoder: Any) -> list[_Stage]:
    if decoder is None:
        return [_FirstDiffers(lambda token: token, lambda token: " " + token)]
    # the decoder's own state is a small JSON text; the tokenizer's would hold the vocabulary too
    components = _flatten(json.loads(decoder.__getstate__()))
    stages: list[_Stage] = []
    fused = False
    for component in components:
        if component["type"] != "Fuse":
            stages.append(_build_stage(component, fused))
        # from here on a decoder sees all text as one token
        fused = fused or component["type"] in ("Fuse", "ByteLevel")
    return stages


def _flatten(component: dict[str, Any]) -> list[dict[str, Any]]:
    if component["type"] != "Sequence":
        return [component]
    return [leaf for part in component["decoders"] for leaf in _flatten(part)]


def _build_stage(component: dict[str, Any], fused: bool) -> _Stage:
    match component:
        case {"type": "ByteLevel"} if not fused:
            return _ByteLevel()
        case {"type": "ByteFallback"} if not fused:
            return _ByteFallback()
        case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if not fused:
            first = " " if scheme == "never" else ""
            return _FirstDiffers(lambda token: token.replace(mark, first), lambda token: token.replace(mark, " "))
        # in fused text only a single character cannot lie across two pieces
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old and (
            not fused or len(old) == 1
        ):
            return _PerToken(lambda token: token.replace(old, new))
        case {"type": "Replace", "pattern": {"Regex": str(pattern)}, "content": str(new)} if not fused:
            replace = decoders.Replace(Regex(pattern), new)
            return _PerToken(lambda token: replace.decode([token]))
        case {"type": "Strip", "content": str(character), "start": int(count), "stop": 0}:
            if fused:
                return _StripStart(character, count)
            return _PerToken(lambda token: _strip_start(token, character, count))
    position = " after Fuse or ByteLevel" if fused else ""
    raise C2CError(
        f"tokenizer.json: decoder {json.dumps(component, ensure_ascii=False)}{position} cannot be streamed; expected "
        "ByteLevel, Metaspace, ByteFallback, Replace, Fuse, Strip at the start, or no decoder"
    )


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, the rest are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()
