"""Cache-to-Cache as a whole in torch: prefill by sections, fusion with the trained weights, greedy decoding.

In: the trained models and a `Plan` (`runtime.prompt`). Out: the receiver's fused caches, the prompt's logits, the
greedy continuation, and how strongly each projector fuses. The order is the reference's: a section is computed over the
fused rows before it and, where it is fused, corrected before the next one; a closing padding row sees the real rows and
is seen by none. Not covered: how a prompt is planned, which both sides share.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from c2c_export.bundle import FusionMode
from c2c_export.check.trained.decoder import CachedRows, TrainedDecoder
from c2c_export.check.trained.fuser import TrainedFuser
from c2c_export.check.trained.projector import Correction, correct
from c2c_export.check_record import Kind
from runtime.prompt import Plan

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FuseWeights:
    """The mean weight of one projector over heads and fused tokens of a prompt, whether its gates are open or not."""

    sharer: int
    receiver_layer: int
    key: float
    value: float


@dataclass(frozen=True, eq=False)
class TrainedPrompt:
    """A prompt that was prefilled and fused."""

    rows: CachedRows
    """The receiver's real rows, fused where they were: per layer [1,Ht,n,Dt]."""
    logits: Floats
    """[V], of the last prompt token, or of the closing padding row."""
    weights: tuple[FuseWeights, ...]
    """One per projector that was used; empty where nothing is fused."""
    next_position: int
    """Where the first new token goes."""


@dataclass(frozen=True, eq=False)
class TrainedGeneration:
    """A greedy continuation."""

    token_ids: tuple[int, ...]
    """An ending stop token included."""
    logits: tuple[Floats, ...]
    """Those that each token was the best of: [V] each."""


@dataclass(eq=False)
class TrainedAnswers:
    """What a pair answers. Results are kept, so that asking again for the same prompt costs nothing."""

    receiver: TrainedDecoder
    sharers: Sequence[TrainedDecoder]
    fusers: Sequence[TrainedFuser]
    _prompts: dict[object, TrainedPrompt] = field(default_factory=dict)
    _generations: dict[object, TrainedGeneration] = field(default_factory=dict)

    def prefill(self, plan: Plan, mode: FusionMode) -> TrainedPrompt:
        """Prefill the prompt of `plan` and fuse it with the sharers that it names."""
        key = _key(plan, mode)
        if key not in self._prompts:
            self._prompts[key] = self._prefill(plan, mode)
        return self._prompts[key]

    def generate(self, plan: Plan, mode: FusionMode, num_tokens: int, stop_ids: Collection[int]) -> TrainedGeneration:
        """Continue greedily by `num_tokens`, or up to the first of `stop_ids`."""
        key = (_key(plan, mode), num_tokens, frozenset(stop_ids))
        if key not in self._generations:
            prompt = self.prefill(plan, mode)
            self._generations[key] = self._generate(prompt, num_tokens, stop_ids)
        return self._generations[key]

    def _prefill(self, plan: Plan, mode: FusionMode) -> TrainedPrompt:
        sharers = {
            number: self.sharers[number].extend(self.sharers[number].no_rows(), tokens.ids, tokens.position_ids)[0]
            for number, tokens in sorted(plan.sharers.items())
        }
        ids, position_ids = plan.receiver.ids, plan.receiver.position_ids
        rows, logits = self.receiver.no_rows(), np.zeros(0, dtype=np.float32)
        used: dict[tuple[int, int, Kind], list[torch.Tensor]] = {}
        for section in plan.sections:
            start = len(rows.position_ids)
            stop = int(np.searchsorted(position_ids, section.stop))
            if stop > start:
                rows, logits = self.receiver.extend(rows, ids[start:stop], position_ids[start:stop])
            if section.fused:
                rows = self._fuse(rows, start, sharers, mode, used)
        if plan.closing_padding_id is not None:
            where = [plan.num_positions - 1]
            padded, logits = self.receiver.extend(rows, [plan.closing_padding_id], where, kv_length=len(ids))
            rows = padded.without_last(1)
        return TrainedPrompt(rows, logits, _means(used), plan.num_positions)

    def _fuse(
        self,
        rows: CachedRows,
        start: int,
        sharers: Mapping[int, CachedRows],
        mode: FusionMode,
        used: dict[tuple[int, int, Kind], list[torch.Tensor]],
    ) -> CachedRows:
        """The receiver's rows with those from `start` on corrected; adds the weights to `used`."""
        caches: dict[Kind, list[torch.Tensor]] = {"key": list(rows.keys), "value": list(rows.values)}
        unfused: Mapping[Kind, Sequence[torch.Tensor]] = {"key": rows.keys, "value": rows.values}
        for number, sharer in sharers.items():
            where = torch.searchsorted(sharer.position_ids, rows.position_ids[start:])
            fuser = self.fusers[number]
            is_open = {(link.receiver_layer, kind) for link, kind in fuser.open_gates()}
            read = unfused if mode == "parallel" else {kind: tuple(layers) for kind, layers in caches.items()}
            for link in fuser.checkpoint.links:
                for kind, source in _each_kind(sharer):
                    correction: Correction = correct(
                        fuser.checkpoint.projectors[link.projector],
                        kind,
                        sharer=source[link.sharer_layer][0][:, where],
                        receiver=read[kind][link.receiver_layer][0][:, start:],
                    )
                    used.setdefault((number, link.receiver_layer, kind), []).append(correction.weight)
                    if (link.receiver_layer, kind) in is_open:
                        corrected = caches[kind][link.receiver_layer].clone()
                        corrected[0, :, start:] += correction.added
                        caches[kind][link.receiver_layer] = corrected
        return CachedRows(tuple(caches["key"]), tuple(caches["value"]), rows.position_ids)

    def _generate(self, prompt: TrainedPrompt, num_tokens: int, stop_ids: Collection[int]) -> TrainedGeneration:
        rows, logits = prompt.rows, prompt.logits
        token_ids: list[int] = []
        all_logits: list[Floats] = []
        while True:
            token_ids.append(int(np.argmax(logits)))
            all_logits.append(logits)
            if len(token_ids) == num_tokens or token_ids[-1] in stop_ids:
                return TrainedGeneration(tuple(token_ids), tuple(all_logits))
            position = prompt.next_position + len(token_ids) - 1
            rows, logits = self.receiver.extend(rows, token_ids[-1:], [position])


def _each_kind(rows: CachedRows) -> Iterable[tuple[Kind, Sequence[torch.Tensor]]]:
    return (("key", rows.keys), ("value", rows.values))


def _means(used: Mapping[tuple[int, int, Kind], Sequence[torch.Tensor]]) -> tuple[FuseWeights, ...]:
    """Means over all sections of a prompt, each token counted once."""
    means = {key: float(torch.cat(tuple(weights)).mean()) for key, weights in used.items()}
    return tuple(
        FuseWeights(number, layer, mean, means[number, layer, "value"])
        for (number, layer, kind), mean in means.items()
        if kind == "key"
    )


def _key(plan: Plan, mode: FusionMode) -> object:
    """What two plans of the same prompt have in common."""
    models = (plan.receiver, *(tokens for _, tokens in sorted(plan.sharers.items())))
    tokens = tuple((model.ids.tobytes(), model.position_ids.tobytes()) for model in models)
    return plan.sections, tuple(sorted(plan.sharers)), tokens, plan.num_positions, plan.closing_padding_id, mode
