"""A request's generation options, from the harness's names to the runtime's.

In: `generation_kwargs` of a task, changed by `--gen_kwargs`. Out: `GenerationOptions`. Greedy unless `do_sample` is
true. A `temperature` above 0 without `do_sample` is refused: the harness's models take it for sampling, its cache of
answers for a greedy answer to be kept. Raises `UsageError` for that and for what the runtime does not do, instead of
ignoring it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from c2c_export.errors import UsageError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same limit, the harness's order of precedence."""
_SAMPLING = ("top_k", "top_p", "min_p", "seed")
_KNOWN = ("until", *_LENGTHS, "do_sample", "temperature", *_SAMPLING, "repetition_penalty", "num_beams")


@dataclass(frozen=True)
class GenerationOptions:
    """What the runtime is asked for."""

    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: dict[str, Any]
    """Keyword arguments of `Session.stream`."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn without a seed of their own."""
        return bool(self.sampling.get("temperature")) and "seed" not in self.sampling


def parse_gen_kwargs(values: Mapping[str, Any], default_max_new_tokens: int) -> GenerationOptions:
    """See the module's docstring. What a sampling option may be, the runtime checks."""
    for name in values:
        if name not in _KNOWN:
            raise UsageError(f"generation_kwargs: {name} is not supported; expected {', '.join(_KNOWN)}")
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("num_beams", 1) != 1:
        raise UsageError(f"generation_kwargs: num_beams is {given['num_beams']!r}; only 1 is supported")
    sampling = {"repetition_penalty": given["repetition_penalty"]} if "repetition_penalty" in given else {}
    if "do_sample" not in given and given.get("temperature", 0) > 0:
        raise UsageError(
            f"generation_kwargs: temperature is {given['temperature']!r} without do_sample; expected do_sample=true to "
            "sample, or do_sample=false for greedy answers (--gen_kwargs do_sample=true)"
        )
    if given.get("do_sample", False):
        sampling |= {"temperature": given.get("temperature", 1.0)}
        sampling |= {name: given[name] for name in _SAMPLING if name in given}
    limit = next((given[name] for name in _LENGTHS if name in given), default_max_new_tokens)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise UsageError(f"generation_kwargs: max_gen_toks is {limit!r}, expected an integer of at least 1")
    return GenerationOptions(_stop_strings(given.get("until", [])), limit, sampling)


def _stop_strings(until: object) -> tuple[str, ...]:
    entries = [until] if isinstance(until, str) else until
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise UsageError(f"generation_kwargs: until is {until!r}, expected text or a list of texts")
    return tuple(entry for entry in entries if entry)  # the harness too passes over empty ones
