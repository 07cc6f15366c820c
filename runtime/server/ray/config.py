"""The configuration that `serve run` and `serve deploy` take, as YAML.

In: `RayArguments`, host and port. Out: text, or the options of every deployment, which `runtime.server.ray_app` deploys
with where no file says otherwise. Nothing is deployed, and Ray is not needed here. Not covered: what a cluster's nodes
have; whoever deploys edits replicas and resources in the file.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from c2c_export.bundle import Bundle, read_manifest
from c2c_export.errors import UsageError
from engines.cores import physical_cores, whole_processors
from engines.select import AUTO, ORT_CPU, wanted_engines
from runtime.server.ray.arguments import Layout, RayArguments
from runtime.server.serve import ServeOptions
from runtime.server.settings import API_KEYS

INGRESS = "Ingress"
PIPELINE = "Pipeline"
IMPORT_PATH = "runtime.server.ray_app:build"
_ROUTER = "runtime.server.ray.conversation_router.ConversationRouter"
_MAX_REPLICAS = 4
_MAX_QUEUED = 256
"""Requests that an ingress holds for one deployment while all its replicas are full; beyond it clients get 429."""
_DRAIN_SECONDS = 60
"""What a replica that is to go has for its requests; others generate anew what is left then."""
_PROMPTS_AT_ONCE = 2
"""Of a sharer's replica: one is computed while the rows of another one are handed over."""
_HEADER = """\
# {bundle} on Ray Serve: {what}.
#   serve run FILE       on this machine, or from any node of a cluster
#   serve deploy FILE    to a running cluster{keys}
# The bundle has to be at this path on every node, and c2c-export with its extra ray installed there.
# Replicas, CPUs and GPUs are to be adapted to the cluster: docs/scaling.md.
"""
_KEYS = f"\n# API keys are not in this file: set {API_KEYS} where Ray is started on the nodes."
_WHAT = {
    "whole": "every replica of Pipeline has all models",
    "disaggregated": "the replicas of Pipeline have the receiver and the fusers, every sharer has replicas of its own",
}


def ray_arguments(options: ServeOptions, layout: str) -> RayArguments:
    """What the application is told, to serve as `options` say.

    API keys are left out, as files are read by many. Raises `UsageError` where the bundle has no such engine, or no
    sharer to be given replicas of its own.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"ray_layout: {layout!r} is not allowed; expected {' or '.join(get_args(Layout))}")
    root = Path(options.bundle).absolute()
    engines = wanted_engines(Bundle(root, read_manifest(root)), options.engine, options.precision)
    precisions = [record.precision for record in engines]
    arguments = RayArguments(
        bundle=str(root),
        layout=cast(Layout, layout),
        engine=options.engine,
        precision=precisions[0] if AUTO not in (options.engine, options.precision) else AUTO,
        num_slots=options.num_slots,
        num_threads=options.num_threads,
        allow_unchecked=options.allow_unchecked,
        allow_failed=options.allow_failed,
        api_keys_needed=bool(options.settings.api_keys),
        log_level=options.log_level,
        scheduler=options.scheduler,
        settings=replace(options.settings, api_keys=()),
    )
    if len(engines) > 1:
        raise UsageError(f"precision: {root} has {options.engine} in {', '.join(precisions)}; name the one to run")
    if layout == "disaggregated" and not arguments.sharer_numbers:
        raise UsageError(f"{root}: no sharer of this bundle computes anything; take the layout whole")
    return arguments


def sharer_deployment(number: int) -> str:
    """The name of the deployment of sharer `number`."""
    return f"Sharer{number}"


def deployment_options(arguments: RayArguments) -> dict[str, dict[str, Any]]:
    """The Serve options of every deployment, by name; reads the bundle's manifest."""
    options: dict[str, dict[str, Any]] = {
        INGRESS: {
            "autoscaling_config": _autoscaling(16 * arguments.num_slots),
            "max_ongoing_requests": 64 * arguments.num_slots,
            "graceful_shutdown_timeout_s": _DRAIN_SECONDS,
            # It computes little, and an engine takes every core of a machine.
            "ray_actor_options": {"num_cpus": 0},
        },
        PIPELINE: {
            "autoscaling_config": _autoscaling(arguments.num_slots),
            # Beyond its slots a replica has few that wait, so that they can go elsewhere when it is busy for long.
            "max_ongoing_requests": 2 * arguments.num_slots,
            **_with_engine(arguments),
        },
    }
    for number in arguments.sharer_numbers:
        options[sharer_deployment(number)] = {
            "autoscaling_config": _autoscaling(_PROMPTS_AT_ONCE),
            "max_ongoing_requests": 2 * _PROMPTS_AT_ONCE,
            **_with_engine(arguments),
        }
    return options


def _with_engine(arguments: RayArguments) -> dict[str, Any]:
    on_cpu = arguments.engine == ORT_CPU
    return {
        # Turns of a conversation go to one replica, which has the rows of the former ones.
        "request_router_config": {"request_router_class": _ROUTER},
        "max_queued_requests": _MAX_QUEUED,
        "graceful_shutdown_timeout_s": _DRAIN_SECONDS,
        "ray_actor_options": {"num_cpus": arguments.num_threads or min(physical_cores(), whole_processors())}
        if on_cpu
        else {"num_cpus": 1, "num_gpus": 1},
    }


def warn_of_too_few_cpus(arguments: RayArguments) -> None:
    """Warn where this machine by itself lacks the CPUs for one replica of every deployment.

    Serve then waits for another machine, without an error.
    """
    taken = {name: options["ray_actor_options"]["num_cpus"] for name, options in deployment_options(arguments).items()}
    # As Ray counts them, unless it is told a number.
    found = whole_processors()
    if sum(taken.values()) > found:
        each = ", ".join(f"{name} {num_cpus}" for name, num_cpus in taken.items() if num_cpus)
        warnings.warn(
            f"a replica of each deployment takes CPUs: {each}; this machine has {found}, so that by itself it cannot "
            "start them: add machines, or give fewer --threads",
            stacklevel=2,
        )


def _autoscaling(target: int) -> dict[str, Any]:
    return {"min_replicas": 1, "max_replicas": _MAX_REPLICAS, "target_ongoing_requests": target}


def ray_config_of(arguments: RayArguments, host: str, port: int) -> str:
    """The YAML, for an application of the name "c2c" at `/`."""
    application = {
        "name": "c2c",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": arguments.model_dump(mode="json", exclude_defaults=True),
        "deployments": [{"name": name, **options} for name, options in deployment_options(arguments).items()],
    }
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [application],
    }
    keys = _KEYS if arguments.api_keys_needed else ""
    header = _HEADER.format(bundle=arguments.bundle, what=_WHAT[arguments.layout], keys=keys)
    return header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
