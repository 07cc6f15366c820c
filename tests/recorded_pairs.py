"""The names of the recorded pairs in tests/golden, for tests that go through all of them."""

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
