"""The bundle's folder `polygraphy/`: what lets NVIDIA's Polygraphy work on the portable graphs as they stand.

In: a bundle's folder with its tokenizers, and its manifest. Out, per graph:

    <graph>.py              `load_data` for `polygraphy run … --data-loader-script`, from `decoder_data.py` or
                            `fuser_data.py`
    <graph>.json            what that script feeds: the graph's inputs, the capacity, token ids of a few prompts
    <graph>.input-shapes    `--input-shapes …`, for `polygraphy … $(cat <graph>.input-shapes)`
    <graph>.trt-shapes      `--trt-min-shapes … --trt-opt-shapes … --trt-max-shapes …`, the profiles that `build` takes

The prompts are the first of those that come with `c2c_export.check`. docs/polygraphy.md has the commands. Not covered:
graphs in a lower precision, which take the same inputs in another type.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from c2c_export.bundle import GraphRecord, Manifest, ProfileSizes, TensorSpec
from c2c_export.chat_template import render
from c2c_export.errors import C2CError
from c2c_export.tokenizer import BundledTokenizer
from engines.trt.build import decoder_profiles, fuser_profiles

FOLDER = "polygraphy"
_NUM_PROMPTS = 2
_OPTIMUM = 512
_MAX_BATCH = 8
_EXAMPLE_SIZES = {"batch": 1, "tokens": 8, "fused_tokens": 8}


def write_polygraphy_folder(root: Path, manifest: Manifest) -> None:
    """Write the folder into the bundle at `root`, which has its tokenizers. Raises `OSError` when writing fails."""
    folder, max_length = root / FOLDER, manifest.max_length
    folder.mkdir()
    prompts: dict[str, list[list[int]]] = {}
    for name, graph in manifest.graphs.items():
        is_fuser = name.startswith("fuser")
        reader = "receiver" if is_fuser or not manifest.aligned else name
        if reader not in prompts:
            prompts[reader] = _prompts(root / "tokenizers" / reader, max_length - 1)
        script = "fuser_data.py" if is_fuser else "decoder_data.py"
        (folder / f"{name}.py").write_bytes((files(__package__) / script).read_bytes())
        content = {
            "capacity": max_length,
            "inputs": {spec.name: list(spec.shape) for spec in graph.inputs},
            "prompts": prompts[reader],
        }
        (folder / f"{name}.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
        shapes = {spec.name: _example_shape(spec) for spec in graph.inputs}
        (folder / f"{name}.input-shapes").write_text(_option("--input-shapes", shapes) + "\n", encoding="utf-8")
        (folder / f"{name}.trt-shapes").write_text(_profiles(graph, max_length, is_fuser), encoding="utf-8")


def _prompts(tokenizer_folder: Path, max_tokens: int) -> list[list[int]]:
    """Token ids of the first calibration prompts, cut to `max_tokens`; without template where it refuses them."""
    tokenizer = BundledTokenizer.load(tokenizer_folder)
    lines = (files("c2c_export") / "check" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = []
    for line in lines[:_NUM_PROMPTS]:
        messages = json.loads(line)["messages"]
        variables = tokenizer.special.template_variables
        try:
            text = render(tokenizer.chat_template, messages, add_generation_prompt=True, variables=variables)
        except C2CError:
            # What matters here is that the ids are those of text.
            text = messages[-1]["content"]
        prompts.append(list(tokenizer.encode(text).ids[:max_tokens]))
    return prompts


def _example_shape(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(_EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in spec.shape)


def _profiles(graph: GraphRecord, max_length: int, is_fuser: bool) -> str:
    """One line of options per profile."""
    optimum = min(_OPTIMUM, max_length)
    sizes = ProfileSizes(max_batch=_MAX_BATCH, decode_optimum=1, prefill_optimum=optimum, fuse_optimum=optimum)
    profiles = (fuser_profiles if is_fuser else decoder_profiles)(graph.inputs, max_length, sizes)
    lines = []
    for profile in profiles:
        options = []
        for index, option in enumerate(("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes")):
            options.append(_option(option, {name: shapes[index] for name, shapes in profile.shapes.items()}))
        lines.append(" ".join(options))
    return "\n".join(lines) + "\n"


def _option(option: str, shapes: Mapping[str, Sequence[int]]) -> str:
    """As Polygraphy reads it: no spaces inside a shape."""
    values = (f"{name}:[{','.join(str(size) for size in shape)}]" for name, shape in shapes.items())
    return f"{option} {' '.join(values)}"
