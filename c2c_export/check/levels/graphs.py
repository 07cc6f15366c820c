"""The level `graphs`: every graph as the engine runs it, against the trained modules over the same inputs.

In: a `CheckContext`. Out: per graph the largest relative error of its outputs, and where one left its tolerance, the
first that did: graph, layer, K or V, head, token or slot, and what it looks like. Each graph is given the same caches
as the trained modules (teacher-forced), which hold the engine's own, dequantised weights; so an error is the graph's or
the engine's alone, and tolerances are tight.

Not covered: whether the weights are the trained ones (level `weights`), and how errors add up from graph to graph
(levels `caches` and `logits`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from c2c_export.bundle import EngineRecord
from c2c_export.check.changed_graph import keep_activations_in_float, load_changed
from c2c_export.check.compare_graph import Compared, compare_graph
from c2c_export.check.comparing import LOGITS, Tolerances, layer_of
from c2c_export.check.diagnosis.decoder import diagnose_decoder
from c2c_export.check.diagnosis.fits import Diverged
from c2c_export.check.diagnosis.fuser import diagnose_fuser
from c2c_export.check.feeds.feed import GraphFeed
from c2c_export.check.graph_cases import GraphCase, graph_cases
from c2c_export.check.level import CheckContext, LevelResult
from c2c_export.check.tolerances import tolerance
from c2c_export.check_record import Divergence, Kind, Measurement
from engines.base import Engine
from engines.targets import target_of


def check_graphs(context: CheckContext) -> LevelResult:
    """See the module's docstring. Raises `C2CError` where this machine cannot run the engine."""
    measurements: list[Measurement] = []
    divergences: list[Divergence] = []
    precision = precision_of_activations(context.record)
    context.engine.release_pipeline()  # graphs are loaded one by one here, beside their weights in torch
    for case in graph_cases(context):
        if case.not_held:
            divergences.append(_weights_not_held(case))
        engine = context.engine.load_graph(case.graph)
        wrong = list(wrong_interface(case, engine))
        if wrong:
            divergences += wrong
            continue
        model = context.engine.model(case.graph)
        rounded = keep_activations_in_float(model)
        if rounded:
            exact = load_changed(context, case.graph, model)
            found = _compare(case, exact, graph_tolerances(case.graph, precision), None)
            del exact  # before the engine as it is takes its memory
            measurements += found.measurements(case, ", activations in float32")
            divergences += found.divergences
            if found.divergences:
                continue  # the engine as it is would show the same, less clearly
        folder = context.options.save_results
        save_to = None if folder is None else folder / context.name / case.graph
        if rounded:
            case = dataclasses.replace(case, feeds=over_own_rows(case))
        found = _compare(case, engine, graph_tolerances(case.graph, precision, rounded=rounded), save_to)
        measurements += found.measurements(case)
        divergences += found.divergences
    return LevelResult(measurements, divergences)


def _weights_not_held(case: GraphCase) -> Divergence:
    """That both sides compute with other weights, so that what is off may be no fault of the graph's arithmetic."""
    first, count = case.not_held[0], len(case.not_held)
    return Divergence(
        graph=case.graph,
        message=f"{count} of the graph's weights cannot be read or do not fit the trained modules, which keep their "
        f"own there: {first} is the first",
    )


def precision_of_activations(record: EngineRecord) -> str:
    """What the engine computes in: on a GPU, weights in integers are multiplied in float16."""
    on_cpu = not target_of(record.target).needs_gpu_to_run
    return record.precision if on_cpu or record.precision not in ("int8", "int4") else "fp16"


def over_own_rows(case: GraphCase) -> Callable[[], Iterator[GraphFeed]]:
    """The feeds of `case` without those over random rows, where activations in 8 bits give nearly anything."""
    feeds = case.feeds
    return lambda: (feed for feed in feeds() if not feed.over_random_rows)


def graph_tolerances(graph: str, precision: str, *, rounded: bool = False) -> Tolerances:
    """What this level tolerates of the graph's outputs; `rounded` where its products round activations to 8 bits."""
    if graph.startswith("fuser"):
        return Tolerances(_at_most("corrections", precision))
    suffix = ", activations in 8 bits" if rounded else ""
    logits = 0.0 if graph.startswith("sharer") else _at_most(f"logits{suffix}", precision)
    return Tolerances(_at_most(f"caches{suffix}", precision), logits)


def wrong_interface(case: GraphCase, engine: Engine) -> Iterator[Divergence]:
    """Outputs that the engine's graph lacks or has too many, and inputs that nobody can feed."""
    outputs = {spec.name for spec in engine.outputs}
    for name in sorted(case.required - outputs):
        why = "a gate closed or a branch removed" if case.is_fuser else "the graph was cut too short"
        yield _divergence(case.graph, name, f"the graph has no output {name}, which the trained modules give: {why}")
    for name in sorted(outputs - case.allowed):
        why = "a gate open that is closed in the checkpoint" if case.is_fuser else "a graph of another model"
        yield _divergence(case.graph, name, f"the graph has an output {name}, which the trained modules lack: {why}")
    fed = {spec.name for spec in case.inputs}
    for spec in engine.inputs:
        if spec.name not in fed:
            message = f"the graph has an input {spec.name}, which the trained modules lack: a graph of another model"
            yield _divergence(case.graph, spec.name, message)


@dataclass
class _Found:
    """What comparing one graph gave: the largest error of its caches and logits, and its first divergence."""

    tolerances: Tolerances
    worst: dict[str, float] = field(default_factory=dict)
    changed_rows: int = 0
    divergences: list[Divergence] = field(default_factory=list)

    def measurements(self, case: GraphCase, suffix: str = "") -> Iterator[Measurement]:
        caches = f"{case.graph} {'corrections' if case.is_fuser else 'caches'}{suffix}"
        if "caches" in self.worst:
            yield Measurement(name=caches, value=self.worst["caches"], at_most=self.tolerances.caches)
        if LOGITS in self.worst:
            name = f"{case.graph} logits{suffix}"
            yield Measurement(name=name, value=self.worst[LOGITS], at_most=self.tolerances.logits)
        yield Measurement(name=f"{case.graph} other rows changed{suffix}", value=self.changed_rows, at_most=0)


def _compare(case: GraphCase, engine: Engine, tolerances: Tolerances, save_to: Path | None) -> _Found:
    found = _Found(tolerances)
    for compared in compare_graph(case, engine, tolerances, save_to):
        for name, result in compared.results.items():
            group = LOGITS if name == LOGITS else "caches"
            found.worst[group] = max(found.worst.get(group, 0.0), result.relative_error)
            found.changed_rows += result.changed_rows
        if compared.first_failed is not None and not found.divergences:
            found.divergences.append(describe(case, compared, compared.first_failed))
    return found


def describe(case: GraphCase, compared: Compared, output: str) -> Divergence:
    """The divergence of `output`, the first that left its tolerance in this feed, with what it looks like."""
    diverged = Diverged(compared.feed, compared.expected, compared.found, compared.results, output)
    result = diverged.result
    if result.relative_error <= result.tolerance:
        slot, head, row = result.changed[0]
        what = f"row {row} of slot {slot} changed, although the call does not write it"
        return _divergence(case.graph, output, f"{compared.feed.name}: {what}", head, row)
    # The first token that is off, and there the head that is off most.
    slot, token = (int(index) for index in np.argwhere(result.errors.max(axis=1) > result.tolerance)[0])
    head = int(result.errors[slot, :, token].argmax())
    row = compared.feed.written[slot].start + token
    error = f"off by {result.errors[slot, head, token]:.2g} of its size, tolerance {result.tolerance:.2g}"
    several = len(compared.feed.written) > 1
    where = f"slot {slot}" if output == LOGITS else f"{f'slot {slot}, ' if several else ''}row {row}"
    diagnosis = diagnose_fuser(diverged, case.trained) if case.is_fuser else diagnose_decoder(diverged, case.trained)
    added = f"Calls before it agree; this one adds {compared.feed.adds}." if compared.feed.adds else ""
    sentences = [f"{compared.feed.name}: {where} is {error}.", diagnosis, added]
    message = " ".join(sentence for sentence in sentences if sentence)
    return _divergence(case.graph, output, message, None if output == LOGITS else head, row)


def _divergence(graph: str, name: str, message: str, head: int | None = None, token: int | None = None) -> Divergence:
    kind: Kind | None = "key" if "key" in name else "value" if "value" in name else None
    layer = layer_of(name) if kind is not None else None
    return Divergence(graph=graph, layer=layer, kind=kind, head=head, token=token, message=message)


def _at_most(measurement: str, precision: str) -> float:
    limit = tolerance("graphs", measurement, precision).at_most
    assert limit is not None
    return limit
