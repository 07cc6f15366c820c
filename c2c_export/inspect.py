"""Print what a bundle holds: models, layer map with gates, graphs and what the passes did, engines."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from c2c_export.bundle import Bundle, GraphRecord, ModelRecord, SharerRecord


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Print `bundle` to `console` as a few tables."""
    manifest = bundle.manifest
    several = f", fused in {'parallel' if manifest.fusion_mode == 'parallel' else 'sequence'}"
    console.print(
        f"[bold]{escape(str(bundle.root))}[/]: capacity {manifest.max_length} tokens, "
        f"{'aligned (two vocabularies)' if manifest.aligned else 'unaligned (one vocabulary)'}, "
        f"{len(manifest.sharers)} sharer(s){several if len(manifest.sharers) > 1 else ''}"
    )
    console.print(_models(manifest.receiver, manifest.sharers))
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
    console.print("Written by " + ", ".join(f"{name} {version}" for name, version in manifest.tool_versions.items()))


def _models(receiver: ModelRecord, sharers: tuple[SharerRecord, ...]) -> Table:
    table = Table(
        "model", "architecture", "layers", "KV heads × size", "vocabulary", "window", "chat template", "source"
    )
    for name, model in [("receiver", receiver), *((f"sharer {i}", s.model) for i, s in enumerate(sharers))]:
        table.add_row(
            name,
            model.architecture,
            str(model.num_layers),
            f"{model.num_key_value_heads} × {model.head_dim}",
            str(model.vocab_size),
            str(model.sliding_window or "none"),
            escape(model.chat_template),
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
    table = Table("engine", "precision", "size", "check")
    for engine in bundle.manifest.engines.values():
        num_bytes = sum(
            path.stat().st_size
            for graph in engine.graphs.values()
            for path in bundle.file(graph).parent.glob(f"{bundle.file(graph).name}*")
        )
        table.add_row(
            engine.target,
            engine.precision,
            f"{num_bytes / 1e6:.1f} MB",
            "not checked" if engine.check is None else "checked",
        )
    return table
