"""A model's tokenizer as it lies in a bundle: text to token ids with character offsets, and back.

In: a folder with three files (written by `c2c_export.tokenizer_source`):

    tokenizer.json        what the `tokenizers` library reads; neither padding nor truncation is active
    special_tokens.json   `SpecialTokens`
    chat_template.jinja   the chat template, see `c2c_export.chat_template`

Out: `BundledTokenizer`, which encodes and decodes exactly as the transformers tokenizer it was written from.
Not covered: sentence pairs, padding, truncation, and tokenizers that the `tokenizers` library cannot read.
Nothing here imports torch or transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from c2c_export.errors import BundleError

TOKENIZER_NAME = "tokenizer.json"
SPECIAL_TOKENS_NAME = "special_tokens.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"

_LONG = 10_000
"""Characters from which on encoding takes milliseconds."""
# What transformers' clean_up_tokenization undoes, in its order.
_SPACED_OUT = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class SpecialTokens(BaseModel):
    """The special tokens of a tokenizer by role; a role that it does not have is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    padding_id: int | None
    """The padding token, or the end-of-sequence token of a tokenizer without one."""
    end_id: int | None
    begin_id: int | None
    unknown_id: int | None
    special_ids: tuple[int, ...]
    """All special ids, also those without one of these roles."""
    template_variables: dict[str, str]
    """The token strings that a chat template may name, such as `bos_token`."""
    clean_up_spaces: bool
    """Whether decoding removes the spaces before punctuation."""


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text, and for each the range of characters [start, stop) that it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class BundledTokenizer:
    """One model's tokenizer, special tokens and chat template.

    `backend` has neither padding nor truncation active; `vocab_size` counts the added tokens, and may differ from the
    model's, which is often rounded up.
    """

    def __init__(self, backend: Tokenizer, special: SpecialTokens, chat_template: str) -> None:
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> "BundledTokenizer":
        """Read the three files of `folder`. Raises `BundleError`, naming the file, when one is missing or broken."""
        special_file = folder / SPECIAL_TOKENS_NAME
        try:
            special = SpecialTokens.model_validate_json(_read_text(special_file))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise BundleError(f"{special_file}: {field}: {first['msg']}; export the bundle again") from error
        return cls(_read_backend(folder / TOKENIZER_NAME), special, _read_text(folder / CHAT_TEMPLATE_NAME))

    def encode(self, text: str) -> TokenizedText:
        """Token ids and character offsets of `text`. No special token is added; those written in it are recognised."""
        if len(text) < _LONG:
            encoding = self.backend.encode(text, add_special_tokens=False)
        else:  # which lets other threads of Python go on meanwhile
            encoding = self.backend.encode_batch([text], add_special_tokens=False)[0]
        return TokenizedText(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; an id outside of the vocabulary stands for nothing."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self.special.clean_up_spaces:
            for spaced_out in _SPACED_OUT:
                text = text.replace(spaced_out, spaced_out.strip())
        return text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{path}: missing; export the bundle again") from error
    except OSError as error:
        raise BundleError(f"{path}: unreadable ({error}); export the bundle again") from error


def _read_text(path: Path) -> str:
    try:
        # Not read_text(), which would turn \r\n into \n.
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: unreadable ({error}); export the bundle again") from error


def _read_backend(path: Path) -> Tokenizer:
    content = _read_bytes(path)
    try:
        # Not from_str: a str takes four bytes a character where one of them is beyond U+FFFF.
        backend = Tokenizer.from_buffer(content)
    except Exception as error:  # the Rust side raises a bare Exception
        raise BundleError(f"{path}: not a tokenizer ({error}); export the bundle again") from error
    backend.no_padding()
    backend.no_truncation()
    return backend
