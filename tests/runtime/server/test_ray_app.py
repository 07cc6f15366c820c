"""The Ray Serve application on a cluster of two nodes: answers of one process, and nothing is lost with a replica."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from command_line import RunCli
from openai import OpenAI
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import cli as serve_command

from c2c_export.bundle import Bundle
from runtime import C2CPipeline, Chunk, Generation, Request, SamplingParams
from runtime.kept_rows import SharerRows
from runtime.prompt import ModelTokens
from runtime.server.affinity import affinity_key
from runtime.server.remote_sharers import RemoteSharers
from runtime.server.replicated_engine import ReplicatedEngine
from runtime.sharer_engine import SharerEngine

pytestmark = pytest.mark.xdist_group("ray")

PAIR = "llama_from_gemma3_aligned"
LAYOUTS = ("whole", "disaggregated")
NODE: dict[str, Any] = {"num_cpus": 8, "object_store_memory": 100 * 2**20, "include_dashboard": False}
QUESTIONS = [f"What is the capital of country number {number}?" for number in range(12)]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def request(question: str = QUESTIONS[0], **options: Any) -> Request:
    options = {"max_new_tokens": 24, "ignore_eos": True, **options}
    return Request(prompt=[{"role": "user", "content": question}], **options)


@dataclass(frozen=True)
class Deployed:
    """Both layouts, deployed side by side."""

    cluster: Cluster
    bundle: Path
    url: str

    def engine(self, layout: str) -> "contextlib.AbstractAsyncContextManager[ReplicatedEngine]":
        return connected(self.bundle, self.pipeline(layout))

    def pipeline(self, layout: str) -> DeploymentHandle[Any]:
        return serve.get_deployment_handle("Pipeline", layout)

    def client(self, layout: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/{layout}/v1", api_key="none", max_retries=0)


@contextlib.asynccontextmanager
async def connected(bundle: Path, handle: DeploymentHandle[Any]) -> AsyncIterator[ReplicatedEngine]:
    engine = await ReplicatedEngine.connect(Bundle.open(bundle), handle)
    try:
        yield engine
    finally:
        await engine.close(5)


@pytest.fixture(scope="module")
def deployed(
    recorded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    """A cluster of two nodes with both layouts; every deployment with an engine has a replica on each node."""
    bundle = recorded_bundle(PAIR)
    folder = tmp_path_factory.mktemp("ray")
    config = config_of(bundle, folder)
    (folder / "both.yaml").write_text(yaml.safe_dump(config))
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        stack.callback(cluster.shutdown)
        cluster.add_node(**NODE)
        stack.callback(ray.shutdown)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        stack.callback(serve.shutdown)
        serve_command.main(["run", "--non-blocking", str(folder / "both.yaml")], standalone_mode=False)
        wait_until(lambda: all(state == "RUNNING" for state in states().values()) and len(states()) == 2, 60)
        yield Deployed(cluster, bundle, f"http://127.0.0.1:{config['http_options']['port']}")


def config_of(bundle: Path, folder: Path) -> dict[str, Any]:
    ...


def states() -> dict[str, str]:
    return {name: application.status for name, application in serve.status().applications.items()}


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {serve.status()}"
        time.sleep(0.1)
