"""How far a bundle in fp16, bf16, int8 and int4 is from itself in float32, on recorded prompts.

    python scripts/measure_accuracy.py BUNDLE --prompts tests/golden/qwen3_from_qwen2
    python scripts/measure_accuracy.py BUNDLE --prompts tests/demo_pair --questions 100
    python scripts/measure_accuracy.py BUNDLE --prompts tests/demo_pair --questions 100 --engine ort-cpu

In: a bundle; a folder of recorded prompts (`case.json` with `expected.safetensors`, or `expected.json`). Out: Markdown
tables on standard output, and all numbers in `--json FILE`. docs/accuracy.md explains the columns.

With `--engine ort-cpu` the graphs are those of ONNX Runtime's CPU provider in int8 and int4, and are run as they are.
Without it they are those that TensorRT builds from; no GPU is needed. Each precision is then run in two ways:

- *kernels*: the graph as it is, on ONNX Runtime's CPU provider. Where that has no kernel of the precision it computes
  in float32 by itself and keeps intermediate values there, so this is closer to float32 than a GPU is. A graph with
  operators that it cannot run at all (bf16) is skipped, with the reason.
- *rounded*: the graph in float32, every operator's result rounded to the precision, which is what a GPU that
  accumulates in float32 stores. This is an emulation: roundings inside an operator, such as those of attention weights,
  are left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from safetensors.numpy import load_file

from c2c_export.bundle import Bundle, EngineRecord, hash_folder
from c2c_export.errors import C2CError, UsageError
from engines.lowering import lower
from engines.precision import DTYPES
from runtime import C2CPipeline
from runtime.logprobs import log_probabilities

NUM_TOKENS = 32
QUANTISED = ("int8", "int4")
PRECISIONS = {"tensorrt": ("fp16", "bf16", *QUANTISED), "ort-cpu": QUANTISED}
# The first way is that of the questions.
WAYS = {"tensorrt": ("rounded", "kernels"), "ort-cpu": ("kernels",)}
_FLOAT = ir.DataType.FLOAT
# Their results are copies of their inputs' elements.
_COPYING = frozenset(
    {"Concat", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"TensorScatter", "Transpose", "Unsqueeze"}
)
_END_OF_TURN = "<|im_end|>"
_RUN_ON = "ort-cpu"
# What is measured here is what a check judges.
_ALLOWED = {"allow_unchecked": True, "allow_failed": True}
# All of TensorRT's lowered graphs are the same.
_TARGETS = {"tensorrt": "tensorrt-rtx", "ort-cpu": "ort-cpu"}
# In place of what is generated from logits that are not finite.
_NO_TOKEN = -1
COLUMNS = (
    "caches: max",
    "mean",
    "mean / scale",
    "logits: max",
    "mean",
    "KL",
    "top 1",
    "top 5",
    "tokens",
    "texts",
    "not finite",
)
_SHARES = frozenset({"top1", "top5", "same_tokens", "same_texts"})

Prompt = list[dict[str, str]] | list[int]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a pipeline makes of one prompt."""

    caches: list[FloatArray]
    """Key and value of every layer, [Ht,n,Dt], fused."""
    logits: FloatArray
    token_ids: list[int]


@dataclass(frozen=True)
class Distance:
    """How far answers are from those in float32, over all prompts. Not a number where a value is not finite."""

    cache_max: float
    cache_mean: float
    cache_relative: float
    """Mean absolute error by mean absolute value."""
    logits_max: float
    logits_mean: float
    kl_divergence: float
    """Of the first token's distribution from that in float32, in nats, mean over prompts."""
    top1: float
    """Share of prompts with the same likeliest first token."""
    top5: float
    """Mean share of the five likeliest first tokens that are among those in float32."""
    same_tokens: float
    """Share of the greedy tokens that are equal, position by position; after the first difference most differ."""
    same_texts: float
    """Share of prompts all of whose greedy tokens are equal."""
    not_finite: int
    """How many cache elements and logits are infinite or not a number."""


@dataclass(frozen=True)
class Weights:
    """What quantisation did to a graph."""

    quantised: int
    with_offsets: int
    """Always 0 for TensorRT."""
    kept_in_float: int


@dataclass(frozen=True)
class Question:
    """A question with choices, and the index of the right one."""

    question: str
    choices: list[str]
    answer: int


def main() -> None:
    """Exits 1 with one line on a bundle, folder or option that is wrong."""
    options = _parse_options()
    try:
        _measure(options)
    except C2CError as error:
        sys.exit(str(error))


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="folder with recorded prompts")
    parser.add_argument(
        "--engine", choices=tuple(PRECISIONS), default="tensorrt", help="whose graphs; tensorrt by default"
    )
    parser.add_argument("--precision", action="append", help="all that the engine has by default; repeatable")
    parser.add_argument("--way", action="append", help="all that the engine has by default; repeatable")
    parser.add_argument(
        "--questions", type=int, default=0, help="how many questions of facts.json to ask (of TensorRT's, rounded only)"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> None:
    precisions = _chosen(options.precision, PRECISIONS[options.engine], "--precision", options.engine)
    ways = _chosen(options.way, WAYS[options.engine], "--way", options.engine)
    bundle = Bundle.open(options.bundle)
    prompts = read_prompts(options.prompts)
    questions = read_questions(options.prompts, options.questions) if options.questions else []
    reference = C2CPipeline(bundle, _RUN_ON, "fp32", 1, options.threads, **_ALLOWED)
    expected = [answer(reference, prompt) for prompt in prompts]
    print(f"{options.bundle.name}: {len(prompts)} prompts of {options.prompts}, {NUM_TOKENS} greedy tokens each\n")
    print("| precision | way | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (2 + len(COLUMNS)) + "|", flush=True)
    numbers: dict[str, Any] = {}
    quantised: dict[str, dict[str, Weights]] = {}
    accuracies = {"fp32": share_correct(reference, questions)} if questions else {}
    del reference
    for precision in precisions:
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                weights = write_graphs(bundle, Path(folder), options.engine, precision, rounded=way == "rounded")
                try:
                    pipe = C2CPipeline(
                        _with_engine(bundle, Path(folder), precision),
                        _RUN_ON,
                        precision,
                        1,
                        options.threads,
                        **_ALLOWED,
                    )
                except C2CError as error:
                    print(f"| {precision} | {way} | not run: {_reason(error)} |", flush=True)
                    continue
                distance = distance_between(expected, [answer(pipe, prompt) for prompt in prompts])
                print(f"| {precision} | {way} | {_row(distance)} |", flush=True)
                numbers[f"{precision} {way}"] = asdict(distance)
                quantised |= {precision: weights} if precision in QUANTISED else {}
                if questions and way == WAYS[options.engine][0]:
                    accuracies[precision] = share_correct(pipe, questions)
    if quantised:
        header = "| precision | graph | integer matrices | with offsets | left in float |"
        print(f"\n{header}\n{'| --- ' * 5}|\n{_weight_rows(quantised)}")
    if questions:
        print(f"\n| precision | receiver alone | with the sharer |\n| --- | --- | --- |\n{_accuracy_rows(accuracies)}")
    if options.json:
        weights_by_name = {
            precision: {name: asdict(weights) for name, weights in graphs.items()}
            for precision, graphs in quantised.items()
        }
        content = {"distances": numbers, "weights": weights_by_name, "accuracies": accuracies}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _chosen(wanted: list[str] | None, known: tuple[str, ...], option: str, engine: str) -> tuple[str, ...]:
    """What the option asks for, or all that there is, in the order of `known`."""
    unknown = set(wanted or ()) - set(known)
    if unknown:
        raise UsageError(f"{option} {min(unknown)}: {engine} has {', '.join(known)}")
    return tuple(name for name in known if name in (wanted or known))


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts of a recorded pair: messages, or the receiver's ids of an unaligned pair.

    Raises `UsageError` when `folder` holds no recorded prompts.
    """
    if (folder / "expected.json").is_file():
        return [recorded["messages"] for recorded in json.loads((folder / "expected.json").read_text("utf-8"))]
    if not (folder / "case.json").is_file():
        raise UsageError(f"{folder} has neither expected.json nor case.json; give a folder like tests/demo_pair")
    cases = json.loads((folder / "case.json").read_text("utf-8"))["cases"]
    arrays = load_file(folder / "expected.safetensors")
    return [case.get("messages") or arrays[f"{index}.receiver_ids"][0].tolist() for index, case in enumerate(cases)]


def read_questions(folder: Path, count: int) -> list[Question]:
    """The first `count` questions of `facts.json`. Raises `UsageError` when there is none."""
    path = folder / "facts.json"
    if not path.is_file():
        raise UsageError(f"{path} is missing; only tests/demo_pair has questions")
    return [
        Question(item["question"], item["choices"], item["answer"])
        for item in json.loads(path.read_text("utf-8"))[:count]
    ]


def write_graphs(bundle: Bundle, folder: Path, engine: str, precision: str, *, rounded: bool) -> dict[str, Weights]:
    """Write every graph of `bundle`, as `engine` has it in `precision`, as `folder`/<name>.onnx."""
    weights = {}
    for name, record in bundle.manifest.graphs.items():
        is_fuser = name.startswith("fuser")
        lowered = lower(bundle.file(record.path), _TARGETS[engine], precision, is_fuser=is_fuser)
        model = lowered.model
        with_offsets = lowered.rules.get("add_offsets", 0)
        weights[name] = Weights(lowered.quantized_weights, with_offsets, lowered.float_weights)
        if rounded:
            round_every_result(model, DTYPES["bf16" if precision == "bf16" else "fp16"])
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
    return weights


def round_every_result(model: ir.Model, dtype: ir.DataType) -> int:
    """Turn a graph in `dtype` into one in float32 that rounds to `dtype`; return how many roundings it has.

    Inputs, weights, caches and what passes between operators become float32 numbers that `dtype` holds exactly.
    """
    graph = model.graph
    computed = [node for node in graph if node.op_type not in _COPYING and node.outputs[0].dtype == dtype]
    for value in [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
        if value.dtype == dtype:
            value.dtype = _FLOAT
            if value.const_value is not None:
                value.const_value = _single(value.const_value.numpy(), dtype, str(value.name))
    roundings = [node for node in computed if node.op_type != "DequantizeLinear"]
    for node in roundings:
        _round_result(graph, node, dtype)
    for node in set(computed) - set(roundings):
        # ONNX Runtime would do this again in every step.
        _replace_by_constant(graph, node, dtype)
    common.RemoveUnusedNodesPass()(model)
    return len(roundings)


def _round_result(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    result = node.outputs[0]
    uses = list(result.uses())
    down = node if node.op_type == "Cast" else _insert_cast(graph, node, dtype)
    down.outputs[0].dtype = dtype
    up = _insert_cast(graph, down, _FLOAT)
    for use in uses:
        use.node.replace_input_with(use.idx, up.outputs[0])


def _insert_cast(graph: ir.Graph, after: ir.Node, dtype: ir.DataType) -> ir.Node:
    source = after.outputs[0]
    cast = ir.node("Cast", [source], {"to": dtype.value})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, source.shape
    cast.outputs[0].name = f"{source.name}.to_{dtype.name.lower()}"
    graph.insert_after(after, cast)
    return cast


def _replace_by_constant(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    values, scales = (_array(value) for value in node.inputs)
    axis = node.attributes["axis"].as_int()
    block_size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 1
    if block_size > 1:
        scales = scales.repeat(block_size, axis=axis)
    dequantized = node.outputs[0]
    # Scales are per column or per block of rows, and columns are the last axis.
    tensor = _single(values.astype(np.float32) * scales, dtype, f"{dequantized.name}.constant")
    constant = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(_FLOAT), const_value=tensor)
    graph.register_initializer(constant)
    for use in list(dequantized.uses()):
        use.node.replace_input_with(use.idx, constant)


def _single(array: NDArray[Any], dtype: ir.DataType, name: str) -> ir.Tensor:
    """`array`, rounded to `dtype`, as float32."""
    return ir.Tensor(array.astype(dtype.numpy()).astype(np.float32), name=name)


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def answer(pipe: C2CPipeline, prompt: Prompt) -> Answer:
    """Prefill, fuse and continue one prompt greedily, past any end of sequence."""
    with pipe.prefill(prompt) as session:
        layers = range(pipe.bundle.manifest.receiver.num_layers)
        caches = [cache for layer in layers for cache in session.kv(layer)]
        if not np.isfinite(session.logits).all():
            return Answer(caches, session.logits, [_NO_TOKEN] * NUM_TOKENS)
        out = session.generate(max_new_tokens=NUM_TOKENS, ignore_eos=True)
        return Answer(caches, session.logits, out.token_ids)


def distance_between(expected: Sequence[Answer], found: Sequence[Answer]) -> Distance:
    """The distance of `found` from `expected`, the answers to the same prompts in float32."""
    caches = _joined(expected), _joined(found)
    logits = np.stack([answer.logits for answer in expected]), np.stack([answer.logits for answer in found])
    tokens = np.array([answer.token_ids for answer in expected]) == np.array([answer.token_ids for answer in found])
    cache_error, logits_error = (np.abs(after - before) for before, after in (caches, logits))
    wanted, got = (np.stack([log_probabilities(row) for row in values]) for values in logits)
    divergence = (np.exp(wanted) * (wanted - got)).sum(axis=-1)
    ranks = [np.argsort(-values, axis=-1)[:, :5] for values in logits]
    shared = [
        len(set(before) & set(after)) / 5 for before, after in zip(*(rank.tolist() for rank in ranks), strict=True)
    ]
    return Distance(
        cache_max=float(cache_error.max()),
        cache_mean=float(cache_error.mean()),
        cache_relative=float(cache_error.mean() / np.abs(caches[0]).mean()),
        logits_max=float(logits_error.max()),
        logits_mean=float(logits_error.mean()),
        kl_divergence=float(divergence.mean()),
        top1=float((ranks[0][:, 0] == ranks[1][:, 0]).mean()),
        top5=float(np.mean(shared)),
        same_tokens=float(tokens.mean()),
        same_texts=float(tokens.all(axis=1).mean()),
        not_finite=int((~np.isfinite(caches[1])).sum() + (~np.isfinite(logits[1])).sum()),
    )


def share_correct(pipe: C2CPipeline, questions: Sequence[Question]) -> dict[str, float]:
    """Share of the questions whose right choice is the likeliest reply, without and with the sharer."""
    share = {}
    for name, fuse in (("receiver alone", False), ("with the sharer", True)):
        right = 0
        for question in questions:
            with pipe.prefill(question.question, fuse=fuse) as session:
                try:
                    scores = [session.score(_reply_ids(pipe, choice)).log_likelihood for choice in question.choices]
                except C2CError:  # logits that are not finite choose nothing
                    continue
            right += int(np.argmax(scores)) == question.answer
        share[name] = right / len(questions)
    return share


def _reply_ids(pipe: C2CPipeline, choice: str) -> list[int]:
    """The tokens of `choice` and the end of the turn."""
    end = pipe.tokenizer.token_to_id(_END_OF_TURN)
    assert end is not None, f"the receiver's tokenizer has no {_END_OF_TURN}"
    return [*pipe.tokenizer.encode(choice, add_special_tokens=False).ids, end]


def _joined(answers: Iterable[Answer]) -> FloatArray:
    return np.concatenate([cache.ravel() for answer in answers for cache in answer.caches])


def _with_engine(bundle: Bundle, folder: Path, precision: str) -> Bundle:
    """A bundle in `folder` like `bundle`, with one engine, in `precision`, whose graphs lie in `folder`."""
    for path in ("tokenizers", "alignment"):
        if not (folder / path).exists():
            (folder / path).symlink_to((bundle.root / path).absolute())
    graphs = {path.stem: path.name for path in sorted(folder.glob("*.onnx"))}
    engine = EngineRecord(target=_RUN_ON, precision=precision, graphs=graphs)
    kept = {path: digest for path, digest in bundle.manifest.files.items() if not path.startswith("graphs/")}
    update = {"engines": {f"{_RUN_ON}-{precision}": engine}, "files": {**kept, **hash_folder(folder)}}
    return Bundle(folder, bundle.manifest.model_copy(update=update))


def _reason(error: C2CError) -> str:
    """What ONNX Runtime lacks, from its message."""
    return str(error).rpartition(" : ")[2].splitlines()[0]


def _row(distance: Distance) -> str:
    return " | ".join(f"{value:.0%}" if name in _SHARES else f"{value:.2g}" for name, value in asdict(distance).items())


def _weight_rows(quantised: dict[str, dict[str, Weights]]) -> str:
    return "\n".join(
        f"| {precision} | {name} | {weights.quantised} | {weights.with_offsets} | {weights.kept_in_float} |"
        for precision, graphs in quantised.items()
        for name, weights in graphs.items()
    )


def _accuracy_rows(accuracies: dict[str, dict[str, float]]) -> str:
    return "\n".join(
        f"| {precision} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |"
        for precision, shares in accuracies.items()
    )


if __name__ == "__main__":
    main()
