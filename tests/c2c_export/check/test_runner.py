"""The runner of engines: inputs are fed, caches written in place in buffers of its own, outputs are copies."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import Comparator, RunResults
from polygraphy.exception import PolygraphyException

from c2c_export.check.runner import EngineRunner
from engines.ort.engine import OrtCpuEngine

PAIR = "qwen3_from_qwen2"
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def runner(recorded_bundle: Callable[[str], Path]) -> EngineRunner:
    return EngineRunner(lambda: OrtCpuEngine(recorded_bundle(PAIR) / "graphs" / "fuser0.onnx", 1), "engine")


def feed_of(runner: EngineRunner, num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    feed = {}
    for name, (dtype, shape) in runner.get_input_metadata(use_numpy_dtypes=False).items():
        sizes = [num_rows if isinstance(size, str) else size for size in shape]
        feed[name] = random.standard_normal(sizes).astype(dtype.numpy())
    rows = np.arange(num_rows)
    return feed | {"sharer_rows": rows, "receiver_rows": rows + 3, "write_index": np.array([3])}


def test_outputs_are_the_caches_with_rows_written_and_the_feed_stays_as_it_was(runner: EngineRunner):
    with runner:
        feed = feed_of(runner, 4)
        before = {name: array.copy() for name, array in feed.items()}
        outputs = runner.infer(feed)
    for name, array in feed.items():
        np.testing.assert_array_equal(array, before[name])
    for name, output in outputs.items():
        past = feed[f"past_{name}"]
        assert (output[:, :, 3:7] != past[:, :, 3:7]).any(-1).all()
        np.testing.assert_array_equal(np.delete(output, range(3, 7), axis=2), np.delete(past, range(3, 7), axis=2))


def test_outputs_are_copies_that_the_next_run_leaves_alone(runner: EngineRunner):
    with runner:
        first = runner.infer(feed_of(runner, 4))
        kept = {name: array.copy() for name, array in first.items()}
        runner.infer(feed_of(runner, 4, seed=1))
        runner.infer(feed_of(runner, 2, seed=2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])


def test_the_time_of_a_run_is_told(runner: EngineRunner):
    with runner:
        runner.infer(feed_of(runner, 4))
        assert 0 < runner.last_inference_time() < 60


def test_a_missing_input_is_refused(runner: EngineRunner):
    with runner:
        feed = feed_of(runner, 4)
        del feed["past_key.0"]
        with pytest.raises(PolygraphyException, match=r"past_key\.0"):
            runner.infer(feed)


def test_results_are_those_that_the_comparator_saves(runner: EngineRunner, tmp_path: Path):
    with runner:
        feed = feed_of(runner, 4)
        expected = runner.infer(feed)
    Comparator.run([runner], data_loader=[feed], save_outputs_path=str(tmp_path / "results.json"))
    (saved,) = RunResults.load(str(tmp_path / "results.json"))["engine"]
    for name, output in expected.items():
        np.testing.assert_array_equal(saved[name], output)
