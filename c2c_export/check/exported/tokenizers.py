"""A bundle's tokenizer, special tokens and chat template, against those of the model, written anew.

In: the folder in the bundle, and the contents of the new files. Out: a `Divergence` for each file that says something
else, naming the first field or line. Files of JSON are compared by what they hold: their layout is the library's, and
changes with its version.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from c2c_export.check_record import Divergence
from c2c_export.errors import BundleError


def check_tokenizer(graph: str, bundled: Path, new: Mapping[str, bytes]) -> Iterator[Divergence]:
    """Compare the files of `bundled` with `new`, by name. Raises `BundleError` for a file that cannot be read."""
    for name, expected in new.items():
        try:
            found = (bundled / name).read_bytes()
        except OSError as error:
            raise BundleError(f"{bundled / name}: {error.strerror}; export the bundle again") from error
        difference = None if found == expected else _difference(bundled / name, found, expected)
        if difference:
            yield Divergence(graph=graph, message=f"tokenizers/{bundled.name}/{name}: {difference}")


def _difference(path: Path, found: bytes, expected: bytes) -> str | None:
    if path.suffix != ".json":
        return _first_line(found, expected)
    try:
        content = json.loads(found)
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export the bundle again") from error
    return _first_field(content, json.loads(expected), "")


def _first_field(found: Any, expected: Any, place: str) -> str | None:
    """The first field that differs, and how; None if nothing does."""
    if found == expected:
        return None
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            here = f"{place}.{key}" if place else str(key)
            if key not in found:
                return f"field {here} is missing"
            if key not in expected:
                return f"field {here} is one that the model's does not have"
            difference = _first_field(found[key], expected[key], here)
            if difference:
                return difference
    if isinstance(found, list) and isinstance(expected, list):
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            difference = _first_field(ours, theirs, f"{place}.{index}")
            if difference:
                return difference
        return f"field {place} has {len(found)} entries, the model's has {len(expected)}"
    return f"field {place} is {found!r:.80}, the model's is {expected!r:.80}"


def _first_line(found: bytes, expected: bytes) -> str:
    ours, theirs = found.splitlines(keepends=True), expected.splitlines(keepends=True)
    pairs = enumerate(zip(ours, theirs, strict=False))
    line = next((number for number, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return f"line {line + 1} is {_shown(ours, line)}, the model's is {_shown(theirs, line)}"


def _shown(lines: list[bytes], number: int) -> str:
    return repr(lines[number].decode("utf-8", "replace"))[:80] if number < len(lines) else "missing"
