"""A fuser checkpoint folder in the reference's own layout in, checked records and weights out.

    config.json                          the training configuration: alignment and fusion mode
    final/projector_config.json          {"0": {"1": {"<t>": [[m, i]]}}}: receiver layer t, sharer layer m, projector i
    final/projector_<i>.json             {"class": "C2CProjector", "init_args": {...}}
    final/projector_<i>.pt               the weights; projector_<i>.safetensors is read instead where it exists

In: that folder, or the one with the projector files itself (config.json then lies in it or in its parent).
Out: `FuserCheckpoint`. Not covered: aggregators, other projector classes, more than one sharer in a folder, downloads.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, RootModel, StrictBool, ValidationError

from c2c_export.bundle import AlignmentStrategy, FusionMode, sha256_of
from c2c_export.errors import C2CError, UsageError
from c2c_export.projector import ProjectorWeights, projector_shapes, read_projector_state

_LAYOUT = "a fuser folder holds config.json, final/projector_config.json, final/projector_<i>.json and .pt"
_MAP_NAME = "projector_config.json"


@dataclass(frozen=True)
class ProjectorLink:
    """Projector number `projector` corrects `receiver_layer` from `sharer_layer`."""

    receiver_layer: int
    sharer_layer: int
    projector: int


@dataclass(frozen=True, eq=False)
class FuserCheckpoint:
    """A fuser as it was trained: how prompts are aligned, which layers are linked, and the projectors' weights."""

    folder: Path
    """The folder with config.json."""
    aligned: bool
    alignment_strategy: AlignmentStrategy
    """Of no effect when `aligned` is False."""
    fusion_mode: FusionMode | None
    """The mode for several sharers that the configuration asks for; None when it names none."""
    links: tuple[ProjectorLink, ...]
    """One per fused receiver layer, by ascending receiver layer."""
    projectors: dict[int, ProjectorWeights]
    """The projectors that `links` name."""
    files: dict[str, str]
    """sha256 of each file that was read, by path relative to `folder`, with forward slashes."""


class _FusionSettings(BaseModel):
    is_do_alignment: StrictBool = False
    alignment_strategy: AlignmentStrategy = "first"
    multi_source_fusion_mode: FusionMode | None = None


class _ModelSection(_FusionSettings):
    rosetta_config: _FusionSettings = _FusionSettings()


class _Config(_ModelSection):
    model: _ModelSection = _ModelSection()


_Index = Annotated[int, Field(strict=True, ge=0)]
_Size = Annotated[int, Field(strict=True, ge=1)]
# Only the spelling that json.dump gives an integer: "1" and "01" would be one layer twice.
_IndexKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$")]


class _LayerMap(RootModel[dict[_IndexKey, dict[_IndexKey, dict[_IndexKey, list[tuple[_Index, _Index]]]]]]):
    pass


class _AggregatorMap(RootModel[dict[str, Any]]):
    pass


class _InitArgs(BaseModel):
    """The defaults are the reference's; arguments that matter for training only are ignored."""

    source_dim: _Size
    target_dim: _Size
    source_num_heads: _Size = 1
    target_num_heads: _Size = 1
    intermediate_dim: _Size = 1024
    hidden_dim: _Size = 1024
    # The upper bound keeps a damaged number from asking for billions of tensor names.
    num_layers: Annotated[int, Field(strict=True, ge=3, le=1000)] = 3


class _ProjectorConfig(BaseModel):
    # First, because the arguments of another class would fail with a misleading message.
    class_name: Literal["C2CProjector"] = Field(alias="class")
    init_args: _InitArgs


_Record = TypeVar("_Record", bound=BaseModel)


class _FolderReader:
    """Reads files below `root` and keeps the sha256 of each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests: dict[str, str] = {}

    def record(self, path: Path) -> None:
        """Hash `path`; raises `C2CError` when there is no such file or it cannot be read."""
        if not path.is_file():
            raise C2CError(f"{path}: no such file; {_LAYOUT}")
        try:
            self.digests[path.relative_to(self.root).as_posix()] = sha256_of(path)
        except OSError as error:
            raise C2CError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error

    def parse(self, path: Path, record_type: type[_Record]) -> _Record:
        """Hash and parse a JSON object; raises `C2CError` naming file and field."""
        self.record(path)
        try:
            content = json.loads(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise C2CError(f"{path}: not UTF-8 text (byte {error.start}); expected a JSON object") from error
        except (ValueError, RecursionError) as error:
            raise C2CError(f"{path}: not valid JSON ({error}); download or copy the fuser again") from error
        if not isinstance(content, dict):
            raise C2CError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
        try:
            return record_type.model_validate(content)
        except ValidationError as error:
            raise C2CError(f"{path}: {_first_problem(error)}") from error


def read_fuser(folder: Path) -> FuserCheckpoint:
    """Read and check a fuser checkpoint; `folder` may also be its `final/`.

    Raises `UsageError` when `folder` is no folder, and `C2CError`, naming file and field or tensor, when a file is
    missing, damaged, or not what a C2CProjector fuser of one sharer holds. No code in a weight file is executed.
    """
    root, weights_folder = _locate(folder)
    reader = _FolderReader(root)
    settings = _read_settings(reader, root / "config.json")
    links = _read_links(reader, weights_folder / _MAP_NAME)
    aggregators = weights_folder / "aggregator_config.json"
    if aggregators.exists() and reader.parse(aggregators, _AggregatorMap).root:
        raise C2CError(f"{aggregators}: this fuser uses aggregators, which are not supported; expected an empty object")
    indices = sorted({link.projector for link in links})
    return FuserCheckpoint(
        folder=root,
        aligned=settings.is_do_alignment,
        alignment_strategy=settings.alignment_strategy,
        fusion_mode=settings.multi_source_fusion_mode,
        links=links,
        projectors={index: _read_projector(reader, weights_folder, index) for index in indices},
        files=reader.digests,
    )


def check_fuser_fits(
    fuser: FuserCheckpoint,
    *,
    receiver_layers: int,
    receiver_num_key_value_heads: int,
    receiver_head_dim: int,
    sharer_layers: int,
    sharer_num_key_value_heads: int,
    sharer_head_dim: int,
) -> None:
    """Compare a fuser with the two models it is to join; cheap, so that it can come before any tracing.

    Raises `C2CError` naming the fuser's file and field, the value found, and the model that it disagrees with.
    """
    for link in fuser.links:
        for model, layer, num_layers in (
            ("receiver", link.receiver_layer, receiver_layers),
            ("sharer", link.sharer_layer, sharer_layers),
        ):
            if layer >= num_layers:
                raise C2CError(
                    f"{_file_named(fuser, _MAP_NAME)}: the entry of receiver layer {link.receiver_layer} names {model} "
                    f"layer {layer}, expected 0 to {num_layers - 1}, as the {model} has {num_layers} layers; "
                    f"give the {model} that this fuser was trained with"
                )
    receiver_heads, sharer_heads = receiver_num_key_value_heads, sharer_num_key_value_heads
    for index, projector in fuser.projectors.items():
        for model, field, quantity, found, expected in (
            ("receiver", "target_dim", "head size", projector.target_dim, receiver_head_dim),
            ("receiver", "target_num_heads", "number of key/value heads", projector.target_num_heads, receiver_heads),
            ("sharer", "source_dim", "head size", projector.source_dim, sharer_head_dim),
            ("sharer", "source_num_heads", "number of key/value heads", projector.source_num_heads, sharer_heads),
        ):
            if found != expected:
                raise C2CError(
                    f"{_file_named(fuser, f'projector_{index}.json')}: {field} is {found}, expected {expected}, the "
                    f"{quantity} of the {model}; give the {model} that this fuser was trained with"
                )


def _locate(folder: Path) -> tuple[Path, Path]:
    """The folder of config.json and the folder of the projector files."""
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UsageError(f"fuser {folder}: {problem}; {_LAYOUT}")
    if (folder / "final" / _MAP_NAME).is_file():
        return folder, folder / "final"
    if not (folder / _MAP_NAME).is_file():
        raise C2CError(f"fuser {folder}: has no final/{_MAP_NAME}; {_LAYOUT}")
    # A relative folder may have no parent in its own name.
    weights_folder = folder.absolute()
    return (weights_folder if (folder / "config.json").is_file() else weights_folder.parent), weights_folder


def _read_settings(reader: _FolderReader, path: Path) -> _FusionSettings:
    config = reader.parse(path, _Config)
    if not config.model_fields_set & {"model", "rosetta_config", "is_do_alignment"}:
        raise C2CError(f"{path}: field model: missing; expected the training configuration of a fuser")
    # The later place wins; the reference's evaluation, too, looks in `model` before its `rosetta_config`.
    places = (config.rosetta_config, config, config.model.rosetta_config, config.model)
    found: dict[str, Any] = {}
    for place in places:
        found |= place.model_dump(include=set(_FusionSettings.model_fields), exclude_unset=True)
    return _FusionSettings.model_validate(found)


def _read_links(reader: _FolderReader, path: Path) -> tuple[ProjectorLink, ...]:
    layer_map = reader.parse(path, _LayerMap).root
    if list(layer_map) != ["0"]:
        raise C2CError(f"{path}: target models {sorted(layer_map)}, expected ['0'], the receiver alone")
    sources = layer_map["0"]
    if len(sources) != 1:
        raise C2CError(f"{path}: field 0: source models {sorted(sources)}, expected one sharer per fuser folder")
    ((source, layers),) = sources.items()
    if not layers:
        raise C2CError(f"{path}: field 0.{source}: no layer, expected at least one")
    links = []
    for receiver_layer, pairs in layers.items():
        if not pairs:
            raise C2CError(f"{path}: field 0.{source}.{receiver_layer}: empty, expected [[sharer layer, projector]]")
        # Without an aggregator the reference uses the first pair and drops the results of the others.
        links.append(ProjectorLink(int(receiver_layer), *pairs[0]))
    return tuple(sorted(links, key=lambda link: link.receiver_layer))


def _read_projector(reader: _FolderReader, folder: Path, index: int) -> ProjectorWeights:
    dims = reader.parse(folder / f"projector_{index}.json", _ProjectorConfig).init_args.model_dump()
    weights_path = folder / f"projector_{index}.safetensors"
    if not weights_path.exists():
        weights_path = folder / f"projector_{index}.pt"
    reader.record(weights_path)
    return ProjectorWeights(**dims, state=read_projector_state(weights_path, projector_shapes(**dims)))


# Pydantic's own wording of these would show a private class or a regular expression.
_PLAIN_MESSAGES = {
    "model_type": "should be an object",
    "dict_type": "should be an object",
    "string_pattern_mismatch": "the name should be a model or layer number",
}


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    message = _PLAIN_MESSAGES.get(first["type"], first["msg"])
    found = "" if first["type"] == "missing" else f" (found {first['input']!r:.80})"
    return f"field {field}: {message}{found}"


def _file_named(fuser: FuserCheckpoint, name: str) -> Path:
    return next(fuser.folder / relative for relative in fuser.files if Path(relative).name == name)
