"""The level `caches`: what it measures, and what it names first, of a whole pair's caches with one thing wrong."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked_bundles import PROMPTS, context_of
from recorded_pairs import each_pair

from c2c_export.check.engine import EnginePrompt
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.levels.caches import check_caches

BundleOf = Callable[[str], Path]
PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def context(recorded_bundle: BundleOf) -> CheckContext:
    return context_of(recorded_bundle(PAIR), PAIR)


def changed(context: CheckContext, change: Callable[[EnginePrompt], EnginePrompt], prompt: int) -> LevelResult:
    """The level's result where the engine's side of one prompt is another."""
    prefill = context.engine.prefill

    def prefill_and_change(asked: Any) -> EnginePrompt:
        found = prefill(asked)
        return change(found) if asked is PROMPTS[prompt] else found

    context.engine.prefill = prefill_and_change  # type: ignore[method-assign]
    return check_caches(context)


def replaced(layers: tuple[np.ndarray, ...], layer: int, cache: np.ndarray) -> tuple[np.ndarray, ...]:
    return (*layers[:layer], cache, *layers[layer + 1 :])


@each_pair
def test_the_exported_engine_is_within_float_rounding_of_the_trained_models(pair: str, recorded_bundle: BundleOf):
    result = check_caches(context_of(recorded_bundle(pair), pair))
    assert result.passed
    assert {measurement.name: measurement.value < 1e-4 for measurement in result.measurements} == {
        "row error": True,
        "relative error": True,
    }


def test_every_layer_and_projector_is_described(context: CheckContext):
    result = check_caches(context)
    manifest = context.bundle.manifest
    assert [layer.layer for layer in result.caches] == list(range(manifest.receiver.num_layers))
    assert all(len(layer.key.head_errors) == manifest.receiver.num_key_value_heads for layer in result.caches)
    assert all(max(layer.key.head_errors) == layer.key.max_error for layer in result.caches)
    links = [(link.receiver_layer, link.sharer_layer, link.key_gate_open) for link in manifest.sharers[0].links]
    assert [(p.receiver_layer, p.sharer_layer, p.key_gate_open) for p in result.projectors] == links
    assert all(0 < projector.key_weight < 1 for projector in result.projectors)


def test_keys_and_values_swapped_in_a_layer_are_named(context: CheckContext):
    def swap(found: EnginePrompt) -> EnginePrompt:
        return dataclasses.replace(
            found,
            keys=replaced(found.keys, 2, found.values[2]),
            values=replaced(found.values, 2, found.keys[2]),
        )

    result = changed(context, swap, prompt=1)
    assert not result.passed
    (first,) = result.divergences
    assert (first.graph, first.layer, first.kind, first.token) == ("receiver", 2, "key", 0)
    assert "prompt 1 (Name three rivers, one a line.)" in first.message
    assert "looks like the layer's values" in first.message


def test_one_row_of_one_head_is_named(context: CheckContext):
    def disturb(found: EnginePrompt) -> EnginePrompt:
        values = found.values[3].copy()
        values[1, 5] += 0.01
        return dataclasses.replace(found, values=replaced(found.values, 3, values))

    (first,) = changed(context, disturb, prompt=0).divergences
    assert (first.layer, first.kind, first.head, first.token) == (3, "value", 1, 5)
    assert "1 of " in first.message


def test_the_lowest_layer_comes_first_whichever_prompt_it_is_in(context: CheckContext):
    def disturb(found: EnginePrompt) -> EnginePrompt:
        keys = tuple(key + (0.1 if layer >= 1 else 0.0) for layer, key in enumerate(found.keys))
        return dataclasses.replace(found, keys=keys)

    (first,) = changed(context, disturb, prompt=1).divergences
    assert (first.layer, first.kind, first.token) == (1, "key", 0)


def test_what_is_not_a_number_fails(context: CheckContext):
    def disturb(found: EnginePrompt) -> EnginePrompt:
        keys = found.keys[0].copy()
        keys[0, 3, 0] = np.nan
        return dataclasses.replace(found, keys=replaced(found.keys, 0, keys))

    result = changed(context, disturb, prompt=0)
    assert not result.passed
    assert result.divergences[0].token == 3
