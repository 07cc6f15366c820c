"""Every graph of an engine beside the trained modules that it must compute as, and what both are fed.

In: a `CheckContext`. Out: a `GraphCase` for each graph. The trained side holds the weights that the engine's own graph
holds, dequantised, so that what rounding them costs is no error here; the level `weights` judges that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from c2c_export.bundle import TensorSpec
from c2c_export.check.comparing import LOGITS
from c2c_export.check.feeds.caches import CacheLayout, Caches
from c2c_export.check.feeds.decoder import DecoderLimits, DecoderPrompt, decoder_feeds
from c2c_export.check.feeds.feed import GraphFeed
from c2c_export.check.feeds.fuser import FusedPrompt, fuser_feeds
from c2c_export.check.held_weights import decoder_holding, fuser_holding
from c2c_export.check.level import CheckContext
from c2c_export.check.trained.decoder import TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.errors import UsageError
from c2c_export.trace.decoder import sliding_window_of
from runtime.prompt import ModelTokens, Plan

_NUM_PROMPTS = 4
"""Prompts that decoders read, from the shortest to the longest: torch takes seconds for each."""
_FUSED_PROMPTS = 2
"""Prompts whose own caches fusers are fed with: the one with the most fused sections, and the longest."""


@dataclass(frozen=True, eq=False)
class GraphCase:
    """One graph: the trained side, its inputs, and the calls that both sides are given."""

    graph: str
    trained: TrainedDecoder | TrainedFuser
    inputs: Sequence[TensorSpec]
    """What the trained side reads of a feed."""
    required: frozenset[str]
    """Outputs that the engine's graph must have."""
    allowed: frozenset[str]
    """Outputs that it may have."""
    feeds: Callable[[], Iterator[GraphFeed]]
    not_held: tuple[str, ...]
    """Weights of the graph that the trained side does not hold, as they cannot be read or do not fit."""

    @property
    def is_fuser(self) -> bool:
        """Whether it is a fuser's: corrections are compared, and it has no logits."""
        return isinstance(self.trained, TrainedFuser)


def graph_cases(context: CheckContext) -> Iterator[GraphCase]:
    """The cases of all graphs of the engine, the receiver first, each sharer before its fuser.

    Raises `UsageError` where no calibration prompt fits the bundle's capacity.
    """
    plans = plans_of(context)
    for name in context.record.graphs:
        if name == "receiver":
            yield _receiver(context, plans)
        elif name.startswith("sharer"):
            yield _sharer(context, plans, int(name.removeprefix("sharer")))
        else:
            yield _fuser(context, plans, int(name.removeprefix("fuser")))


def plans_of(context: CheckContext) -> list[Plan]:
    """The plans of the calibration prompts that fit, with all sharers."""
    plans = []
    too_long: UsageError | None = None
    for prompt in context.prompts:
        try:
            plans.append(context.engine.plan(prompt))
        except UsageError as error:
            too_long = error
    if not plans:
        raise UsageError(f"no calibration prompt can be used: {too_long}") from too_long
    return plans


def _receiver(context: CheckContext, plans: Sequence[Plan]) -> GraphCase:
    trained = context.trained.receiver
    prompts = []
    for plan in plans:
        padding = None
        if plan.closing_padding_id is not None:
            padding = plan.closing_padding_id, plan.num_positions - 1
        prompts.append(DecoderPrompt(plan.receiver, padding))
    outputs = frozenset([LOGITS, *_layout(context, trained).names])
    return _decoder(context, "receiver", trained, prompts, outputs)


def _sharer(context: CheckContext, plans: Sequence[Plan], number: int) -> GraphCase:
    gates = context.trained.fusers[number].open_gates()
    read = frozenset(f"{kind}.{link.sharer_layer}" for link, kind in gates)
    prompts = [DecoderPrompt(plan.sharers[number]) for plan in plans]
    return _decoder(context, f"sharer{number}", context.trained.sharers[number], prompts, read)


def _decoder(
    context: CheckContext,
    graph: str,
    trained: TrainedDecoder,
    prompts: Sequence[DecoderPrompt],
    required: frozenset[str],
) -> GraphCase:
    layout = _layout(context, trained)
    config = trained.model.config
    limits = DecoderLimits(sliding_window_of(config), int(config.max_position_embeddings))
    held = decoder_holding(context.engine.model(graph), trained)
    chosen = _chosen(prompts)
    return GraphCase(
        graph=graph,
        trained=held.trained,
        inputs=_decoder_inputs(layout),
        required=required,
        allowed=required | frozenset(layout.names),
        feeds=lambda: decoder_feeds(held.trained, layout, limits, chosen),
        not_held=held.not_held,
    )


def _chosen(prompts: Sequence[DecoderPrompt]) -> list[DecoderPrompt]:
    """Some of the prompts, of all lengths, and one that ends in a closing padding row, if any does."""
    by_length = sorted(prompts, key=lambda prompt: len(prompt.tokens.ids))
    indices = sorted({round(index) for index in np.linspace(0, len(by_length) - 1, _NUM_PROMPTS)})
    chosen = [by_length[index] for index in indices]
    padded = next((prompt for prompt in by_length if prompt.closing_padding is not None), None)
    return chosen if padded is None or padded in chosen else [*chosen, padded]


def _fuser(context: CheckContext, plans: Sequence[Plan], number: int) -> GraphCase:
    trained, manifest = context.trained, context.bundle.manifest
    receiver, sharer = _layout(context, trained.receiver), _layout(context, trained.sharers[number])
    fuser = trained.fusers[number]
    separate = manifest.fusion_mode == "parallel" and len(manifest.sharers) > 1
    outputs = frozenset(f"{kind}.{link.receiver_layer}" for link, kind in fuser.open_gates())

    def feeds() -> Iterator[GraphFeed]:
        chosen = [_fused_prompt(context, plan, number) for plan in _most_fused(plans)]
        return fuser_feeds(receiver, sharer, chosen, separate_unfused=separate)

    held = fuser_holding(context.engine.model(f"fuser{number}"), fuser)
    return GraphCase(
        graph=f"fuser{number}",
        trained=held.trained,
        inputs=_fuser_inputs(receiver, sharer, separate_unfused=separate),
        required=outputs,
        allowed=outputs,
        feeds=feeds,
        not_held=held.not_held,
    )


def _most_fused(plans: Sequence[Plan]) -> list[Plan]:
    by_sections = max(plans, key=lambda plan: sum(section.fused for section in plan.sections))
    by_length = max(plans, key=lambda plan: len(plan.receiver.ids))
    return [by_sections] if by_sections is by_length else [by_sections, by_length][:_FUSED_PROMPTS]


def _fused_prompt(context: CheckContext, plan: Plan, number: int) -> FusedPrompt:
    receiver, sharer = context.trained.receiver, context.trained.sharers[number]
    tokens, sharer_tokens = plan.receiver, plan.sharers[number]
    sections = []
    for section in plan.sections:
        if section.fused:
            start, stop = np.searchsorted(tokens.position_ids, (section.start, section.stop))
            opposite = np.searchsorted(sharer_tokens.position_ids, tokens.position_ids[start:stop])
            sections.append((range(int(start), int(stop)), opposite.astype(np.int64)))
    return FusedPrompt(
        _caches_of(receiver, tokens, _layout(context, receiver)),
        _caches_of(sharer, sharer_tokens, _layout(context, sharer)),
        len(tokens.ids),
        len(sharer_tokens.ids),
        sections,
    )


def _caches_of(decoder: TrainedDecoder, tokens: ModelTokens, layout: CacheLayout) -> Caches:
    """The caches after a prompt, random behind its rows."""
    rows, _ = decoder.extend(decoder.no_rows(), tokens.ids, tokens.position_ids)
    caches = layout.random(1, {})
    for layer, (key, value) in enumerate(zip(rows.keys, rows.values, strict=True)):
        for kind, tensor in (("key", key), ("value", value)):
            caches[f"{kind}.{layer}"][:, :, : len(tokens.ids)] = tensor.numpy()
    return caches


def _layout(context: CheckContext, decoder: TrainedDecoder) -> CacheLayout:
    return CacheLayout(decoder.num_layers, decoder.num_heads, context.bundle.manifest.max_length, decoder.head_dim)


def _decoder_inputs(layout: CacheLayout) -> list[TensorSpec]:
    ids, lengths = ("batch", "tokens"), ("batch",)
    shapes: dict[str, tuple[int | str, ...]] = {
        "input_ids": ids,
        "position_ids": ids,
        "write_index": lengths,
        "kv_length": lengths,
        "last_token": lengths,
        "row_position_ids": ("batch", layout.capacity),
    }
    cache = ("batch", layout.num_heads, layout.capacity, layout.head_dim)
    specs = [TensorSpec(name=name, dtype="int64", shape=shape) for name, shape in shapes.items()]
    return [*specs, *(TensorSpec(name=f"past_{name}", dtype="float32", shape=cache) for name in layout.names)]


def _fuser_inputs(receiver: CacheLayout, sharer: CacheLayout, *, separate_unfused: bool) -> list[TensorSpec]:
    def caches(prefix: str, layout: CacheLayout, rows: int | str) -> list[TensorSpec]:
        shape = (1, layout.num_heads, rows, layout.head_dim)
        return [TensorSpec(name=prefix + name, dtype="float32", shape=shape) for name in layout.names]

    specs = [TensorSpec(name=name, dtype="int64", shape=("fused",)) for name in ("sharer_rows", "receiver_rows")]
    specs += [TensorSpec(name="write_index", dtype="int64", shape=(1,))]
    specs += caches("sharer_", sharer, sharer.capacity) + caches("past_", receiver, receiver.capacity)
    return specs + (caches("unfused_", receiver, "fused") if separate_unfused else [])
