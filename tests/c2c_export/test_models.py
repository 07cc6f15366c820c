"""Loading models for export: what is read from a folder, and the one clear message for everything that is refused."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, WINDOW, build_model
from transformers import AutoConfig

from c2c_export.errors import C2CError
from c2c_export.models import (
    SUPPORTED_ARCHITECTURES,
    ModelShape,
    load_weights,
    model_record,
    read_config,
    read_stop_ids,
    shape_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of a recorded Qwen3: 4 layers, 2 key/value heads of 16, 512 tokens."""
    return Path(shutil.copytree(GOLDEN / "qwen3_from_qwen2" / "receiver", tmp_path / "model"))


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in {**content, **fields}.items() if value is not ...}))


def refusal(action: Callable[[], object]) -> str:
    """The message of the `C2CError` that `action` raises: at most two lines."""
    with pytest.raises(C2CError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert len(message) < 600
    assert "Traceback" not in message
    return message


def config_refusal(folder: Path) -> str:
    message = refusal(lambda: read_config(folder))
    assert str(folder) in message
    return message


def weights_refusal(folder: Path) -> str:
    message = refusal(lambda: load_weights(folder, read_config(folder)))
    assert str(folder) in message
    return message


# Configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_every_supported_architecture_is_read(name: str, tmp_path: Path) -> None:
    model = build_model(CONFIGS[name]())
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    shape = shape_of(config)
    cache_width = dict(model.named_parameters())["model.layers.0.self_attn.k_proj.weight"].shape[0]
    assert shape == ModelShape(
        architecture=type(model).__name__,
        num_layers=2,
        num_key_value_heads=1 if name == "gemma3" else 2,
        head_dim={"qwen3_wide_heads": 12, "gemma3": 16}.get(name, 8),
        vocab_size=61,
        sliding_window=WINDOW if name in ("qwen2_sliding_from_layer_1", "mistral_sliding", "gemma3") else None,
        max_position_embeddings=128,
    )
    assert shape.num_key_value_heads * shape.head_dim == cache_width
    loaded = load_weights(tmp_path, config)
    assert not loaded.training
    found = dict(loaded.named_parameters())
    for parameter, tensor in model.named_parameters():
        assert torch.equal(found[parameter], tensor)


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: t.to(torch.bfloat16) for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    model = load_weights(folder, read_config(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dict(model.named_parameters())[name], weights[name].to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"model_type": "gpt2", "architectures": None}, "gpt2"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGener"),
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ({"model_type": "no_such_model", "architectures": ["NoSuchForCausalLM"]}, "NoSuchForCausalLM"),
        (
            {
                "model_type": "own_code",
                "architectures": ["OwnCodeForCausalLM"],
                "auto_map": {"AutoConfig": "own_code.OwnConfig"},
            },
            "OwnCodeForCausalLM",
        ),
    ],
)
def test_an_unsupported_architecture_is_named_with_the_supported_ones(
    folder: Path, fields: dict[str, Any], named: str
) -> None:
    edit_json(folder / "config.json", **fields)
    (folder / "own_code.py").write_text("raise SystemExit('code of a model was run')\n")
    message = config_refusal(folder)
    assert named in message
    assert "not supported" in message
    assert all(architecture in message for architecture in SUPPORTED_ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"hidden_size": -64}, "-64"),
        ({"num_key_value_heads": 3}, "k_proj"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_configuration_that_cannot_be_exported_is_refused_by_field(
    folder: Path, fields: dict[str, Any], expected: str
) -> None:
    edit_json(folder / "config.json", **fields)
    assert expected in weights_refusal(folder)


@pytest.mark.parametrize("window", [0, -3])
def test_a_sliding_window_without_positions_is_refused(tmp_path: Path, window: int) -> None:
    build_model(CONFIGS["mistral_sliding"]()).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", sliding_window=window)
    assert f"field sliding_window is {window}; expected null or at least 1 position" in config_refusal(tmp_path)


def test_softcapped_or_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["gemma3"]()
    for field, value in (("attn_logit_softcapping", 50.0), ("use_bidirectional_attention", True)):
        config.save_pretrained(tmp_path)
        edit_json(tmp_path / "config.json", architectures=["Gemma3ForCausalLM"], **{field: value})
        assert field in config_refusal(tmp_path)


def test_length_dependent_rotary_angles_of_one_kind_of_layer_are_refused(tmp_path: Path) -> None:
    CONFIGS["gemma3"]().save_pretrained(tmp_path)
    rotary = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    rotary["full_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    edit_json(tmp_path / "config.json", rope_parameters=rotary)
    assert "dynamic" in config_refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"{}", b'{"model_type": 3}', b"null", b'{"model_type": null}']
)
def test_a_broken_configuration_is_refused_by_file(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json" in config_refusal(folder)


def test_a_folder_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in config_refusal(folder)


# Weights


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weights_refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_weights_are_refused(folder: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    weights_refusal(folder)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    load_weights(folder, read_config(folder)).save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    weights_refusal(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_weights(folder, lambda weights: weights.pop(name))
    assert name in weights_refusal(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    assert name in weights_refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    name = "model.layers.3.self_attn.q_norm.weight"
    edit_weights(folder, lambda weights: weights[name].__setitem__(5, value))
    assert name in weights_refusal(folder)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


def test_code_in_pickled_weights_is_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": _Code()}))
    weights_refusal(folder)
    assert not (tmp_path / "code-was-run").exists()


# Stop ids


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([7, 9], 5, 3, (7, 9)),
        (7, 5, 3, (7,)),
        (0, 5, 3, (0,)),
        (None, [5, 6], 3, (5, 6)),
        (None, 0, 3, (0,)),
        (None, None, 3, (3,)),
        (None, None, None, ()),
        (..., [5, 6], 3, (5, 6)),
        (..., None, 3, (3,)),
    ],
)
def test_stop_ids_come_from_the_first_place_that_names_any(
    folder: Path, generation: Any, config: Any, tokenizer: int | None, expected: tuple[int, ...]
) -> None:
    if generation is ...:
        (folder / "generation_config.json").unlink()
    else:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit_json(folder / "config.json", eos_token_id=config)
    assert read_stop_ids(folder, AutoConfig.from_pretrained(folder), tokenizer) == expected


def test_a_broken_generation_config_is_refused_rather_than_passed_over(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7,')
    config = read_config(folder)
    assert "generation_config.json" in refusal(lambda: read_stop_ids(folder, config, 3))


# Records


def test_the_record_names_every_file_of_the_model_by_its_hash_and_no_other(folder: Path) -> None:
    shape = shape_of(read_config(folder))
    record = model_record("some/model", folder, shape, "model")
    assert set(record.sources) == {path.name for path in folder.iterdir()}
    (folder / "README.md").write_text("# What it is good for")
    (folder / "LICENSE").write_text("Do as you like")
    assert model_record("some/model", folder, shape, "model") == record
    assert (record.source, record.architecture, record.num_layers) == ("some/model", "Qwen3ForCausalLM", 4)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    changed = model_record("some/model", folder, shape, "model").sources
    assert {name for name in changed if changed[name] != record.sources[name]} == {"config.json"}


def test_a_single_file_source_is_hashed_itself(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert set(model_record(str(path), folder, shape_of(read_config(folder)), "model").sources) == {path.name}


@pytest.mark.parametrize("value", ['[1, "x"]', '"<eos>"', "true", "1.5"])
def test_a_stop_id_that_is_no_token_id_is_named(tmp_path: Path, value: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "qwen3_from_qwen2" / "receiver", folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    message = refusal(lambda: read_stop_ids(folder, read_config(folder), 2))
    assert "generation_config.json" in message
    assert "eos_token_id" in message or "transformers cannot read it" in message
