"""Reading fuser checkpoints: the recorded ones against what their files say, and what is refused, with its message."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from c2c_export.checkpoint import ProjectorLink, check_fuser_fits, read_fuser
from c2c_export.errors import C2CError, UsageError
from c2c_export.projector import projector_shapes

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED_FUSERS = sorted(GOLDEN.glob("*/fuser*"))
MAP = "final/projector_config.json"

State = dict[str, Any]


@pytest.fixture
def fuser(tmp_path: Path) -> Path:
    """A writable copy of a recorded fuser: four layers, 1 head of 12 (sharer) and 2 of 16 (receiver)."""
    return Path(shutil.copytree(GOLDEN / "qwen3_from_qwen2" / "fuser", tmp_path / "fuser"))


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_state(path: Path, edit: Callable[[State], Any]) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def refusal(folder: Path, kind: type[C2CError] = C2CError) -> str:
    """The message with which `folder` is refused: at most two lines."""
    with pytest.raises(C2CError) as caught:
        read_fuser(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert len(message) < 500
    return message


# Recorded checkpoints


@pytest.mark.parametrize("folder", RECORDED_FUSERS, ids=lambda path: "-".join(path.parts[-2:]))
def test_a_recorded_fuser_is_read_as_its_files_say(folder: Path) -> None:
    checkpoint = read_fuser(folder)
    layer_map = json.loads((folder / MAP).read_text())["0"]["1"]
    assert checkpoint.links == tuple(
        ProjectorLink(t, *layer_map[str(t)][0]) for t in sorted(int(key) for key in layer_map)
    )
    assert checkpoint.aligned is json.loads((folder.parent / "case.json").read_text())["aligned"]
    assert (checkpoint.alignment_strategy, checkpoint.fusion_mode, checkpoint.folder) == ("first", None, folder)
    for index, projector in checkpoint.projectors.items():
        args = json.loads((folder / f"final/projector_{index}.json").read_text())["init_args"]
        assert {name: getattr(projector, name) for name in args} == args
        saved = torch.load(folder / f"final/projector_{index}.pt", weights_only=True)
        del saved["gate_temperature"]
        assert projector.state.keys() == saved.keys()
        assert all(torch.equal(projector.state[name], saved[name]) for name in saved)
        assert projector.key_gate_open is (saved["key_gate_logit"].item() > 0)
        assert projector.value_gate_open is (saved["value_gate_logit"].item() > 0)


def test_every_file_that_was_read_is_hashed(fuser: Path) -> None:
    expected = {
        path.relative_to(fuser).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in fuser.rglob("*")
        if path.is_file()
    }
    assert read_fuser(fuser).files == expected


def test_the_final_folder_itself_gives_the_same_checkpoint(fuser: Path) -> None:
    whole, final = read_fuser(fuser), read_fuser(fuser / "final")
    assert (final.folder, final.files, final.links, final.aligned) == (fuser, whole.files, whole.links, whole.aligned)


def test_config_and_projectors_may_lie_in_one_folder(fuser: Path) -> None:
    shutil.move(fuser / "config.json", fuser / "final/config.json")
    checkpoint = read_fuser(fuser / "final")
    assert checkpoint.folder == fuser / "final"
    assert {"config.json", "projector_config.json", "projector_0.pt"} <= checkpoint.files.keys()


def test_a_relative_folder_is_read_from_inside(fuser: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fuser / "final")
    assert read_fuser(Path()).files == read_fuser(fuser).files


# config.json


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model": {}}, (False, "first", None)),
        ({"model": {"is_do_alignment": True}}, (True, "first", None)),
        (
            {"model": {"rosetta_config": {"is_do_alignment": True, "alignment_strategy": "longest"}}},
            (True, "longest", None),
        ),
        ({"is_do_alignment": True, "alignment_strategy": "longest"}, (True, "longest", None)),
        ({"rosetta_config": {"multi_source_fusion_mode": "parallel"}}, (False, "first", "parallel")),
        (
            {"model": {"is_do_alignment": False, "rosetta_config": {"is_do_alignment": True}}, "is_do_alignment": True},
            (False, "first", None),
        ),
        (
            {"model": {"multi_source_fusion_mode": "sequential"}, "training": {"seed": 42}},
            (False, "first", "sequential"),
        ),
    ],
)
def test_fusion_settings_are_found_where_published_configs_hold_them(
    fuser: Path, config: object, expected: tuple[bool, str, str | None]
) -> None:
    (fuser / "config.json").write_text(json.dumps(config))
    checkpoint = read_fuser(fuser)
    assert (checkpoint.aligned, checkpoint.alignment_strategy, checkpoint.fusion_mode) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"model": {"alignment_strategy": "prefix"}}', ["field model.alignment_strategy", "'prefix'", "'longest'"]),
        ('{"model": {"is_do_alignment": "yes"}}', ["field model.is_do_alignment", "'yes'"]),
        ('{"model": {"multi_source_fusion_mode": "mean"}}', ["field model.multi_source_fusion_mode", "'mean'"]),
        ('{"model": "Qwen"}', ["field model", "object", "'Qwen'"]),
        ('{"model_type": "qwen3"}', ["field model", "training configuration"]),
    ],
)
def test_a_wrong_setting_is_refused_by_field_and_value(fuser: Path, content: str, expected: list[str]) -> None:
    (fuser / "config.json").write_text(content)
    message = refusal(fuser)
    assert all(part in message for part in [str(fuser / "config.json"), *expected]), message


@pytest.mark.parametrize("name", ["config.json", MAP, "final/projector_1.json", "final/aggregator_config.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b'{"model": ', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
    ],
    ids=["empty", "cut", "deep", "latin-1", "list", "null"],
)
def test_a_damaged_json_file_is_refused_by_name(fuser: Path, name: str, content: bytes, expected: str) -> None:
    (fuser / name).write_bytes(content)
    message = refusal(fuser)
    assert str(fuser / name) in message
    assert expected in message


# Folders and missing files


def test_a_path_that_is_no_folder_is_a_usage_error(fuser: Path) -> None:
    assert "no such folder" in refusal(fuser / "nowhere", UsageError)
    assert "not a folder" in refusal(fuser / "config.json", UsageError)


@pytest.mark.parametrize("name", ["config.json", MAP, "final/projector_2.json", "final/projector_2.pt"])
def test_a_missing_file_is_named_with_the_expected_layout(fuser: Path, name: str) -> None:
    (fuser / name).unlink()
    message = refusal(fuser)
    assert name in message
    assert "a fuser folder holds config.json, final/projector_config.json" in message


def test_a_folder_in_place_of_a_weight_file_is_refused(fuser: Path) -> None:
    (fuser / "final/projector_2.safetensors").mkdir()
    assert "projector_2.safetensors: no such file" in refusal(fuser)


# The layer map


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, ["target models []"]),
        ({"1": {"0": {"0": [[0, 0]]}}}, ["target models ['1']", "receiver"]),
        ({"0": {"1": {"0": [[0, 0]]}}, "1": {}}, ["target models ['0', '1']"]),
        ({"0": {}}, ["source models []", "one sharer"]),
        ({"0": {"1": {"0": [[0, 0]]}, "2": {"0": [[0, 0]]}}}, ["source models ['1', '2']", "one sharer"]),
        ({"0": {"1": {}}}, ["field 0.1", "no layer"]),
        ({"0": {"1": {"3": []}}}, ["field 0.1.3", "empty"]),
        ({"0": {"1": {"3": [[0, -1]]}}}, ["field 0.1.3.0.1", "-1"]),
        ({"0": {"1": {"3": [[-2, 0]]}}}, ["field 0.1.3.0.0", "-2"]),
        ({"0": {"1": {"3": [[0.5, 0]]}}}, ["field 0.1.3.0.0", "0.5"]),
        ({"0": {"1": {"3": [[0, True]]}}}, ["field 0.1.3.0.1", "True"]),
        ({"0": {"1": {"3": [["0", 0]]}}}, ["field 0.1.3.0.0", "'0'"]),
        ({"0": {"1": {"3": [[0]]}}}, ["field 0.1.3.0.1", "required"]),
        ({"0": {"1": {"3": [[0, 0, 0]]}}}, ["field 0.1.3.0", "[0, 0, 0]"]),
        ({"0": {"1": {"3": 5}}}, ["field 0.1.3", "5"]),
        ({"0": {"1": {"-1": [[0, 0]]}}}, ["field 0.1.-1", "'-1'"]),
        ({"0": {"1": {"01": [[0, 0]]}}}, ["field 0.1.01", "'01'"]),
        ({"0": {"1": {"three": [[0, 0]]}}}, ["field 0.1.three", "'three'"]),
        ({"0": {"sharer": {"3": [[0, 0]]}}}, ["field 0.sharer", "'sharer'"]),
        ({"0": [[0, 0]]}, ["field 0", "object"]),
        ({"0": {"1": {"3": [[0, 77]]}}}, ["projector_77.json", "no such file"]),
    ],
)
def test_a_wrong_layer_map_is_refused_by_field_and_value(fuser: Path, content: object, expected: list[str]) -> None:
    (fuser / MAP).write_text(json.dumps(content))
    message = refusal(fuser)
    assert all(part in message for part in [str(fuser / "final"), *expected]), message


def test_the_first_of_several_pairs_is_used_and_only_linked_projectors_are_read(fuser: Path) -> None:
    (fuser / MAP).write_text(json.dumps({"0": {"7": {"10": [[2, 1]], "2": [[1, 3], [0, 0]], "3": [[0, 1]]}}}))
    (fuser / "final/projector_0.pt").write_bytes(b"never read")
    checkpoint = read_fuser(fuser)
    assert checkpoint.links == (ProjectorLink(2, 1, 3), ProjectorLink(3, 0, 1), ProjectorLink(10, 2, 1))
    assert sorted(checkpoint.projectors) == [1, 3]
    assert "final/projector_0.pt" not in checkpoint.files


def test_aggregators_are_refused_and_an_empty_aggregator_map_is_not(fuser: Path) -> None:
    path = fuser / "final/aggregator_config.json"
    path.write_text("{}")
    assert "final/aggregator_config.json" in read_fuser(fuser).files
    path.write_text(json.dumps({"0": {"1": {"0": 0}}}))
    message = refusal(fuser)
    assert str(path) in message
    assert "aggregators, which are not supported" in message


# projector_<i>.json


def test_further_and_training_arguments_of_a_projector_are_ignored(fuser: Path) -> None:
    extra = {"dropout": 0.1, "anneal_steps": 9, "zero_init": True, "dtype": {"__type__": "torch.dtype", "value": "x"}}
    edit_json(fuser / "final/projector_0.json", lambda content: content["init_args"].update(extra))
    assert read_fuser(fuser).projectors[0].hidden_dim == 32


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update({"class": "AllInOneProjector"}), ["field class", "'C2CProjector'", "'AllInOneProjector'"]),
        (lambda c: c.update({"class": "X", "init_args": {"other": 1}}), ["field class", "'X'"]),
        (lambda c: c.pop("class"), ["field class", "required"]),
        (lambda c: c.pop("init_args"), ["field init_args", "required"]),
        (lambda c: c["init_args"].pop("source_dim"), ["field init_args.source_dim", "required"]),
        (lambda c: c["init_args"].pop("target_dim"), ["field init_args.target_dim", "required"]),
        (lambda c: c["init_args"].update(num_layers=2), ["field init_args.num_layers", "3", "found 2"]),
        (lambda c: c["init_args"].update(num_layers=10**9), ["field init_args.num_layers", "1000"]),
        (lambda c: c["init_args"].update(hidden_dim=0), ["field init_args.hidden_dim", "found 0"]),
        (lambda c: c["init_args"].update(source_dim="6"), ["field init_args.source_dim", "'6'"]),
        (lambda c: c["init_args"].update(target_num_heads=True), ["field init_args.target_num_heads", "True"]),
    ],
)
def test_a_wrong_projector_description_is_refused(fuser: Path, edit: Callable[[Any], Any], expected: list[str]) -> None:
    edit_json(fuser / "final/projector_2.json", edit)
    message = refusal(fuser)
    assert all(part in message for part in ["projector_2.json", *expected]), message


def test_absent_sizes_are_those_of_the_reference(fuser: Path) -> None:
    sizes = {"source_num_heads": 1, "target_num_heads": 1, "intermediate_dim": 1024, "hidden_dim": 1024}
    sizes["num_layers"] = 3
    (fuser / MAP).write_text(json.dumps({"0": {"1": {"0": [[0, 0]]}}}))
    description = {"class": "C2CProjector", "init_args": {"source_dim": 2, "target_dim": 3}}
    (fuser / "final/projector_0.json").write_text(json.dumps(description))
    shapes = projector_shapes(source_dim=2, target_dim=3, **sizes)
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, fuser / "final/projector_0.pt")
    projector = read_fuser(fuser).projectors[0]
    assert {name: getattr(projector, name) for name in sizes} == sizes


size = st.integers(1, 4)


@given(size, size, size, size, size, size, st.integers(3, 6))
def test_the_expected_shapes_are_those_of_the_described_layers(
    source_dim: int, target_dim: int, sources: int, targets: int, intermediate: int, hidden: int, num_layers: int
) -> None:
    def block(width: int) -> torch.nn.Module:
        layers = {"w1": torch.nn.Linear(hidden, width, bias=False), "w2": torch.nn.Linear(width, hidden, bias=False)}
        return torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(hidden), **layers})

    def mlp(width: int, depth: int) -> torch.nn.Module:
        return torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block(width) for _ in range(depth)])})

    expected: dict[str, tuple[int, ...]] = {}
    for side in ("key", "value"):
        module = torch.nn.ModuleDict(
            {
                f"{side}_in": torch.nn.Linear(sources * source_dim + targets * target_dim, hidden),
                f"{side}_mlp1": mlp(intermediate, 1),
                f"{side}_scalar_mlp2": mlp(hidden, 1),
                f"{side}_scalar_head": torch.nn.Linear(hidden, targets),
                f"{side}_proj_mlp2": mlp(intermediate, num_layers - 2),
                f"{side}_proj_out": torch.nn.Linear(hidden, targets * target_dim),
            }
        )
        module.register_parameter(f"{side}_gate_logit", torch.nn.Parameter(torch.tensor(0.0)))
        expected |= {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = projector_shapes(
        source_dim=source_dim,
        target_dim=target_dim,
        source_num_heads=sources,
        target_num_heads=targets,
        intermediate_dim=intermediate,
        hidden_dim=hidden,
        num_layers=num_layers,
    )
    assert found == expected


# Weights


@pytest.mark.parametrize("logit", [0.0, -0.0, 1e-30, -1e-30])
def test_a_gate_is_open_only_above_zero(fuser: Path, logit: float) -> None:
    gates = {"key_gate_logit": torch.tensor(logit), "value_gate_logit": torch.tensor(-logit)}
    edit_state(fuser / "final/projector_0.pt", lambda state: state.update(gates))
    projector = read_fuser(fuser).projectors[0]
    assert (projector.key_gate_open, projector.value_gate_open) == (logit == 1e-30, logit == -1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_dtype_become_float32(fuser: Path, dtype: torch.dtype) -> None:
    path = fuser / "final/projector_0.pt"
    edit_state(path, lambda state: state.update({name: state[name].to(dtype) for name in state}))
    saved = torch.load(path, weights_only=True)
    for name, tensor in read_fuser(fuser).projectors[0].state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, saved[name].to(torch.float32))


def test_a_state_without_gate_temperature_in_the_old_file_format_is_read(fuser: Path) -> None:
    path = fuser / "final/projector_0.pt"
    state = torch.load(path, weights_only=True)
    del state["gate_temperature"]
    state["key_in.weight"] = torch.nn.Parameter(state["key_in.weight"].T.contiguous().T)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    tensor = read_fuser(fuser).projectors[0].state["key_in.weight"]
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert torch.equal(tensor, state["key_in.weight"])


def test_safetensors_wins_over_pt(fuser: Path) -> None:
    state = torch.load(fuser / "final/projector_1.pt", weights_only=True)
    state["key_in.bias"] = torch.full((32,), 2.5)
    save_file(state, fuser / "final/projector_1.safetensors")
    (fuser / "final/projector_1.pt").write_bytes(b"never read")
    checkpoint = read_fuser(fuser)
    assert torch.equal(checkpoint.projectors[1].state["key_in.bias"], state["key_in.bias"])
    assert "gate_temperature" not in checkpoint.projectors[1].state
    assert "final/projector_1.safetensors" in checkpoint.files
    assert "final/projector_1.pt" not in checkpoint.files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda whole: b"", "empty"),
        (lambda whole: whole[: len(whole) // 2], "damaged"),
        (lambda whole: whole[:-3], "damaged"),
        (lambda whole: b"\0" * len(whole), "damaged"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "damaged"),
        (lambda whole: b"hello world, this is text", "damaged"),
    ],
    ids=["empty", "half", "cut", "zeros", "lfs-pointer", "text"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_weight_file_is_refused_by_name(
    fuser: Path, suffix: str, damage: Callable[[bytes], bytes], expected: str
) -> None:
    path = fuser / f"final/projector_1{suffix}"
    if suffix == ".safetensors":
        save_file(torch.load(fuser / "final/projector_1.pt", weights_only=True), path)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(fuser)
    assert str(path) in message
    assert expected in message


class Malicious:
    """Unpickled by an unguarded reader, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch.save", "inside a state dict", "old format", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_executed(fuser: Path, tmp_path: Path, kind: str) -> None:
    path, target = fuser / "final/projector_0.pt", tmp_path / "executed"
    attack = Malicious(target)
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(attack))
    elif kind == "inside a state dict":
        edit_state(path, lambda state: state.update(extra=attack))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=kind == "torch.save")
    message = refusal(fuser)
    assert str(path) in message
    assert "nothing in it was executed" in message
    assert "posix.mkdir" in message or kind == "plain pickle"
    assert not target.exists()

    # The attack is real: an unguarded reader does execute it.
    pickle.loads(pickle.dumps(attack))
    assert target.exists()


def test_a_flipped_bit_in_a_pt_file_is_noticed(fuser: Path) -> None:
    path = fuser / "final/projector_0.pt"
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["key_in.weight"].numpy().tobytes()
    content[content.index(weights) + 100] ^= 1
    path.write_bytes(content)
    message = refusal(fuser)
    assert str(path) in message
    assert "damaged" in message


def test_a_pickled_module_is_refused_with_its_class(fuser: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), fuser / "final/projector_0.pt")
    message = refusal(fuser)
    assert "torch.nn.modules.linear.Linear" in message
    assert "state dict" in message


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda s: s.pop("key_in.weight"), ["tensor key_in.weight is missing", "[32, 44]"]),
        (lambda s: s.update({"extra.bias": torch.zeros(5)}), ["unexpected entry extra.bias", "[5]"]),
        (lambda s: s.update({3: "note"}), ["unexpected entry 3", "str"]),
        (
            lambda s: s.update({"key_proj_mlp2.blocks.1.norm.weight": torch.ones(32)}),
            ["unexpected entry key_proj_mlp2.blocks.1.norm.weight"],
        ),
        (lambda s: s.update({"value_in.bias": torch.zeros(31)}), ["value_in.bias has shape [31]", "expected [32]"]),
        (lambda s: s.update({"key_gate_logit": torch.zeros(1)}), ["key_gate_logit has shape [1]", "expected []"]),
        (lambda s: s.update({"key_in.bias": [0.0] * 32}), ["key_in.bias is a list"]),
        (lambda s: s.update({"key_in.bias": torch.zeros(32).to_sparse()}), ["key_in.bias", "sparse"]),
        (lambda s: s.update({"key_in.bias": torch.zeros(32, device="meta")}), ["key_in.bias", "meta"]),
        (lambda s: s.update({"key_in.bias": torch.zeros(32, dtype=torch.int64)}), ["key_in.bias", "torch.int64"]),
        (lambda s: s["key_proj_out.weight"][3].fill_(float("nan")), ["key_proj_out.weight", "32 values", "NaN"]),
        (lambda s: s["value_gate_logit"].fill_(float("inf")), ["value_gate_logit", "1 value", "infinite"]),
        (lambda s: s.update({"key_in.bias": torch.full((32,), 1e300, dtype=torch.float64)}), ["key_in.bias", "infin"]),
    ],
)
def test_a_wrong_state_is_refused_by_tensor(fuser: Path, edit: Callable[[State], Any], expected: list[str]) -> None:
    edit_state(fuser / "final/projector_3.pt", edit)
    message = refusal(fuser)
    assert all(part in message for part in ["projector_3.pt", *expected]), message


def test_a_list_in_place_of_a_state_dict_is_refused(fuser: Path) -> None:
    torch.save([torch.zeros(2)], fuser / "final/projector_0.pt")
    assert "holds a list, expected a state dict" in refusal(fuser)


# Fitting the models


def model_dims(folder: Path, role: str) -> dict[str, int]:
    """The arguments of `check_fuser_fits` for one model, from its own config.json."""
    config = json.loads((folder / "config.json").read_text())
    return {
        f"{role}_layers": config["num_hidden_layers"],
        f"{role}_num_key_value_heads": config["num_key_value_heads"],
        f"{role}_head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }


@pytest.mark.parametrize("folder", RECORDED_FUSERS, ids=lambda path: "-".join(path.parts[-2:]))
def test_the_models_that_a_fuser_was_trained_with_fit(folder: Path) -> None:
    sharer = folder.parent / folder.name.replace("fuser", "sharer")
    dims = model_dims(folder.parent / "receiver", "receiver") | model_dims(sharer, "sharer")
    check_fuser_fits(read_fuser(folder), **dims)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"receiver_layers": 3}, ["projector_config.json", "receiver layer 3", "0 to 2", "3 layers"]),
        ({"sharer_layers": 2}, ["projector_config.json", "sharer layer 2", "0 to 1", "2 layers"]),
        ({"receiver_num_key_value_heads": 8}, ["projector_0.json", "target_num_heads is 2", "expected 8", "receiver"]),
        ({"receiver_head_dim": 64}, ["projector_0.json", "target_dim is 16", "expected 64", "receiver"]),
        ({"sharer_num_key_value_heads": 2}, ["projector_0.json", "source_num_heads is 1", "expected 2", "sharer"]),
        ({"sharer_head_dim": 6}, ["projector_0.json", "source_dim is 12", "expected 6", "sharer"]),
    ],
)
def test_other_models_are_refused_by_field_and_model(change: dict[str, int], expected: list[str]) -> None:
    case = GOLDEN / "qwen3_from_qwen2"
    dims = model_dims(case / "receiver", "receiver") | model_dims(case / "sharer", "sharer") | change
    with pytest.raises(C2CError) as caught:
        check_fuser_fits(read_fuser(case / "fuser"), **dims)
    assert all(part in str(caught.value) for part in expected), str(caught.value)
