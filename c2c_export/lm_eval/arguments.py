"""What `--model_args` may hold, checked, and the fingerprint of what the answers depend on.

In: the harness's values, which it parsed as Python literals where they look like one. Out: `Arguments`. Raises
`UsageError` that names the argument.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from c2c_export.bundle import Manifest
from c2c_export.errors import UsageError


@dataclass(frozen=True)
class Arguments:
    """`--model_args`, each `name=value`; only `bundle` is required."""

    bundle: str
    """The bundle's folder."""
    engine: str = "ort-cpu"
    """As in `C2CPipeline.from_bundle`, and likewise `precision` and `num_threads`."""
    precision: str | None = None
    num_threads: int | None = None
    fuse: bool = True
    """False is the receiver alone."""
    sharers: tuple[int, ...] | None = None
    """Numbers of the sharers to use: `sharers=1`, or several as `sharers=0+1`. All by default."""
    max_gen_toks: int = 256
    """Tokens that an answer has at most where the task does not say."""
    add_bos_token: bool | None = None
    """Whether raw contexts begin with the receiver's begin token. None: if its tokenizer adds it by itself."""
    allow_unchecked: bool = False
    """As in `C2CPipeline.from_bundle`, and likewise `allow_failed`."""
    allow_failed: bool = False

    def fingerprint(self, manifest: Manifest, engine_name: str, versions: Mapping[str, str]) -> str:
        """Of everything that an answer depends on, but the request: 64 hexadecimal digits.

        `versions` are those of the libraries that compute it.
        """
        decisive = [
            dict(versions),
            manifest.files,
            engine_name,
            self.fuse,
            list(self.sharers) if self.fuse and self.sharers is not None else None,
            self.max_gen_toks,
            self.add_bos_token,
        ]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def parse_arguments(values: Mapping[str, Any]) -> Arguments:
    """Check the values of `--model_args`; see the module's docstring."""
    known = [field.name for field in fields(Arguments)]
    for name in values:
        if name not in known:
            raise UsageError(f"model_args: unknown argument {name}; expected {', '.join(known)}")
    if "bundle" not in values:
        raise UsageError("model_args: bundle is missing; expected --model_args bundle=FOLDER")
    given: dict[str, Any] = {name: _PARSERS[name](name, value) for name, value in values.items() if value is not None}
    return Arguments(**given)


def check_batch_size(batch_size: object, max_batch_size: object) -> None:
    """Refuse to answer several requests at once; `UsageError` names the harness's option."""
    if not re.fullmatch(r"1|auto(:\d+)?|None", str(batch_size)):
        raise UsageError(f"--batch_size {batch_size}: c2c answers one request at a time; leave it out, or give 1")
    if max_batch_size not in (None, 1):
        raise UsageError(f"--max_batch_size {max_batch_size}: c2c answers one request at a time; leave it out")


def _text(_: str, value: object) -> str:
    return str(value)  # a folder named 2026 comes as a number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"model_args: {name} is {value!r}, expected true or false")
    return value


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"model_args: {name} is {value!r}, expected an integer of at least 1")
    return value


def _numbers(name: str, value: object) -> tuple[int, ...]:
    entries = value.split("+") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(entry, bool) or not re.fullmatch(r"\d+", str(entry)) for entry in entries):
        raise UsageError(f"model_args: {name} is {value!r}, expected sharer numbers such as 0 or 0+1")
    return tuple(int(str(entry)) for entry in entries)


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "bundle": _text,
    "engine": _text,
    "precision": _text,
    "num_threads": _count,
    "fuse": _flag,
    "sharers": _numbers,
    "max_gen_toks": _count,
    "add_bos_token": _flag,
    "allow_unchecked": _flag,
    "allow_failed": _flag,
}
