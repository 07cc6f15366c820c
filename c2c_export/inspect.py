"""Print what a bundle holds: models, layer map with gates, graphs and what the passes did, engines."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2c_export.bundle import (
    BuildRecord,
    BuiltGraphRecord,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    ProfileRecord,
    SharerRecord,
)
from engines.targets import target_of


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Print `bundle` to `console` as a few tables."""
    manifest = bundle.manifest
    several = f", fused in {'parallel' if manifest.fusion_mode == 'parallel' else 'sequence'}"
    vocabularies = "aligned (two vocabularies)" if manifest.aligned else "unaligned (one vocabulary)"
    models = f"{vocabularies}, {len(manifest.sharers)} sharer(s){several if len(manifest.sharers) > 1 else ''}"
    console.print(
        f"[bold]{escape(str(bundle.root))}[/]: capacity {manifest.max_length} tokens, "
        f"{models if manifest.sharers else 'one model, no sharers'}"
    )
    console.print(_models(manifest))
    for number, sharer in enumerate(manifest.sharers):
        strategy = f", alignment strategy {sharer.alignment_strategy}" if sharer.alignment_strategy else ""
        gates = [is_open for link in sharer.links for is_open in (link.key_gate_open, link.value_gate_open)]
        console.print(
            f"fuser {number}: {escape(sharer.fuser_source)}{strategy}, {sum(gates)} of {len(gates)} gates open",
            highlight=False,
            soft_wrap=True,
        )
        console.print(_layer_map(sharer))
    console.print(_graphs(bundle))
    console.print(_engines(bundle))
    for name, engine in manifest.engines.items():
        if engine.build is not None:
            console.print(_built_graphs(name, engine.build))
    console.print("Written by " + ", ".join(f"{name} {version}" for name, version in manifest.tool_versions.items()))


def _models(manifest: Manifest) -> Table:
    table = Table(
        "model", "architecture", "layers", "KV heads × size", "vocabulary", "window", "chat template", "source"
    )
    models = [("receiver", manifest.receiver)]
    models += [(f"sharer {number}", sharer.model) for number, sharer in enumerate(manifest.sharers)]
    for name, model in models:
        has_own_prompt = name == "receiver" or manifest.aligned
        table.add_row(
            name,
            model.architecture,
            str(model.num_layers),
            f"{model.num_key_value_heads} × {model.head_dim}",
            str(model.vocab_size),
            str(model.sliding_window or "none"),
            escape(model.chat_template) if has_own_prompt else "the receiver's",
            escape(model.source),
        )
    return table


def _layer_map(sharer: SharerRecord) -> Table:
    table = Table(
        "receiver layer",
        "sharer layer",
        "projector",
        "K gate",
        "V gate",
    )
    for link in sharer.links:
        table.add_row(
            str(link.receiver_layer),
            str(link.sharer_layer),
            str(link.projector),
            _gate(link.key_gate_open),
            _gate(link.value_gate_open),
        )
    return table


def _gate(is_open: bool) -> str:
    return "[green]open[/]" if is_open else "[red]closed[/]"


def _graphs(bundle: Bundle) -> Table:
    table = Table("graph", "nodes", "size", "passes (times applied)")
    graphs: list[tuple[str, GraphRecord | None]] = [("receiver", bundle.manifest.receiver_graph)]
    for number, sharer in enumerate(bundle.manifest.sharers):
        graphs += [(f"sharer {number}", sharer.sharer_graph), (f"fuser {number}", sharer.fuser_graph)]
    for name, graph in graphs:
        if graph is None:
            table.add_row(name, "none", "0 MB", "every gate is closed: nothing to compute")
        else:
            passes = ", ".join(f"{pass_name} {count}" for pass_name, count in graph.passes.items())
            table.add_row(name, str(graph.num_nodes), f"{graph.num_bytes / 1e6:.1f} MB", passes)
    return table


def _engines(bundle: Bundle) -> Table:
    table = Table("engine", "precision", "size", "check", "GPUs", "most requests", "built with")
    for engine in bundle.manifest.engines.values():
        num_bytes = sum(path.stat().st_size for path in bundle.engine_files(engine))
        build = engine.build
        table.add_row(
            engine.target,
            engine.precision,
            f"{num_bytes / 1e6:.1f} MB{'' if engine.weights_folder is None else ', the weights in graphs'}",
            _check(engine),
            "" if build is None else _gpus(engine.target, build),
            "" if build is None or build.profile_sizes is None else str(build.profile_sizes.max_batch),
            "" if build is None else ", ".join(f"{name} {version}" for name, version in build.versions.items()),
        )
    return table


def _check(engine: EngineRecord) -> str:
    if engine.check is None:
        return "not checked"
    failed = ", ".join(level.name for level in engine.check.failed_levels)
    return "[green]passed[/]" if engine.check.passed else f"[red]failed[/]: {failed}"


def _gpus(target: str, build: BuildRecord) -> str:
    if build.gpu is not None:
        return build.gpu.name
    return ", ".join(build.compute_capabilities or target_of(target).default_compute_capabilities) or "any"


def _built_graphs(name: str, build: BuildRecord) -> Table:
    if build.profile_sizes is None:
        return _lowered_graphs(name, build)
    table = Table(
        "graph",
        "size",
        "layers",
        "profiles: tokens from … to …, best at …",
        title=f"{name}{', flags ' if build.flags else ''}{', '.join(build.flags)}",
        title_justify="left",
    )
    for graph, built in build.graphs.items():
        table.add_row(
            graph,
            f"{built.num_bytes / 1e6:.1f} MB",
            "\n".join(_layers(built)),
            "\n".join(_profile(profile) for profile in built.profiles),
        )
    return table


def _lowered_graphs(name: str, build: BuildRecord) -> Table:
    """The graphs of an engine on ONNX Runtime, which takes any shape."""
    table = Table("graph", "size", "weights", "rules (times applied)", title=name, title_justify="left")
    for graph, built in build.graphs.items():
        rules = ", ".join(f"{rule} {count}" for rule, count in built.rules.items())
        table.add_row(graph, f"{built.num_bytes / 1e6:.1f} MB", "\n".join(_weights(built)), rules or "none")
    return table


def _weights(built: BuiltGraphRecord) -> Iterator[str]:
    if built.quantized_weights or built.float_weights:
        yield f"{built.quantized_weights} integer weights"
    if built.float_weights:
        yield f"{built.float_weights} weights in floating point (their shape does not allow integers)"


def _layers(built: BuiltGraphRecord) -> Iterator[str]:
    yield from _weights(built)
    if built.layers is None:
        return
    if built.layers.attention:
        yield f"{built.layers.attention} attention{'' if built.single_attention_kernels else ', of several kernels'}"
    for kind, count in (("cache updates", built.layers.cache_updates), ("rotary", built.layers.rotary)):
        if count:
            yield f"{count} {kind}"
    yield f"{built.layers.total} total"


def _profile(profile: ProfileRecord) -> str:
    """Such as `prefill [1,1] … [1,256], [1,128]`: the shape of the ids or rows that an engine is given."""
    tokens = next(name for name in ("input_ids", "sharer_rows") if name in profile.shapes)
    smallest, best, largest = (str(list(shape)).replace(" ", "") for shape in profile.shapes[tokens])
    return escape(f"{profile.name} {smallest} … {largest}, {best}")
