"""A bundle's tokenizer, special tokens and chat template, against those of the model, written anew.

In: the folder in the bundle and the model as it was read for the check. Out: a `Divergence` for each file that says
something else, naming the first field or line. Files of JSON are compared by what they hold: their layout is the
library's, and changes with its version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from c2c_export.check_record import Divergence
from c2c_export.errors import BundleError
from c2c_export.source_model import SourceModel
from c2c_export.tokenizer import CHAT_TEMPLATE_NAME, SPECIAL_TOKENS_NAME, TOKENIZER_NAME
from c2c_export.tokenizer_source import write_tokenizer


def check_tokenizer(graph: str, bundled: Path, source: SourceModel, new: Path) -> Iterator[Divergence]:
    """Write the model's tokenizer into `new`, an empty folder, and compare `bundled` with it.

    Raises `BundleError` for a file that cannot be read.
    """
    write_tokenizer(source.tokenizer, source.chat_template, new)
    for name in (TOKENIZER_NAME, SPECIAL_TOKENS_NAME):
        difference = _first_difference(_read_json(bundled / name), json.loads((new / name).read_bytes()), "")
        if difference:
            yield Divergence(graph=graph, message=f"tokenizers/{bundled.name}/{name}: {difference}")
    difference = _first_line((bundled / CHAT_TEMPLATE_NAME).read_bytes(), (new / CHAT_TEMPLATE_NAME).read_bytes())
    if difference:
        yield Divergence(graph=graph, message=f"tokenizers/{bundled.name}/{CHAT_TEMPLATE_NAME}: {difference}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export the bundle again") from error


def _first_difference(found: Any, expected: Any, place: str) -> str | None:
    """The first field that differs, and how; None if nothing does."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            here = f"{place}.{key}" if place else str(key)
            if key not in found:
                return f"field {here} is missing"
            if key not in expected:
                return f"field {here} is one that the model's does not have"
            difference = _first_difference(found[key], expected[key], here)
            if difference:
                return difference
        return None
    if isinstance(found, list) and isinstance(expected, list):
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            difference = _first_difference(ours, theirs, f"{place}.{index}")
            if difference:
                return difference
        if len(found) != len(expected):
            return f"field {place} has {len(found)} entries, the model's has {len(expected)}"
        return None
    return None if found == expected else f"field {place} is {found!r:.80}, the model's is {expected!r:.80}"


def _first_line(found: bytes, expected: bytes) -> str | None:
    if found == expected:
        return None
    ours, theirs = found.splitlines(keepends=True), expected.splitlines(keepends=True)
    line = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"line {line + 1} is {_shown(ours, line)}, the model's is {_shown(theirs, line)}"


def _shown(lines: list[bytes], number: int) -> str:
    return repr(lines[number].decode("utf-8", "replace"))[:80] if number < len(lines) else "missing"
