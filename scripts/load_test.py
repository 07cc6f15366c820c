"""Load a server with many clients at once, compare every answer with its own, and look for what is left behind.

    python scripts/load_test.py BUNDLE [--precision fp32] [--slots 8] [--requests 200] [--at-once 16] [--rounds 1]
                                       [--json FILE]

In: a bundle whose receiver chats. Every answer is generated alone first, by `C2CPipeline` in this process; then
`c2c-export serve` runs in a process of its own, and OpenAI's client sends the requests: prompts of mixed length, with
and without sharers, greedy and sampled, every other one as a stream, every tenth stream left after some tokens. Out: a
table of what was found, and each request whose answer differed; exit status 1 if one did, a request failed, slots,
threads or files were left that the server did not hold before the first round, or the server did not end in good order.
Memory is the server's resident one after each round: with three rounds or more, the last one's may be 3 % above the
second one's, as caches are filled by then; with fewer it is shown, not judged. `--rounds 5` sends 1,000 requests.
Questions too long for the bundle's capacity are left out.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from runtime import C2CPipeline

QUESTIONS = (
    "Which country is the city of Orlando in?",
    "Which country is the city of Wazirabad in?",
    "Which word means: measuring instrument for performing pelvimetry?",
    "What is the capital city of Slovenia?",
    "Hi",
    "Tell me a story about a fox and a crow, please, and let it have an end.",
    "Name what you know of these: " + ", ".join(f"the number {number}" for number in range(60)) + ".",
)
SYSTEM = "You are a helpful assistant who answers in few words."
LEFT_AFTER_TOKENS = 4
SETTLE_SECONDS = 20.0
MAX_TOKENS = (3, 8, 17, 40)
TEMPLATE_TOKENS = 64
"""More than a chat template adds to two messages."""
THREAD_POOL = 40 + 1
"""Threads that requests start and that may be left: anyio's for what FastAPI calls beside the event loop, 40 at most,
and the engine's, which plans."""
MEMORY_GROWTH = 1.03
"""From the second round to the last."""
START_SECONDS = 600.0
END_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """A request and the options of its generation."""

    question: str
    system: bool
    fuse: bool
    max_tokens: int
    temperature: float
    seed: int

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat."""
        turn = {"role": "user", "content": self.question}
        return [{"role": "system", "content": SYSTEM}, turn] if self.system else [turn]


@dataclass(frozen=True)
class Held:
    """What a process holds of its machine."""

    resident_mb: float
    threads: int
    open_files: int


@dataclass
class Round:
    """What one round of requests gave."""

    seconds: float = 0.0
    finished: int = 0
    left: int = 0
    different: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    generated_tokens: int = 0
    reused_tokens: int = 0
    held: Held = Held(0.0, 0, 0)
    """By the server, when it was idle again."""


def main(arguments: list[str] | None = None) -> int:
    """Run it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    rng = random.Random(options.seed)
    pipe = C2CPipeline.from_bundle(options.bundle, precision=options.precision, num_slots=1, allow_unchecked=True)
    questions = fitting_questions(pipe)
    cases = [
        Case(
            question=rng.choice(questions),
            system=rng.random() < 0.5,
            fuse=rng.random() < 0.75,
            max_tokens=rng.choice(MAX_TOKENS),
            temperature=rng.choice((0.0, 0.0, 0.8)),
            seed=rng.randrange(4),
        )
        for _ in range(options.requests)
    ]
    console.print(f"Answering {len(set(cases))} different requests alone …")
    expected = answer_alone(pipe, cases)
    del pipe
    with Server(options.bundle, options.precision, options.slots, console) as server:
        time.sleep(1.0)  # the connections that asked whether it is ready are closed by then
        before, rounds = server.held(), list[Round]()
        for number in range(options.rounds):
            console.print(f"Round {number + 1} of {options.rounds}: {len(cases)} requests, {options.at_once} at once …")
            rounds.append(asyncio.run(send_all(server, cases, expected, options.at_once, before)))
    Console().print(table_of(before, rounds))
    if options.json:
        found = {"before": asdict(before), "rounds": [asdict(one) for one in rounds]}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    problems = problems_of(before, rounds)
    if server.ended_with != 0:
        problems.append(f"the server {server.how_it_ended}")
    for problem in problems:
        Console().print(problem, markup=False, soft_wrap=True)
    return int(bool(problems))


def problems_of(before: Held, rounds: list[Round]) -> list[str]:
    """What must not be, a line each; `before` is what the idle server held before the first round."""
    found = []
    for number, one in enumerate(rounds, 1):
        found += [f"round {number}: {what}" for what in (*one.failed, *one.different)]
    last = rounds[-1].held
    if last.threads > before.threads + THREAD_POOL:
        found.append(f"threads grew from {before.threads} to {last.threads}")
    if last.open_files > before.open_files:
        found.append(f"open files grew from {before.open_files} to {last.open_files}")
    if len(rounds) >= 3:  # caches are filled until the second
        second = rounds[1].held.resident_mb
        if last.resident_mb > MEMORY_GROWTH * second:
            found.append(f"resident memory grew from {second:.0f} MB (round 2) to {last.resident_mb:.0f} MB")
    return found


def fitting_questions(pipe: C2CPipeline) -> list[str]:
    """Those of the questions that the bundle has room for, with the longest answer."""
    room = pipe.bundle.manifest.max_length - max(MAX_TOKENS) - TEMPLATE_TOKENS
    fitting = [text for text in QUESTIONS if len(pipe.receiver_tokenizer.encode(SYSTEM + text).ids) <= room]
    if not fitting:
        raise SystemExit(f"error: {pipe.bundle.root}: no question fits its capacity; export it with a larger one")
    return fitting


def answer_alone(pipe: C2CPipeline, cases: list[Case]) -> dict[Case, str]:
    """Every different case's text, one at a time."""
    answers = {}
    for case in dict.fromkeys(cases):
        sampling = {"temperature": case.temperature, "seed": case.seed} if case.temperature else {}
        answers[case] = pipe.generate(case.messages, fuse=case.fuse, max_new_tokens=case.max_tokens, **sampling).text
    return answers


class Server:
    """`c2c-export serve` in a process of its own, for a `with` block, behind which it runs no more."""

    def __init__(self, bundle: Path, precision: str, num_slots: int, console: Console) -> None:
        self.num_slots = num_slots
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.ended_with: int | None = None
        """The process's status, behind the block; None where it had to be killed."""
        self.how_it_ended = "was killed"
        self._console = console
        command = [
            "serve",
            bundle,
            "--precision",
            precision,
            "--slots",
            num_slots,
            "--port",
            port,
            "--max-waiting",
            1000,
            "--allow-unchecked",
        ]
        self._command = [sys.executable, "-m", "c2c_export.cli", *map(str, command)]

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_until_ready()
        except BaseException:
            self._kill()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return urllib.request.urlopen(f"{self.url}/ready", timeout=5).close()
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit(f"error: the server ended with status {self.process.returncode}") from None
                if time.monotonic() > deadline:
                    raise SystemExit(f"error: the server was not ready within {START_SECONDS:g} s") from None
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.ended_with = self.process.wait(END_SECONDS)
            self.how_it_ended = f"ended with status {self.ended_with}"
        except subprocess.TimeoutExpired:
            self.how_it_ended = f"did not end within {END_SECONDS:g} s, and was killed"
        finally:
            self._kill()
        self._console.print(f"The server {self.how_it_ended}.")

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """Its metrics by name, with labels as they are written."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and line[0] != "#"}

    def held(self) -> Held:
        """What it holds now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        values = dict(re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE))
        files = len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
        return Held(int(values["VmRSS"]) / 1e3, int(values["Threads"]), files)


async def send_all(server: Server, cases: list[Case], expected: dict[Case, str], at_once: int, idle: Held) -> Round:
    """Send every case, and wait until the server is idle again; `idle` is what it held when it was so."""
    found, places, before = Round(), asyncio.Semaphore(at_once), server.metrics()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id

        async def send(index: int, case: Case) -> None:
            async with places:
                leave = index % 20 == 1
                try:
                    text = await ask(client, model, case, stream=index % 2 == 1, leave=leave)
                except Exception as error:
                    found.failed.append(f"request {index}: {type(error).__name__}: {error}")
                    return
            if text is None:
                found.left += 1
            else:
                found.finished += 1
                if text != expected[case]:
                    found.different.append(f"request {index}: {text!r} is not {expected[case]!r}, as alone; {case}")

        started = time.perf_counter()
        await asyncio.gather(*(send(index, case) for index, case in enumerate(cases)))
        found.seconds = time.perf_counter() - started
    deadline = time.monotonic() + SETTLE_SECONDS
    while (metrics := server.metrics())['c2c_slots{state="free"}'] < server.num_slots or metrics["c2c_queue_length"]:
        if time.monotonic() > deadline:
            found.failed.append(f"slots or requests are left over: {metrics}")
            break
        await asyncio.sleep(0.1)
    found.generated_tokens = int(metrics["c2c_generated_tokens_total"] - before["c2c_generated_tokens_total"])
    found.reused_tokens = int(metrics["c2c_reused_tokens_total"] - before["c2c_reused_tokens_total"])
    while server.held().open_files > idle.open_files and time.monotonic() < deadline:
        await asyncio.sleep(0.1)  # connections that the client has closed
    found.held = server.held()
    return found


async def ask(client: AsyncOpenAI, model: str, case: Case, *, stream: bool, leave: bool) -> str | None:
    """The answer's text; None where the stream was left before its end."""
    options = {
        "model": model,
        "messages": case.messages,
        "max_tokens": case.max_tokens,
        "temperature": case.temperature,
        "seed": case.seed,
        "extra_body": {"fuse": case.fuse},
    }
    if not stream:
        answer = await client.chat.completions.create(**options)
        return answer.choices[0].message.content
    texts: list[str] = []
    async with await client.chat.completions.create(stream=True, **options) as chunks:
        async for chunk in chunks:
            texts += [choice.delta.content or "" for choice in chunk.choices]
            if leave and len(texts) > LEFT_AFTER_TOKENS:
                return None
    return "".join(texts)


def table_of(before: Held, rounds: list[Round]) -> Table:
    """What was found, a column for each round."""
    table = Table("", "before", *(f"round {number + 1}" for number in range(len(rounds))))
    held = [before, *(one.held for one in rounds)]
    rows = {
        "seconds": ["", *(f"{one.seconds:.1f}" for one in rounds)],
        "finished, as alone": ["", *(str(one.finished - len(one.different)) for one in rounds)],
        "finished, different": ["", *(str(len(one.different)) for one in rounds)],
        "left by the client": ["", *(str(one.left) for one in rounds)],
        "failed": ["", *(str(len(one.failed)) for one in rounds)],
        "tokens a second": ["", *(f"{one.generated_tokens / one.seconds:.0f}" for one in rounds)],
        "prompt tokens reused": ["", *(str(one.reused_tokens) for one in rounds)],
        "server: resident MB": [f"{one.resident_mb:.0f}" for one in held],
        "server: threads": [str(one.threads) for one in held],
        "server: open files": [str(one.open_files) for one in held],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    return table


if __name__ == "__main__":
    sys.exit(main())
