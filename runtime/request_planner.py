"""Requests planned: their prompts' tokens for every model, how far their answers may go, and what ends them.

In: a pipeline's tokenizers, tables and capacity. Out: `ActiveRequest`s, which wait for a slot. Nothing is computed.
"""

import time

from runtime.active_request import ActiveRequest, Listener
from runtime.conversation import Conversation
from runtime.pipeline import C2CPipeline
from runtime.prompt import Plan
from runtime.reply import Reply, generation_limit
from runtime.request import Request
from runtime.sampling import Sampler


class RequestPlanner:
    """Plans for the bundle of `pipeline`. Any thread may call it."""

    def __init__(self, pipeline: C2CPipeline) -> None:
        self._pipeline = pipeline

    def plan(self, request: Request) -> Plan:
        """What a request's prompt is to every model. Raises `UsageError` for one that cannot be served."""
        conversation = Conversation.of(request.prompt)
        sharers = self._pipeline.select_sharers(request.fuse, request.sharers)
        return self._pipeline.make_plan(conversation.messages, conversation.ids, sharers)

    def take(self, request: Request, listener: Listener, since: float) -> ActiveRequest:
        """A request that was asked for at `since`, planned; sharers elsewhere begin to read it.

        Raises `UsageError` for one that cannot be served, and what its `read_sharers` raises.
        """
        began = time.perf_counter()
        plan = self.plan(request)
        num_rows, capacity = len(plan.receiver.ids), self._pipeline.bundle.manifest.max_length
        wanted, room = request.max_new_tokens, capacity - num_rows + 1
        if request.shorten and wanted is not None and wanted > room:
            wanted = None
        limit = generation_limit(wanted, num_rows, room, capacity)
        stop_ids = () if request.ignore_eos else self._pipeline.bundle.manifest.stop_ids
        reply = Reply(self._pipeline.tokenizer, limit=limit, stop_ids=stop_ids, stop=request.stop)
        active = ActiveRequest(request, plan, reply, Sampler(request.sampling), listener, submitted=since)
        if request.read_sharers is not None:
            active.sharer_rows = request.read_sharers(self._pipeline.prefiller.target(plan).sharers)
        active.planning_seconds = time.perf_counter() - began
        return active
