"""What a target says of the models and capacities that it is slow with or does not take."""

import contextlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import RunCli

from c2c_export.pair import PairOptions, export_pair
from engines.targets import SlowAttentionWarning, target_of, warn_of_slow_attention

GOLDEN = Path(__file__).parents[1] / "golden"
PAIR = "qwen3_from_qwen2"
"""Its sharer has heads of 12, its receiver of a multiple of 8."""
MESSAGE = r"its head size of 12 is no multiple of 8, so every token costs on ort-cpu what a full cache costs"


def test_only_models_that_the_cpu_is_slow_with_are_warned_of():
    with pytest.warns(SlowAttentionWarning, match=rf"^b: {MESSAGE}") as found:
        warn_of_slow_attention("ort-cpu", [("a", 64), ("b", 12), ("c", 8)])
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_attention("tensorrt-rtx", [("b", 12)])


@pytest.mark.xdist_group(PAIR)
def test_building_for_the_cpu_shows_the_warning(
    run_cli: RunCli, recorded_bundle: Callable[[str], Path], tmp_path: Path
):
    bundle = shutil.copytree(recorded_bundle(PAIR), tmp_path / "bundle")
    code, _, err = run_cli("build", bundle, "--engine", "ort-cpu", "--precision", "int8")
    assert code == 0, err
    assert err.count("warning: ") == err.count("its head size of 12 is no multiple of 8") == 1


def test_exporting_a_model_warns_of_it(tmp_path: Path):
    options = PairOptions(str(GOLDEN / PAIR / "sharer"), (), (), tmp_path / "sharer.bundle", max_length=64)
    with pytest.warns(SlowAttentionWarning, match=MESSAGE):
        export_pair(options, lambda _: contextlib.nullcontext())


def test_a_capacity_that_the_cpu_does_not_take_is_refused_with_what_it_would_cost():
    target = target_of("ort-cpu")
    refusal = target.refusal("fp32", capacity=target.max_capacity + 1)
    assert refusal is not None
    gigabytes = 4 * target.max_capacity**2 / 1e9
    assert f"takes 4 x capacity x capacity bytes ({gigabytes:.0f} GB there), and 12 in models with" in refusal
