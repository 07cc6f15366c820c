"""What each graph of a trained pair must hold and write, by the checkpoints' own layer maps and gates.

In: a model or fuser as it was trained. Out: its parameters, those that its graph needs, and the caches it must write. A
sharer is computed up to the highest layer that an open gate reads, and of that one only the keys or values read.
"""

from transformers import PreTrainedModel

from c2c_export.check.graph.decoder_wiring import CacheName
from c2c_export.check.graph.fuser_wiring import open_gates
from c2c_export.check.graph.modules import decoder_kind, decoder_layer, projector_side
from c2c_export.check.graph.parameters import Parameters, Place
from c2c_export.checkpoint import FuserCheckpoint


def receiver_caches(model: PreTrainedModel) -> list[CacheName]:
    """All caches of a model."""
    return [(layer, kind) for layer in range(model.config.num_hidden_layers) for kind in ("key", "value")]


def sharer_caches(fuser: FuserCheckpoint) -> list[CacheName]:
    """The caches that a sharer's graph writes for its fuser, which has an open gate."""
    read: set[CacheName] = {(gate.link.sharer_layer, gate.kind) for gate in open_gates(fuser)}
    highest = max(layer for layer, _ in read)
    below: list[CacheName] = [(layer, kind) for layer in range(highest) for kind in ("key", "value")]
    return below + sorted(cache for cache in read if cache[0] == highest)


def decoder_parameters(model: PreTrainedModel, caches: list[CacheName], *, has_logits: bool) -> Parameters:
    """A model's parameters; without logits its graph needs what these caches are computed from."""
    values = {name: tensor.detach().numpy() for name, tensor in model.named_parameters(remove_duplicate=False)}
    highest = max(layer for layer, _ in caches)
    kinds = {kind for layer, kind in caches if layer == highest}

    def is_needed(name: str) -> bool:
        layer = decoder_layer(name)
        if layer is None:
            return "embed_tokens" in name
        makes_cache = decoder_kind(name) in kinds or ".input_layernorm." in name
        return layer < highest or (layer == highest and makes_cache)

    needed = set(values) if has_logits else set(filter(is_needed, values))
    return Parameters(values, needed, {name: Place(decoder_layer(name), decoder_kind(name)) for name in values})


def fuser_parameters(fuser: FuserCheckpoint) -> Parameters:
    """A fuser's parameters but the gates; its graph needs those of projectors' sides with open gates."""
    layers = {link.projector: link.receiver_layer for link in fuser.links}
    is_open = {(gate.link.projector, gate.kind) for gate in open_gates(fuser)}
    values, needed, places = {}, set(), {}
    for projector, weights in fuser.projectors.items():
        for state_name, tensor in weights.state.items():
            if state_name.endswith("gate_logit"):
                continue
            name = f"{projector}.{state_name}"
            side = projector_side(name)
            assert side is not None, "every tensor of a projector belongs to one side"
            values[name], places[name] = tensor.numpy(), Place(layers[projector], side.kind)
            if (projector, side.kind) in is_open:
                needed.add(name)
    return Parameters(values, needed, places)
