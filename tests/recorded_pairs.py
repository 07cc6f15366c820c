"""The names of the recorded pairs in tests/golden, and of their decoders, for tests that go through all of them."""

import pytest

PAIRS = (
    "qwen3_from_qwen2",
    "qwen3_from_llama_aligned",
    "llama_from_gemma3_aligned",
    "two_sharers_parallel",
    "two_sharers_sequential",
    "gates_closed",
)

# A pair's tests stay with the worker that exported it.
each_pair = pytest.mark.parametrize("pair", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PAIRS])

DECODERS = (
    ("qwen3_from_qwen2", "receiver"),
    ("qwen3_from_qwen2", "sharer0"),
    ("qwen3_from_llama_aligned", "receiver"),
    ("qwen3_from_llama_aligned", "sharer0"),
    ("llama_from_gemma3_aligned", "receiver"),
    ("llama_from_gemma3_aligned", "sharer0"),
    ("two_sharers_parallel", "receiver"),
    ("two_sharers_parallel", "sharer0"),
    ("two_sharers_parallel", "sharer1"),
    ("two_sharers_sequential", "receiver"),
    ("two_sharers_sequential", "sharer0"),
    ("two_sharers_sequential", "sharer1"),
    ("gates_closed", "receiver"),
)
"""Every decoder that is computed: a sharer whose gates are all closed is not."""

each_decoder = pytest.mark.parametrize(
    ("pair", "name"),
    [pytest.param(pair, name, marks=pytest.mark.xdist_group(pair), id=f"{pair}-{name}") for pair, name in DECODERS],
)
