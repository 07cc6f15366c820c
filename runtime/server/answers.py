"""The answers of several requests at once: whole, or their pieces as they come.

What ends early, by an error of one of them or because nobody reads on, aborts them all.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from runtime.generation import Chunk, Generation
from runtime.request import Request
from runtime.server.served_engine import ServedEngine


async def whole_answers(engine: ServedEngine, requests: Sequence[Request]) -> list[Generation]:
    """The answers in the order of the requests. Raises the first error of any of them."""
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def answers_in_pieces(
    engine: ServedEngine, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The pieces with their request's index. Raises the first error of any of them."""
    pieces: asyncio.Queue[tuple[int, Chunk | Exception]] = asyncio.Queue()

    async def collect(index: int, request: Request) -> None:
        try:
            async with aclosing(engine.stream(request)) as chunks:
                async for chunk in chunks:
                    pieces.put_nowait((index, chunk))
        except Exception as error:
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(collect(index, request)) for index, request in enumerate(requests)]
    try:
        num_running = len(tasks)
        while num_running:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            num_running -= piece.generation is not None
            yield index, piece
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[None]] | Sequence[asyncio.Task[Generation]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
