"""Models of published shapes, cut small here: they export, run, and have the parameters that are published."""

import contextlib
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from c2c_export.pair import PairOptions, export_pair
from c2c_export.projector import projector_shapes
from runtime import C2CPipeline

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_shapes.py"
FIRST = "qwen3-0.6b+qwen2.5-0.5b"


@pytest.fixture(scope="module")
def make_shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_shapes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_shapes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_first_pair_has_the_published_number_of_parameters(make_shapes: ModuleType):
    from transformers import AutoModelForCausalLM

    pair = make_shapes.configs(FIRST, None)
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            for config in (pair.receiver, pair.sharer)
        ]
    assert [round(count / 1e6) for count in counts] == [596, 494]  # "0.6B" and "0.5B" on their model cards
    shapes = projector_shapes(
        source_dim=64,
        target_dim=128,
        source_num_heads=2,
        target_num_heads=8,
        intermediate_dim=1024,
        hidden_dim=1024,
        num_layers=3,
    )
    assert round(28 * sum(math.prod(shape) for shape in shapes.values()) / 1e6) == 478


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "25"], "--layers 25: expected at most 24, which both models have"),
        (["--layers", "0"], "--layers 0: expected at least 1"),
        ([], "sharer is there already; name another folder"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(
    arguments: list[str],
    message: str,
    make_shapes: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    if not arguments:
        (tmp_path / "sharer").mkdir()
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", FIRST, str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as raised:
        make_shapes.main()
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "receiver").exists()


def test_a_cut_pair_exports_and_runs(make_shapes: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(make_shapes.RECEIVERS, "qwen3-0.6b", (64, 96, 28, 4, 2, 300, True))
    monkeypatch.setitem(make_shapes.SHARERS, "qwen2.5-0.5b", (48, 64, 24, 4, 2, 300, True))
    monkeypatch.setattr(make_shapes, "_FUSER", {"hidden_dim": 32, "intermediate_dim": 32, "num_layers": 3})
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", FIRST, str(tmp_path), "--layers", "2"])
    make_shapes.main()
    tensors = load_file(tmp_path / "receiver" / "model.safetensors")
    assert "lm_head.weight" not in tensors  # it is the embedding
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    options = PairOptions(
        receiver=str(tmp_path / "receiver"),
        sharers=[str(tmp_path / "sharer")],
        fusers=[str(tmp_path / "fuser")],
        output=tmp_path / "bundle",
        max_length=32,
    )
    pipeline = C2CPipeline.from_bundle(export_pair(options, lambda _: contextlib.nullcontext()), num_threads=1)
    (sharer,) = pipeline.bundle.manifest.sharers
    assert all(link.key_gate_open and link.value_gate_open for link in sharer.links)
    assert [(link.receiver_layer, link.sharer_layer) for link in sharer.links] == [(0, 0), (1, 1)]
    alone, fused = (
        pipeline.generate(input_ids=[1, 299, 7], max_new_tokens=4, ignore_eos=True, fuse=fuse).token_ids
        for fuse in (False, True)
    )
    assert len(alone) == len(fused) == 4
    assert pipeline.generate("Hi", max_new_tokens=1).token_ids
