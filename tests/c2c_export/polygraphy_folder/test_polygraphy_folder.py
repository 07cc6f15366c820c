"""Polygraphy's own command line works on a bundle as it stands, with the scripts and shapes that lie in it."""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from c2c_export.bundle import Bundle, TensorSpec

PAIR = "llama_from_gemma3_aligned"
GRAPHS = ("receiver", "sharer0", "fuser0")
pytestmark = pytest.mark.xdist_group(PAIR)


@pytest.fixture
def bundle(recorded_bundle: Callable[[str], Path]) -> Path:
    return recorded_bundle(PAIR)


def polygraphy(bundle: Path, *arguments: str, **environment: str) -> str:
    """Run the command in the bundle's folder, as the documentation says; what it prints."""
    done = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), *arguments],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def options_in(path: Path) -> list[str]:
    return shlex.split(path.read_text())


def specs_of(bundle: Path, graph: str) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in Bundle.open(bundle).manifest.graphs[graph].inputs}


def test_the_manifest_has_the_hashes_of_all_its_files(bundle: Path):
    files = Bundle.open(bundle).manifest.files
    for graph in GRAPHS:
        for suffix in ("py", "json", "input-shapes", "trt-shapes"):
            assert f"polygraphy/{graph}.{suffix}" in files


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_scripts_feed_what_the_graph_takes(bundle: Path, graph: str):
    spec = importlib.util.spec_from_file_location(graph, bundle / "polygraphy" / f"{graph}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    feeds = list(script.load_data())
    assert len(feeds) == 3
    for feed in feeds:
        inputs = specs_of(bundle, graph)
        assert feed.keys() == inputs.keys()
        for name, array in feed.items():
            assert array.dtype == inputs[name].dtype
            assert len(array.shape) == len(inputs[name].shape)
    again = list(script.load_data())
    np.testing.assert_equal(feeds, again)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_run_on_prompts(bundle: Path, graph: str, tmp_path: Path):
    script, results = f"polygraphy/{graph}.py", str(tmp_path / "results.json")
    command = ("run", f"graphs/{graph}.onnx", "--onnxrt", "--data-loader-script", script, "--save-outputs", results)
    assert "PASSED" in polygraphy(bundle, *command)
    assert "3 iterations" in polygraphy(bundle, "inspect", "data", results)


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_run_on_random_inputs_of_the_shapes(bundle: Path, graph: str):
    shapes = options_in(bundle / "polygraphy" / f"{graph}.input-shapes")
    assert "PASSED" in polygraphy(bundle, "run", f"graphs/{graph}.onnx", "--onnxrt", *shapes)


def test_the_engine_runs_beside_the_portable_graph(bundle: Path):
    command = ("run", "graphs/fuser0.onnx", "--onnxrt", "--data-loader-script", "polygraphy/fuser0.py", "--validate")
    assert "PASSED" in polygraphy(bundle, *command)


def test_graphs_can_be_inspected(bundle: Path):
    assert "fused_tokens" in polygraphy(bundle, "inspect", "model", "graphs/fuser0.onnx")


def test_surgeon_cuts_and_cleans_graphs(bundle: Path, tmp_path: Path):
    pytest.importorskip("onnx_graphsurgeon")
    part, clean = str(tmp_path / "part.onnx"), str(tmp_path / "clean.onnx")
    polygraphy(bundle, "surgeon", "extract", "graphs/fuser0.onnx", "--outputs", "key.0:auto", "-o", part)
    assert "value.0" not in polygraphy(bundle, "inspect", "model", part).split("Node(s)")[0].split("Output(s)")[1]
    polygraphy(bundle, "surgeon", "sanitize", "graphs/receiver.onnx", "--cleanup", "-o", clean)
    assert Path(clean).is_file()


def test_tensorrt_rtx_builds_a_graph_through_polygraphys_own_switch(bundle: Path, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    shapes = options_in(bundle / "polygraphy" / "fuser0.trt-shapes")
    engine = str(tmp_path / "fuser0.engine")
    command = ("convert", "graphs/fuser0.onnx", "--convert-to", "trt", "--strongly-typed", *shapes, "-o", engine)
    polygraphy(bundle, *command, POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert Path(engine).stat().st_size > 10_000
