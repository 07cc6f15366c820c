"""The manifest's layer map, gates and flags of a fuser, against its checkpoint.

In: a manifest's sharer and the checkpoint that was read for the check. Out: a `Divergence` for each link, gate or flag
that differs, and what the difference looks like. A fusion mode may be chosen at export, so it is compared with the
graphs, not with the checkpoint.
"""

from collections.abc import Iterator

from c2c_export.bundle import LayerLink, Manifest, SharerRecord
from c2c_export.check_record import Divergence, Kind
from c2c_export.checkpoint import FuserCheckpoint, ProjectorLink

_KINDS: tuple[Kind, ...] = ("key", "value")


def check_links(number: int, recorded: SharerRecord, trained: FuserCheckpoint) -> Iterator[Divergence]:
    """Layer map and gates of sharer `number`."""
    graph = f"fuser{number}"
    in_manifest = {link.receiver_layer: link for link in recorded.links}
    in_checkpoint = {link.receiver_layer: link for link in trained.links}
    pattern = _shift(in_manifest, in_checkpoint)
    for layer in sorted(in_manifest.keys() | in_checkpoint.keys()):
        ours, theirs = in_manifest.get(layer), in_checkpoint.get(layer)
        if ours is None or theirs is None:
            where = "the manifest" if ours is None else "the checkpoint"
            message = f"receiver layer {layer} has no link in {where}{pattern}"
            yield Divergence(graph=graph, layer=layer, message=message)
            continue
        for field in ("sharer_layer", "projector"):
            found, expected = getattr(ours, field), getattr(theirs, field)
            if found != expected:
                what = f"{field.replace('_', ' ')} of receiver layer {layer}"
                message = f"{what} is {found} in the manifest, {expected} in the checkpoint{pattern}"
                yield Divergence(graph=graph, layer=layer, message=message)
        yield from _check_gates(graph, ours, theirs, trained)


def check_flags(number: int, manifest: Manifest, trained: FuserCheckpoint) -> Iterator[Divergence]:
    """Alignment and its strategy, and whether the fuser's graph is one of the manifest's fusion mode."""
    graph, recorded = f"fuser{number}", manifest.sharers[number]
    if manifest.aligned != trained.aligned:
        message = f"aligned is {manifest.aligned} in the manifest, the checkpoint was trained with {trained.aligned}"
        yield Divergence(graph=graph, message=message)
    strategy = trained.alignment_strategy if trained.aligned else None
    if recorded.alignment_strategy != strategy:
        found = recorded.alignment_strategy
        message = f"sharers.{number}.alignment_strategy is {found} in the manifest, the checkpoint's is {strategy}"
        yield Divergence(graph=graph, message=message)
    if recorded.fuser_graph is not None:
        reads_unfused = any(spec.name.startswith("unfused_") for spec in recorded.fuser_graph.inputs)
        if reads_unfused != (manifest.fusion_mode == "parallel" and len(manifest.sharers) > 1):
            reads = "apart from the cache, as in parallel" if reads_unfused else "from the cache, as in sequential"
            message = f"fusion_mode is {manifest.fusion_mode} in the manifest, but the graph reads unfused rows {reads}"
            yield Divergence(graph=graph, message=message)


def _check_gates(
    graph: str, recorded: LayerLink, link: ProjectorLink, trained: FuserCheckpoint
) -> Iterator[Divergence]:
    projector = trained.projectors[link.projector]
    for kind in _KINDS:
        found, expected = getattr(recorded, f"{kind}_gate_open"), getattr(projector, f"{kind}_gate_open")
        if found != expected:
            logit = float(projector.state[f"{kind}_gate_logit"])
            message = (
                f"the gate of layer {link.receiver_layer}'s {kind} is {'open' if found else 'closed'} in the manifest; "
                f"its trained logit is {logit:.6g}, so it is {'open' if expected else 'closed'}"
            )
            yield Divergence(graph=graph, layer=link.receiver_layer, kind=kind, message=message)


def _shift(found: dict[int, LayerLink], expected: dict[int, ProjectorLink]) -> str:
    """What a wrong layer map looks like, as the end of a sentence; empty if it looks like nothing that has a name."""
    common = found.keys() & expected.keys()
    shifts = {found[layer].sharer_layer - expected[layer].sharer_layer for layer in common}
    if found.keys() == expected.keys() and len(shifts) == 1 and (by := shifts.pop()):
        what = "one" if abs(by) == 1 else str(abs(by))
        return f": the layer map is shifted, every link's sharer layer is {what} too {'high' if by > 0 else 'low'}"
    wanted = [(link.receiver_layer, link.sharer_layer) for link in expected.values()]
    for by in (1, -1):
        moved = [(layer + by, sharer_layer) for layer, sharer_layer in wanted]
        if moved == [(link.receiver_layer, link.sharer_layer) for link in found.values()]:
            return f": the layer map is shifted, every link's receiver layer is one too {'high' if by > 0 else 'low'}"
    order = [layer for _, layer in sorted(wanted)]
    ours = [found[layer].sharer_layer for layer in sorted(found)]
    for by in (1, -1):
        if len(set(order)) > 1 and ours == order[by:] + order[:by]:
            return ": the layer map is shifted by one, each link has its neighbour's sharer layer"
    return ""
