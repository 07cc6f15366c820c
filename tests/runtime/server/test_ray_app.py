"""The Ray Serve application on a cluster of two nodes: answers of one process, none lost with a replica or a node."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import yaml
from openai import BadRequestError, OpenAI, Stream
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus
from ray.serve.scripts import cli as serve_command

from c2c_export.bundle import Bundle
from runtime import AbortedError, C2CPipeline, DeadlineError, Generation, Request, SamplingParams, UsageError
from runtime.prompt import ModelTokens
from runtime.server.ray import replica_calls
from runtime.server.ray.config import INGRESS, ray_arguments, ray_config_of
from runtime.server.ray.remote_sharers import RemoteSharers
from runtime.server.ray.replica_calls import ReplicaLostError
from runtime.server.ray.replicated_engine import ReplicatedEngine
from runtime.server.serve import ServeOptions
from runtime.sharer_engine import SharerEngine

PAIR = "llama_from_gemma3_aligned"
LAYOUTS = ("whole", "disaggregated")
NODE: dict[str, Any] = {
    "num_cpus": 8,
    "object_store_memory": 100 * 2**20,
    "include_dashboard": False,
}
HEAD = {**NODE, "_system_config": {"metrics_report_interval_ms": 500}}
NUM_SLOTS = 4

pytestmark = pytest.mark.xdist_group("ray")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Deployed:
    """Both layouts side by side, with a replica of every engine on each node."""

    cluster: Cluster
    bundle: Path
    url: str

    def ask(self, layout: str, work: Callable[[ReplicatedEngine], Awaitable[_T]]) -> _T:
        """What `work` makes of an engine over the replicas of a layout, like that of an ingress."""

        async def connect() -> _T:
            replicas = serve.get_deployment_handle("Pipeline", layout)
            engine = await ReplicatedEngine.connect(Bundle.open(self.bundle), replicas)
            return await work(engine)

        return asyncio.run(connect())


@pytest.fixture(scope="module")
def deployed(recorded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    bundle = recorded_bundle(PAIR)
    config = config_of(bundle)
    file = tmp_path_factory.mktemp("ray") / "both.yaml"
    file.write_text(yaml.safe_dump(config))
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        stack.callback(cluster.shutdown)
        cluster.add_node(**NODE)
        stack.callback(ray.shutdown)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        stack.callback(serve.shutdown)
        serve_command.main(["run", "--non-blocking", str(file)], standalone_mode=False)
        wait_until_all_run()
        yield Deployed(cluster, bundle, f"http://127.0.0.1:{config['http_options']['port']}")


def config_of(bundle: Path) -> dict[str, Any]:
    """What `c2c-export serve --ray-config` writes for each layout, in one file, with fixed numbers of replicas."""
    options = ServeOptions(bundle=bundle, port=free_port(), num_slots=NUM_SLOTS, num_threads=1, allow_unchecked=True)
    applications = []
    for layout in LAYOUTS:
        config = yaml.safe_load(ray_config_of(ray_arguments(options, layout), options.host, options.port))
        [application] = config["applications"]
        application |= {"name": layout, "route_prefix": f"/{layout}"}
        for deployment in application["deployments"]:
            del deployment["autoscaling_config"]
            deployment["ray_actor_options"] = {"num_cpus": 0.5}
            if deployment["name"] != INGRESS:
                deployment |= {"num_replicas": 2, "max_replicas_per_node": 1}
        applications.append(application)
    return {**config, "applications": applications, "proxy_location": "HeadOnly"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_all_run(seconds: float = 120) -> None:
    """Until every deployment of both layouts has as many replicas as it is to have."""
    started = time.monotonic()
    while True:
        applications = serve.status().applications
        replicas = [
            (application.status, name == INGRESS, deployment.replica_states)
            for application in applications.values()
            for name, deployment in application.deployments.items()
        ]
        if len(replicas) == 5 and all(
            status == ApplicationStatus.RUNNING and states == {"RUNNING": 1 if is_ingress else 2}
            for status, is_ingress, states in replicas
        ):
            return
        assert time.monotonic() - started < seconds, applications
        time.sleep(0.1)


def wait_until(what: Callable[[], bool], seconds: float) -> None:
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds
        time.sleep(0.1)


def replicas_of(layout: str, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas. All of the cluster's processes are children of this one."""
    title = f"ray::ServeReplica:{layout}:{deployment}"
    children = psutil.Process().children(recursive=True)
    return [child for child in children if " ".join(child.cmdline()).startswith(title)]


def asked(question: str, **options: Any) -> Request:
    options = {"max_new_tokens": 24, "ignore_eos": True, **options}
    return Request(prompt=[{"role": "user", "content": question}], **options)


def some_requests(count: int, about: str, **options: Any) -> list[Request]:
    """Of different prompts and options; `about` is what no other test asks, as rows of former prompts are reused."""
    sampling = [SamplingParams(), SamplingParams(temperature=1.0, seed=7), SamplingParams(top_k=5, seed=1)]
    return [
        asked(f"What do you know of {about} number {n}?", sampling=sampling[n % 3], fuse=n % 4 != 3, **options)
        for n in range(count)
    ]


def in_one_process(pipe: C2CPipeline, request: Request) -> Generation:
    sampling = {name: getattr(request.sampling, name) for name in ("temperature", "top_k", "seed")}
    return pipe.generate(
        request.prompt,  # type: ignore[arg-type]
        fuse=request.fuse,
        max_new_tokens=request.max_new_tokens,
        ignore_eos=request.ignore_eos,
        **sampling,
    )


async def streamed(engine: ReplicatedEngine, request: Request, begun: Callable[[], None] = lambda: None) -> Generation:
    """The answer put together of its pieces; `begun` is called after the first few."""
    text, token_ids, num_pieces = "", [], 0
    async for chunk in engine.stream(request):
        text += chunk.text
        token_ids += chunk.token_ids
        num_pieces += 1
        if num_pieces == 3:
            begun()
        if chunk.generation is not None:
            assert (text, token_ids) == (chunk.generation.text, chunk.generation.token_ids)
            return chunk.generation
    raise AssertionError("the last piece has the generation")


@pytest.fixture
def pipe(recorded_pipeline: Callable[[str], C2CPipeline]) -> C2CPipeline:
    return recorded_pipeline(PAIR)


@each_layout
def test_answers_are_those_of_one_process(layout: str, deployed: Deployed, pipe: C2CPipeline):
    requests = some_requests(12, f"city ({layout})")

    async def ask(engine: ReplicatedEngine) -> list[Generation]:
        return await asyncio.gather(
            *(streamed(engine, request) if n % 2 else engine.generate(request) for n, request in enumerate(requests))
        )

    for found, request in zip(deployed.ask(layout, ask), requests, strict=True):
        expected = in_one_process(pipe, request)
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)


@each_layout
def test_the_ingress_speaks_openais_api(layout: str, deployed: Deployed, pipe: C2CPipeline):
    client = OpenAI(base_url=f"{deployed.url}/{layout}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    options: Any = {"model": PAIR, "messages": messages, "max_tokens": 16, "temperature": 0}
    expected = pipe.generate(messages, max_new_tokens=16)
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected.text
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == expected.text
    with pytest.raises(BadRequestError, match="this bundle's capacity is 256"):
        client.chat.completions.create(**{**options, "messages": [{"role": "user", "content": "why? " * 300}]})


@each_layout
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_gets_all_the_answers_that_it_asks_for(
    stream: bool, layout: str, deployed: Deployed, pipe: C2CPipeline
):
    """Calls that Serve took for one and the same request, being made within one, lost all but the first of them."""
    client = OpenAI(base_url=f"{deployed.url}/{layout}/v1", api_key="none", max_retries=0, timeout=30)
    options: Any = {"model": PAIR, "max_tokens": 6, "stream": stream}
    for number, count in enumerate([2, 3, 2, 3, 2, 3]):
        messages: Any = [{"role": "user", "content": f"Question {number} ({layout}, {stream})?"}]
        chat = client.chat.completions.create(messages=messages, n=count, seed=5, temperature=1, **options)
        drawn = [pipe.generate(messages, max_new_tokens=6, temperature=1.0, seed=5 + i) for i in range(count)]
        assert texts_of(chat) == [generation.text for generation in drawn]
        prompts = [[3 + number, 20 + n] for n in range(count)]
        completion = client.completions.create(prompt=prompts, temperature=0, **options)
        greedy = [pipe.generate(input_ids=ids, max_new_tokens=6) for ids in prompts]
        assert texts_of(completion) == [generation.text for generation in greedy]


def texts_of(response: Any) -> list[str]:
    """The answers in their order; `response` is a whole one or a stream."""
    texts: dict[int, str] = {}
    for part in response if isinstance(response, Stream) else [response]:
        for choice in part.choices:
            message = getattr(choice, "message", None) or getattr(choice, "delta", None)
            text = choice.text if message is None else message.content
            texts[choice.index] = texts.get(choice.index, "") + (text or "")
    return [texts[index] for index in sorted(texts)]


@each_layout
def test_errors_of_a_replica_are_raised_as_they_were_there(layout: str, deployed: Deployed):
    async def ask(engine: ReplicatedEngine) -> None:
        with pytest.raises(UsageError, match=r"this bundle's capacity is 256"):
            await engine.generate(asked("why? " * 300))
        with pytest.raises(UsageError, match=r"sharer 5: this bundle has sharers 0 to 0"):
            await streamed(engine, asked("why?", sharers=[5]))
        with pytest.raises(DeadlineError):
            await engine.generate(asked("why?", deadline=1e-6))
        request = asked("why?", max_new_tokens=200)
        with pytest.raises(AbortedError):
            await streamed(engine, request, begun=lambda: engine.abort(request.request_id))
        assert not engine.abort(request.request_id)
        assert engine.num_active == 0

    deployed.ask(layout, ask)


def test_rows_are_handed_over_unchanged_and_uncopied(deployed: Deployed):
    # Ray keeps objects of 100 kB and less out of its shared memory: they come with the reply.
    tokens = ModelTokens(np.arange(3, 243), np.arange(240))
    expected = SharerEngine.from_bundle(deployed.bundle, 0, num_threads=1, allow_unchecked=True).prefill(tokens)
    assert sum(values.nbytes for values in expected.rows.values()) > 200_000

    async def read() -> None:
        sharers = RemoteSharers({0: serve.get_deployment_handle("Sharer0", "disaggregated")})
        for key in "abcdef":  # conversations of replicas on both nodes
            rows = await sharers.prefill(0, tokens, key)
            np.testing.assert_array_equal(rows.tokens.ids, tokens.ids)
            assert rows.rows.keys() == expected.rows.keys()
            for name, values in rows.rows.items():
                np.testing.assert_array_equal(values, expected.rows[name], err_msg=name)
                assert values.dtype == expected.rows[name].dtype
                assert not values.flags.owndata
                assert not values.flags.writeable
                assert any(values.ctypes.data in store for store in object_stores())

    asyncio.run(read())


def object_stores() -> list[range]:
    """Where this process sees Ray's shared memory."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, _, *path = line.split()
        if permissions.endswith("s") and path and "plasma" in path[0]:
            start, stop = (int(address, 16) for address in addresses.split("-"))
            found.append(range(start, stop))
    return found


@each_layout
def test_further_turns_reach_the_replica_that_holds_the_former_ones(layout: str, deployed: Deployed):
    async def talk(engine: ReplicatedEngine, number: int) -> list[int]:
        messages = [{"role": "user", "content": f"{number} {layout}: what is the capital of France?"}]
        reused = []
        for turn in range(3):
            request = Request(prompt=list(messages), max_new_tokens=4, ignore_eos=True)
            generation = await engine.generate(request)
            reused.append(generation.num_reused_tokens)
            messages += [
                {"role": "assistant", "content": "Paris."},
                {"role": "user", "content": f"And question {turn} of {number}?"},
            ]
        return reused

    async def ask(engine: ReplicatedEngine) -> list[list[int]]:
        return await asyncio.gather(*(talk(engine, number) for number in range(6)))

    for number, (first, *further) in enumerate(deployed.ask(layout, ask)):
        assert first < 16, "no more than what the template begins with"
        assert min(further) > 20, f"a turn of conversation {number} began anew"


def test_a_session_id_says_which_replica(deployed: Deployed):
    question: Any = [{"role": "user", "content": "The very same question, asked by several sessions?"}]

    def ask(session: str) -> int:
        client = OpenAI(base_url=f"{deployed.url}/whole/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model=PAIR, messages=question, max_tokens=2, extra_headers={"X-Session-Id": session}
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    reused = {session: ask(session) for session in "abcdefghijkl"}
    assert sum(tokens < 16 for tokens in reused.values()) == 2, f"each of two replicas reads it once: {reused}"
    assert min(ask(session) for session in reused) > 16


def test_rays_agents_export_the_engines_metrics(deployed: Deployed):
    def exported() -> str:
        urls = [f"http://127.0.0.1:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]
        return "".join(urllib.request.urlopen(url).read().decode() for url in urls)

    deployed.ask("whole", lambda engine: engine.generate(asked("What do metrics say?")))
    names = ("c2c_time_to_first_token_seconds_bucket", "c2c_generated_tokens_total", "c2c_fuse_seconds_count")
    wait_until(lambda: all(f"ray_{name}" in exported() for name in names), 60)
    assert any('application="whole"' in line for line in exported().splitlines() if names[0] in line)


def test_an_ingress_tells_of_http_requests_and_of_no_engine(deployed: Deployed):
    told = urllib.request.urlopen(f"{deployed.url}/whole/metrics").read().decode()
    names = {line.split("{")[0].split(" ")[0] for line in told.splitlines() if line.startswith("c2c_")}
    assert names
    assert all(name.startswith("c2c_http_") for name in names)


def test_a_request_that_is_aborted_between_two_tries_is_not_tried_again(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica_calls, "PAUSES", (60.0,))

    async def ask(engine: ReplicatedEngine) -> None:
        request = asked("why?", max_new_tokens=200)
        answer = asyncio.create_task(engine.generate(request))
        await asyncio.sleep(0)
        [call] = engine._calls.values()
        call.response = None
        answering = asyncio.create_task(call.pause_after(ReplicaLostError("it died")))
        await asyncio.sleep(0)
        assert engine.abort(request.request_id)
        with pytest.raises(AbortedError):
            await asyncio.wait_for(answering, 5)
        answer.cancel()

    deployed.ask("whole", ask)


@each_layout
def test_a_killed_pipeline_loses_no_request(
    layout: str, deployed: Deployed, pipe: C2CPipeline, caplog: pytest.LogCaptureFixture
):
    requests = some_requests(24, f"river ({layout})", max_new_tokens=150)
    [victim, _] = replicas_of(layout, "Pipeline")

    async def ask(engine: ReplicatedEngine) -> list[Generation]:
        once = threading.Lock()

        def kill() -> None:
            if once.acquire(blocking=False):
                os.kill(victim.pid, signal.SIGKILL)

        return await asyncio.gather(
            *(
                streamed(engine, request, begun=kill) if n % 2 else engine.generate(request)
                for n, request in enumerate(requests)
            )
        )

    found = deployed.ask(layout, ask)
    # How many answers were still to come depends on how far the replica was ahead of its readers.
    assert any("a replica was lost" in record.message for record in caplog.records)
    for generation, request in zip(found, requests, strict=True):
        expected = in_one_process(pipe, request)
        assert (generation.text, generation.token_ids) == (expected.text, expected.token_ids)
    wait_until_all_run()


def test_a_killed_sharer_loses_no_request(deployed: Deployed, pipe: C2CPipeline):
    requests = some_requests(8, "mountain")
    sharers = replicas_of("disaggregated", "Sharer0")
    assert len(sharers) == 2

    async def ask(engine: ReplicatedEngine) -> list[Generation]:
        for sharer in sharers:
            sharer.suspend()  # so that prompts are being read when one of them dies
        try:
            answers = [asyncio.create_task(engine.generate(request)) for request in requests]
            await asyncio.sleep(1)
            assert not any(answer.done() for answer, request in zip(answers, requests, strict=True) if request.fuse)
            sharers[0].kill()
        finally:
            sharers[1].resume()
        return await asyncio.gather(*answers)

    found = deployed.ask("disaggregated", ask)
    for generation, request in zip(found, requests, strict=True):
        assert generation.token_ids == in_one_process(pipe, request).token_ids
    wait_until_all_run()


def test_a_lost_node_loses_no_request(deployed: Deployed, pipe: C2CPipeline, caplog: pytest.LogCaptureFixture):
    """Comes last: the node is gone for good."""
    requests = some_requests(24, "lake", max_new_tokens=150)
    [node] = deployed.cluster.worker_nodes
    begun = threading.Event()

    def lose_node() -> None:
        begun.wait()
        [raylet] = node.all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        for worker in workers:
            worker.suspend()  # all at once, whatever they are at
        deployed.cluster.remove_node(node, allow_graceful=False)
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()

    async def ask(engine: ReplicatedEngine) -> list[Generation]:
        return await asyncio.gather(*(streamed(engine, request, begun.set) for request in requests))

    losing = threading.Thread(target=lose_node)
    losing.start()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda layout: deployed.ask(layout, ask), LAYOUTS))
    losing.join()
    assert any("a replica was lost" in record.message for record in caplog.records)
    for generations in found:
        for generation, request in zip(generations, requests, strict=True):
            assert generation.token_ids == in_one_process(pipe, request).token_ids
