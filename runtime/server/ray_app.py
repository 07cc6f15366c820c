"""The Ray Serve application: the HTTP application of `c2c-export serve` over replicas on any number of machines.

    client ▶ proxy ▶ Ingress (FastAPI, `ReplicatedEngine`) ▶ Pipeline (`AsyncC2CEngine`) ▶ Sharer<k> (`SharerEngine`)

In: `RayArguments`, which Serve makes of a configuration's `args`. Out: an application for `serve run` and `serve
deploy` (import path `runtime.server.ray_app:build`). In the layout "whole" there is no Sharer<k>: every replica of
Pipeline has all models. docs/scaling.md says when which layout pays. Needs what the extra `ray` installs.
"""

import sys
from typing import Any

from c2c_export.bundle import Bundle
from c2c_export.errors import C2CError, install_command

try:
    from fastapi import FastAPI
    from ray import serve
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise C2CError(
        f"Ray Serve cannot be imported ({error}); install it on every node with: {install_command('ray')}"
    ) from error

from runtime.server.app import create_app
from runtime.server.logs import log_as_json
from runtime.server.metrics import HttpMetrics
from runtime.server.ray.affinity import SessionIdMiddleware
from runtime.server.ray.arguments import RayArguments
from runtime.server.ray.config import INGRESS, PIPELINE, deployment_options, sharer_deployment
from runtime.server.ray.replicas import PipelineReplica, SharerReplica
from runtime.server.ray.replicated_engine import ReplicatedEngine


@serve.ingress()
class Ingress:
    """The HTTP side. It has no engine of its own, and tries again what a lost replica left undone."""

    def __init__(self, arguments: RayArguments, pipeline: DeploymentHandle[Any]) -> None:
        self._arguments = arguments
        self._pipeline = pipeline

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the application when a replica starts, and serves no request before."""
        settings = self._arguments.settings_with_keys()
        log_as_json(sys.stdout, self._arguments.log_level, prompts=settings.log_prompts)
        engine = await ReplicatedEngine.connect(Bundle.open(self._arguments.bundle), self._pipeline)
        app = create_app(engine, settings, HttpMetrics())  # the engines' own are told to Ray
        app.add_middleware(SessionIdMiddleware)
        return app


def build(arguments: RayArguments) -> serve.Application:
    """The application. Raises `BundleError` where there is no bundle at its path on this node."""
    options = deployment_options(arguments)

    def deployment(cls: type, name: str) -> serve.Deployment:
        # One that scales in the code would go on scaling where a configuration gives a number of replicas instead.
        fixed = {option: value for option, value in options[name].items() if option != "autoscaling_config"}
        return serve.deployment(cls, name=name, **fixed)

    sharers = [
        deployment(SharerReplica, sharer_deployment(number)).bind(arguments, number)
        for number in arguments.sharer_numbers
    ]
    pipeline = deployment(PipelineReplica, PIPELINE).bind(arguments, *sharers)
    return deployment(Ingress, INGRESS).bind(arguments, pipeline)
