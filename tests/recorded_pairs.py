"""The recorded pairs in tests/golden and their decoders, for tests that go through all of them or some kinds."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from conftest import GOLDEN
from transformers import AutoTokenizer

from runtime import C2CPipeline

UNALIGNED, CLOSING_PADDING, ALIGNED = "qwen3_from_qwen2", "qwen3_from_llama_aligned", "llama_from_gemma3_aligned"
PARALLEL, SEQUENTIAL = "two_sharers_parallel", "two_sharers_sequential"
GATES_CLOSED = "gates_closed"
PAIRS = (UNALIGNED, CLOSING_PADDING, ALIGNED, PARALLEL, SEQUENTIAL, GATES_CLOSED)

PipelineOf = Callable[[str], C2CPipeline]
"""What the fixture `recorded_pipeline` is."""


def every(*names: str) -> Any:
    """Run a test once for each of these pairs, given as `name`."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names])


every_kind = every(UNALIGNED, CLOSING_PADDING, ALIGNED, PARALLEL)
"""One pair of each kind of prompt, and one with two sharers."""
unaligned = every(UNALIGNED)

# A pair's tests stay with the worker that exported it.
each_pair = pytest.mark.parametrize("pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PAIRS])


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a pair's receiver, as transformers reads it."""
    return AutoTokenizer.from_pretrained(GOLDEN / name / "receiver")


DECODERS = (
    (UNALIGNED, "receiver"),
    (UNALIGNED, "sharer0"),
    (CLOSING_PADDING, "receiver"),
    (CLOSING_PADDING, "sharer0"),
    (ALIGNED, "receiver"),
    (ALIGNED, "sharer0"),
    (PARALLEL, "receiver"),
    (PARALLEL, "sharer0"),
    (PARALLEL, "sharer1"),
    (SEQUENTIAL, "receiver"),
    (SEQUENTIAL, "sharer0"),
    (SEQUENTIAL, "sharer1"),
    (GATES_CLOSED, "receiver"),
)
"""Every decoder that is computed: a sharer whose gates are all closed is not."""

each_decoder = pytest.mark.parametrize(
    ("pair", "name"),
    [pytest.param(pair, name, marks=pytest.mark.xdist_group(pair), id=f"{pair}-{name}") for pair, name in DECODERS],
)
