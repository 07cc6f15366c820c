"""What the application needs of an engine: `AsyncC2CEngine`, or one that passes requests on to others."""

from collections.abc import AsyncGenerator
from typing import Protocol

from c2c_export.bundle import Bundle
from engines.select import EngineChoice
from runtime.generation import Chunk, Generation
from runtime.request import Request


class ServedEngine(Protocol):
    """As `runtime.async_engine.AsyncC2CEngine`, which says what each of them does."""

    @property
    def bundle(self) -> Bundle:
        """The bundle that is served."""

    @property
    def engine_choice(self) -> EngineChoice:
        """The engine that runs, and why."""

    @property
    def num_slots(self) -> int:
        """Requests that are served at once."""

    @property
    def num_free_slots(self) -> int:
        """Slots that nothing holds."""

    @property
    def num_requests(self) -> int:
        """Requests that are served or wait, counted at one moment."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""

    @property
    def num_active(self) -> int:
        """Requests that are served."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""

    def tokenize(self, text: str) -> list[int]:
        """The receiver's ids of plain text."""

    def token_text(self, token_id: int) -> str:
        """What one token says by itself."""

    async def generate(self, request: Request) -> Generation:
        """The whole answer; being cancelled aborts the request."""

    def stream(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """The answer in pieces; closing the generator early aborts the request."""
