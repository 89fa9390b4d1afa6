"""One request from the edge to its admission by a scheduler: the stages of the mesh, in order.

Both edges, HTTP and gRPC, are in front of this; it knows neither.
"""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from gateway import metrics
from gateway.admission import Admission
from gateway.auth.gate import Gate, Ticket
from gateway.cache.replay import Replay
from gateway.cache.stage import CachePolicy, CacheStage
from gateway.cache.translate import Question
from gateway.failover import Driver
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.identity import INFERENCE, Principal
from gateway.ranges import check, check_token_ids
from gateway.records import Records, RequestRecord
from gateway.reply import PromptReply, Reply
from gateway.request import Call, Conversation, GenerationRequest, Job, Options, Prompt
from gateway.resolve import most_tokens, resolve
from gateway.served_model import ServedModel
from gateway.single_flight import SingleFlight, may_share
from infermesh.config import GatewayConfig
from infermesh.errors import InvalidRequest, MeshError, as_mesh_error
from infermesh.telemetry import logs

_log = logs.get(__name__)
MAX_PROMPTS = 256


class Pipeline:
    """Answers requests.

    Args:
        gate: who may do what.
        cache: the stage that asks whether an answer is there.
        spawn: runs a coroutine in the background, as `TaskGroup.create_task` does.
    """

    def __init__(
        self,
        config: GatewayConfig,
        fleet: Fleet,
        gate: Gate,
        cache: CacheStage,
        spawn: Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"],
        clock: Callable[[], float],
    ) -> None:
        self.fleet = fleet
        self.gate = gate
        self.admission = Admission(config.max_inflight_requests)
        self.records = Records(clock)
        self._config = config
        self._cache = cache
        self._spawn = spawn
        self._running: dict[Generation, asyncio.Task[None]] = {}
        self._clock = clock
        self.flights = SingleFlight(
            config.reuse_policy, config.slow_consumer_buffer_tokens, self._drive, clock
        )

    async def open(self, request: GenerationRequest, call: Call) -> Reply:
        """Takes a request through every stage up to its admission; the caller closes the reply.

        Raises:
            MeshError: it was refused; nothing is held.
        """
        record = self.records.open(call.request_id, call.endpoint)
        try:
            check(request.options)
            principal = await self.gate.identify(call.credential, INFERENCE)
            record.authorised_at = self._clock()
            self.admission.enter()
        except BaseException as error:
            self._settle(record, error)
            raise
        metrics.INFLIGHT.inc()
        reply: Reply | None = None
        ticket: Ticket | None = None
        try:
            model = self.fleet.resolve(request.model)
            principal.require_model(request.model, model.model_id)
            jobs = await self._tokenise(request, model, call, principal, record)
            ticket = await self.gate.admit(principal, sum(map(most_tokens, jobs)))
            policy = self._cache_policy(principal)
            question = await self._cache.question(request, jobs, model, call, policy, record)
            wake = asyncio.Event()
            pending = await self._cache.ask(question, record)
            found = self._cache.found(question, pending, record, wake)
            prompts = self._prompts(jobs, found, model, request.options, record, wake)
            reply = self._reply(prompts, model, call, record, wake, ticket, question)
            late = await self._cache.found_late(question, pending, reply, wake, call.whole)
            if late is not None:
                reply.replace([PromptReply(late, model, request.options, 0)])
            await reply.admitted()
        except BaseException as exc:  # a cancelled request must give its place back, too
            self._settle(record, exc)
            if ticket is not None:
                ticket.cancel()
            if reply is None:
                self._leave()
            else:
                reply.close()
            raise
        return reply

    @asynccontextmanager
    async def admitted(
        self, call: Call, scope: str
    ) -> AsyncIterator[tuple[Principal, RequestRecord]]:
        """The caller and the record of a request that is no generation: counted, settled after.

        Raises:
            MeshError: it was refused.
        """
        record = self.records.open(call.request_id, call.endpoint)
        try:
            principal = await self.gate.identify(call.credential, scope)
            record.authorised_at = self._clock()
            self.admission.enter()
        except BaseException as error:
            self._settle(record, error)
            raise
        metrics.INFLIGHT.inc()
        try:
            yield principal, record
        except BaseException as exc:
            self._settle(record, exc)
            raise
        else:
            self._settle(record, None)
        finally:
            self._leave()

    async def tokenise(self, prompt: Prompt, model: ServedModel) -> list[int]:
        """The token ids of one prompt."""
        if isinstance(prompt, str):
            return await model.text.encode(prompt)
        if isinstance(prompt, Conversation):
            return await model.text.encode_chat(prompt.messages, prompt.template_kwargs)
        check_token_ids("prompt", prompt, model.vocab_size)
        return list(prompt)

    def finish(self, reply: Reply, error: BaseException | None = None) -> None:
        """Accounts for a reply that has ended, well or not, and closes it."""
        reply.close()
        self._cache.settle(reply.question, reply, error is None)
        self._settle(reply.record, error)
        reply.ticket.settle(reply.record)

    async def _tokenise(
        self,
        request: GenerationRequest,
        model: ServedModel,
        call: Call,
        principal: Principal,
        record: RequestRecord,
    ) -> list[Job]:
        record.model = model.model_id
        record.num_choices = len(request.prompts) * request.options.n
        if not 1 <= len(request.prompts) <= MAX_PROMPTS:
            raise InvalidRequest(
                f"prompt has {len(request.prompts)} entries; between 1 and {MAX_PROMPTS} are "
                "allowed",
                param="prompt",
            )
        left = None
        if request.options.stop.max_tokens is None:
            left = await self.gate.tokens_left(principal)
        share = left if left is None else left // len(request.prompts)
        jobs = []
        for prompt in request.prompts:
            ids = await self.tokenise(prompt, model)
            jobs.append(resolve(call, request.options, model, ids, principal, _draw_seed, share))
        record.tokenized_at = self._clock()
        return jobs

    def _cache_policy(self, principal: Principal) -> CachePolicy:
        return CachePolicy(
            reuse=principal.reuse_policy or self._config.reuse_policy,
            semantic=principal.semantic_cache and self._config.cache_semantic,
        )

    def _prompts(
        self,
        jobs: Sequence[Job],
        found: Replay | None,
        model: ServedModel,
        options: Options,
        record: RequestRecord,
        wake: asyncio.Event,
    ) -> list[PromptReply]:
        """What is read of each job: the answer that was found, a generation that runs already, or
        one that begins now.
        """
        if found is not None:
            return [PromptReply(found, model, options, 0)]
        deadline = self._clock() + self._config.request_timeout_s
        prompts: list[PromptReply] = []
        for job in jobs:
            if job.deadline is None and not may_share(job, self._config.reuse_policy):
                # a shared generation may outlive the request that began it, any other may not
                job = dataclasses.replace(job, deadline=deadline)
            reader = self.flights.join(job, wake)
            record.shared |= reader.generation.job.request_id != job.request_id
            prompts.append(PromptReply(reader, model, options, len(prompts) * options.n))
        return prompts

    def _reply(
        self,
        prompts: Sequence[PromptReply],
        model: ServedModel,
        call: Call,
        record: RequestRecord,
        wake: asyncio.Event,
        ticket: Ticket,
        question: Question | None,
    ) -> Reply:
        deadline = self._clock() + self._config.request_timeout_s
        return Reply(
            model=model,
            prompts=prompts,
            wake=wake,
            record=record,
            deadline=deadline if call.deadline is None else min(deadline, call.deadline),
            clock=self._clock,
            ticket=ticket,
            on_close=self._leave,
            question=question,
        )

    def abandon(self, error: MeshError) -> None:
        """Fails whatever is still generated; clients get the error as their last event."""
        for generation, task in list(self._running.items()):
            generation.fail(error)
            task.cancel()

    def _drive(self, generation: Generation) -> None:
        task = self._spawn(self._run(generation))
        self._running[generation] = task
        task.add_done_callback(lambda _: self._forget(generation))

        def abandon() -> None:
            self._forget(generation)
            task.cancel()

        generation.on_abandoned = abandon

    async def _run(self, generation: Generation) -> None:
        await Driver(generation, self.fleet, self._clock).run()

    def _forget(self, generation: Generation) -> None:
        self.flights.forget(generation)
        self._running.pop(generation, None)

    def _settle(self, record: RequestRecord, exc: BaseException | None) -> None:
        """Notes how the request ended; the first answer stands."""
        if record.ended_at is not None:
            return
        record.ended_at = self._clock()
        if exc is None:
            record.status = "ok"
        elif isinstance(exc, (asyncio.CancelledError, GeneratorExit)):  # the client left
            record.status, record.error = "cancelled", "cancelled"
        else:
            record.status, record.error = "failed", as_mesh_error(exc).code
        duration_s = record.ended_at - record.started_at
        metrics.REQUEST_DURATION.labels(record.endpoint).observe(duration_s)
        metrics.PROMPT_TOKENS.inc(record.usage.prompt_tokens)
        metrics.COMPLETION_TOKENS.inc(record.usage.completion_tokens)
        _log.info(
            "request",
            extra={
                "request_id": record.request_id,
                "endpoint": record.endpoint,
                "model": record.model,
                "status": record.status,
                "error": record.error,
                "prompt_tokens": record.usage.prompt_tokens,
                "completion_tokens": record.usage.completion_tokens,
                "duration_ms": round(duration_s * 1e3, 1),
            },
        )

    def _leave(self) -> None:
        metrics.INFLIGHT.dec()
        self.admission.leave()


def _draw_seed() -> int:
    return secrets.randbits(63)
