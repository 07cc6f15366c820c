"""The bundle: one relocatable, hash-locked folder that holds all that the runtime needs.

    manifest.json            `Manifest`: models, layer maps, gates, graphs, engines, and the sha256 of every file
    graphs/                  portable ONNX graphs: receiver.onnx, sharer<k>.onnx, fuser<k>.onnx, each with a .data file
    tokenizers/receiver/     see `c2c_export.tokenizer`; tokenizers/sharer<k>/ likewise
    alignment/sharer<k>.npy  int32 [receiver_vocab]: the sharer's token id for every receiver token id (aligned pairs)
    polygraphy/              data loader scripts and shapes for Polygraphy, see `c2c_export.polygraphy_folder`
    engines/<target>-<precision>[-<arch>]/

Dimension legend, used throughout the project: B batch, S new tokens, C capacity in rows, H key/value heads, D head
size, V vocabulary, N fused tokens. Nothing here imports torch or transformers.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from c2c_export.atomic_file import write_atomically
from c2c_export.check_record import CheckRecord
from c2c_export.errors import BundleError
from c2c_export.record import Record
from c2c_export.tokenizer import CHAT_TEMPLATE_NAME, SPECIAL_TOKENS_NAME, TOKENIZER_NAME

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
ENGINES = "engines/"
GRAPHS = "graphs"

FusionMode = Literal["parallel", "sequential"]
AlignmentStrategy = Literal["first", "longest"]


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError(f"{path!r} does not lie inside the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(_inside)]
"""The path of a file relative to the bundle's folder, with forward slashes."""


class TensorSpec(Record):
    """Name, numpy dtype name and shape of a graph's input or output; a dynamic dimension is its name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphRecord(Record):
    """A portable graph: where it lies in the bundle, its inputs and outputs, and what the passes did to it."""

    path: BundlePath
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    num_nodes: int
    num_bytes: int
    """Size of the graph with its weights."""
    passes: dict[str, int]
    """How often each pass applied, by name."""


class ModelRecord(Record):
    """One of the two (or more) language models, as it was exported."""

    source: str
    """The folder, file or hub id that was given."""
    architecture: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int | None
    """Window in positions of the layers that have one; None when every layer attends to everything."""
    max_position_embeddings: int
    chat_template: str
    """Where the chat template came from, for a reader of `inspect`."""
    sources: dict[str, str]
    """sha256 of every file of the model, by name; of what else lies beside them, as a README, none."""


class LayerLink(Record):
    """Which sharer layer feeds a receiver layer, through which projector, and whether its K and V gates are open."""

    receiver_layer: int
    sharer_layer: int
    projector: int
    key_gate_open: bool
    value_gate_open: bool


class SharerRecord(Record):
    """A sharer with its fuser."""

    model: ModelRecord
    fuser_source: str
    fuser_sources: dict[str, str]
    """sha256 of every fuser file, by path inside the checkpoint."""
    alignment_strategy: AlignmentStrategy | None
    """None for an unaligned pair: the sharer reads the receiver's own ids."""
    links: tuple[LayerLink, ...]
    sharer_graph: GraphRecord | None
    """None when every gate of the fuser is closed: there is nothing to compute."""
    fuser_graph: GraphRecord | None


Shape = tuple[int, ...]


class ProfileRecord(Record):
    """A range of shapes that an engine was built for: the smallest, optimal and largest shape of its dynamic inputs."""

    name: Literal["prefill", "decode", "fuse"]
    shapes: dict[str, tuple[Shape, Shape, Shape]]


class LayerCounts(Record):
    """How many native layers of each kind TensorRT's network of a graph has, and how many layers in all."""

    attention: int
    cache_updates: int
    rotary: int
    total: int


class ProfileSizes(Record):
    """The sizes that TensorRT's profiles were made of."""

    max_batch: int
    """Requests that one decode step serves at most."""
    decode_optimum: int
    """Requests of a decode step that kernels are chosen for."""
    prefill_optimum: int
    """Prompt tokens, likewise."""
    fuse_optimum: int
    """Fused tokens, likewise."""


class GpuRecord(Record):
    """The GPU that an engine was built on, where the builder needs one: it runs on no other model."""

    name: str
    compute_capability: str
    """Such as "8.9"."""


class BuiltGraphRecord(Record):
    """One graph's engine as it was built."""

    num_bytes: int
    seconds: float
    """What building took, lowering included."""
    quantized_weights: int
    """Matrices that became integers; 0 but for int8 and int4."""
    float_weights: int
    """Of those precisions: matrices whose shape does not allow integers."""
    casts: int
    """Casts that lowering the precision inserted."""
    rules: dict[str, int] = Field(default_factory=dict)
    """How often each rewrite rule of the target applied, by name."""
    layers: LayerCounts | None
    """Found in the parsed network. None for ONNX Runtime."""
    single_attention_kernels: bool
    """Whether the builder has one kernel for each attention; else it takes several, which store the scores."""
    cache_aliases: dict[str, str]
    """For each output that is written in place, the input whose memory it shares."""
    profiles: tuple[ProfileRecord, ...]


class BuildRecord(Record):
    """How an engine was built: equal inputs, options and versions give an equal engine, so a build can be skipped."""

    compute_capabilities: tuple[str, ...]
    """GPUs it was built for, such as "8.9"; empty for the target's default."""
    gpu: GpuRecord | None
    """The GPU it was built on and for; None where it was built without one."""
    profile_sizes: ProfileSizes | None
    """None for ONNX Runtime, whose engines take any shape."""
    flags: tuple[str, ...]
    versions: dict[str, str]
    sources: dict[str, str]
    """sha256 of the portable graphs and weights, by path in the bundle."""
    graphs: dict[str, BuiltGraphRecord]


class EngineRecord(Record):
    """An engine: the files it runs for each graph (`receiver`, `sharer0`, `fuser0`, …) and how its check went."""

    target: str
    precision: str
    graphs: dict[str, BundlePath]
    weights_folder: BundlePath | None = None
    """Where the graphs' weights lie, if not beside them: an engine in fp32 shares those of the portable graphs."""
    check: CheckRecord | None = None
    """None where it was never checked against the trained models."""
    build: BuildRecord | None = None
    """None where the portable graphs themselves are run, as ONNX Runtime does on a GPU in fp32."""


def engine_prefix(name: str) -> str:
    """What the paths of a built engine's files begin with."""
    return f"{ENGINES}{name}/"


class Manifest(Record):
    """`manifest.json`. `files` holds the sha256 of every other file of the bundle, by relative path."""

    schema_version: int
    tool_versions: dict[str, str]
    max_length: int
    """C: the capacity of every cache, in rows (real tokens)."""
    aligned: bool
    """False: all prompt tokens but the last are one fused section. True: message sections are fused."""
    fusion_mode: FusionMode
    stop_ids: tuple[int, ...]
    """Receiver token ids that end a generation."""
    receiver: ModelRecord
    receiver_graph: GraphRecord
    sharers: tuple[SharerRecord, ...]
    engines: dict[str, EngineRecord]
    files: dict[BundlePath, str]

    def without_engine(self, name: str) -> "Manifest":
        """This manifest without that engine and its files."""
        engines = {key: record for key, record in self.engines.items() if key != name}
        files = {path: digest for path, digest in self.files.items() if not path.startswith(engine_prefix(name))}
        return self.model_copy(update={"engines": engines, "files": files})

    @property
    def graphs(self) -> dict[str, GraphRecord]:
        """The portable graphs that an engine is made of, by the names that engines call them."""
        graphs = {"receiver": self.receiver_graph}
        for number, sharer in enumerate(self.sharers):
            if sharer.sharer_graph is not None and sharer.fuser_graph is not None:
                graphs |= {f"sharer{number}": sharer.sharer_graph, f"fuser{number}": sharer.fuser_graph}
        return graphs

    @model_validator(mode="after")
    def _engines_are_complete(self) -> Self:
        needed = self.graphs.keys()
        for name, engine in self.engines.items():
            if engine.graphs.keys() != needed:
                wrong = ", ".join(sorted(engine.graphs.keys() ^ needed))
                raise ValueError(f"engine {name} and the graphs of the bundle differ in {wrong}")
        return self


class Bundle:
    """An opened bundle: its `root` folder and `manifest`, every file of which was found unchanged."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, replacing: str | None = None) -> "Bundle":
        """Read the manifest and compare every file with its recorded sha256.

        `replacing` names an engine that is about to be built again: it is left out if its files are damaged.
        Raises `BundleError`, naming the file, when one is missing or changed, or when the schema version is another.
        """
        root = Path(path)
        manifest = read_manifest(root)
        for name, problem in _damaged_files(root, manifest.files):
            if replacing is not None and name.startswith(engine_prefix(replacing)):
                manifest = manifest.without_engine(replacing)
            else:
                remedy = "export the bundle again"
                if name.startswith(ENGINES):
                    remedy = "build that engine again with `c2c-export build … --rebuild`"
                raise BundleError(f"{root / name}: {problem}; {remedy}")
        return cls(root, manifest)

    def file(self, relative: str) -> Path:
        """The path of a file of the bundle, given its path in the manifest.

        Raises `BundleError` when the manifest lists no hash for it, or for the weights beside a graph.
        """
        for name in (relative, f"{relative}.data"):
            if name not in self.manifest.files and (name == relative or (self.root / name).exists()):
                raise BundleError(f"{self.root / name}: the manifest lists no hash for it; export the bundle again")
        return (self.root / relative).absolute()

    def weights_folder(self, engine: EngineRecord) -> Path | None:
        """The folder of the weights of the engine's graphs, if they do not lie beside them."""
        return None if engine.weights_folder is None else (self.root / engine.weights_folder).absolute()

    def engine_files(self, engine: EngineRecord) -> list[Path]:
        """The files of the engine's graphs and of their weights, wherever these lie."""
        graphs = [self.file(path) for path in engine.graphs.values()]
        found = [path for graph in graphs for path in graph.parent.glob(f"{graph.name}*")]
        folder = self.weights_folder(engine)
        return found if folder is None else [*found, *(folder / f"{graph.name}.data" for graph in graphs)]

    def tokenizer_folder(self, sharer: int | None = None) -> Path:
        """The folder with the receiver's tokenizer, or with that of sharer number `sharer`; errors as in `file`."""
        folder = "tokenizers/receiver" if sharer is None else f"tokenizers/sharer{sharer}"
        for name in (TOKENIZER_NAME, SPECIAL_TOKENS_NAME, CHAT_TEMPLATE_NAME):
            self.file(f"{folder}/{name}")
        return self.root / folder

    def alignment_file(self, sharer: int) -> Path:
        """The `.npy` file with the alignment table of sharer number `sharer`: int32 [receiver_vocab]; as `file`."""
        return self.file(f"alignment/sharer{sharer}.npy")


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle folder `root`; no file is compared with it. Raises `BundleError`."""
    path = root / MANIFEST_NAME
    try:
        exists = path.is_file()
    except OSError as error:
        raise BundleError(f"{root}: {error.strerror}; expected a bundle folder") from error
    if not exists:
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST_NAME}; write one with `c2c-export pair`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON ({error}); export the bundle again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; export the bundle again"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: field {field}: {first['msg']}; export the bundle again") from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest` into the bundle folder `root`, in place of the one that is there, at once or not at all."""
    write_atomically(root / MANIFEST_NAME, (manifest.model_dump_json(indent=1) + "\n").encode())


def hash_folder(root: Path) -> dict[str, str]:
    """The sha256 of every file below `root` but the manifest, by relative path with forward slashes."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return dict(zip(names, _hash_files(root, names), strict=True))


def sha256_of(path: Path) -> str:
    """The sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(root: Path, names: Iterable[str]) -> list[str]:
    # hashlib releases the interpreter lock, so large weight files are hashed side by side.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: sha256_of(root / name), names))


def _damaged_files(root: Path, files: dict[str, str]) -> Iterable[tuple[str, str]]:
    present = [name for name in files if (root / name).is_file()]
    for name in sorted(files.keys() - set(present)):
        yield name, "missing"
    try:
        digests = _hash_files(root, present)
    except OSError as error:
        raise BundleError(f"{error.filename}: cannot be read: {error.strerror}") from error
    for name, digest in zip(present, digests, strict=True):
        if digest != files[name]:
            yield name, "changed since the bundle was written (its sha256 differs)"
