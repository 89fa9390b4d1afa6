"""One request from the edge to its admission by a scheduler: the stages of the mesh, in order.

Both edges, HTTP and gRPC, are in front of this; it knows neither.
"""

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from gateway import metrics
from gateway.admission import Admission
from gateway.auth.gate import Gate, Ticket
from gateway.cache.replay import Replay
from gateway.cache.stage import CachePolicy, CacheStage, Pending
from gateway.cache.translate import Question
from gateway.detached import Detached, goes_on
from gateway.driving import Driving
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.identity import INFERENCE, Principal
from gateway.ranges import check, check_token_ids
from gateway.records import Records, RequestRecord
from gateway.rejoin import Asked, Rejoin
from gateway.reply import PromptReply, Reply
from gateway.request import (
    Call,
    Conversation,
    GenerationRequest,
    Job,
    Options,
    Prompt,
    Resumable,
)
from gateway.resolve import most_tokens, resolve
from gateway.resumption import Entry, Kept, Resumption, SharedTicket
from gateway.served_model import ServedModel
from gateway.single_flight import KEPT_UNREAD, SingleFlight, may_share
from infermesh.config import GatewayConfig
from infermesh.errors import InvalidRequest, MeshError
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
        self.admission = Admission(config.max_inflight_requests, clock)
        self.records = Records(clock)
        self._config = config
        self._cache = cache
        self._driving = Driving(fleet, spawn, self._forget, clock)
        self._detached = Detached(config.resume_grace_s, spawn, self._end)
        self._clock = clock
        self.resumption = Resumption(
            config.resume_grace_s, config.resume_max_requests, config.resume_max_tokens, clock
        )
        self._rejoin = Rejoin(self.resumption, fleet, gate, config, self._driving.begin, clock)
        self.flights = SingleFlight(
            config.reuse_policy, config.slow_consumer_buffer_tokens, self._driving.begin, clock
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
            self.admission.enter(principal.tenant, principal.weight)
        except BaseException as error:
            self.records.settle(record, error)
            raise
        metrics.INFLIGHT.inc()
        reply: Reply | None = None
        try:
            model = self.fleet.resolve(request.model)
            record.model = model.model_id
            principal.require_model(request.model, model.model_id)
            asked = Asked(request, call, model, principal, record, asyncio.Event())
            name = self._rejoin.name(asked)
            pending: Pending | None = None
            async with self.resumption.turn(name) as entry:
                reply = await self._resume(asked, name, entry)
                if reply is None:
                    reply, pending = await self._begin(asked, name, entry)
            late = await self._cache.found_late(
                reply.question, pending, reply, asked.wake, call.whole
            )
            if late is not None:
                reply.replace([PromptReply(late, model, request.options, 0)])
            await reply.admitted()
        except BaseException as exc:  # a cancelled request must give its place back, too
            if reply is not None and self._may_go_on(reply, exc):
                self._detached.add(reply)
                raise
            self.records.settle(record, exc)
            if reply is None:
                self._leave(principal.tenant)
            else:
                reply.ticket.cancel()
                reply.close()
            raise
        return reply

    async def _resume(
        self, asked: Asked, name: Resumable | None, entry: Entry | None
    ) -> Reply | None:
        if name is None or entry is None:
            return None
        kept = await self._rejoin.find(asked, name, entry)
        if kept is None:
            return None
        reader = kept.generation.join(asked.wake, KEPT_UNREAD)
        prompt = PromptReply(reader, asked.model, asked.request.options, 0, asked.num_had)
        return self._reply([prompt], asked, kept.ticket.share(), None)

    async def _begin(
        self, asked: Asked, name: Resumable | None, entry: Entry | None
    ) -> tuple[Reply, Pending | None]:
        request, call, model, record = asked.request, asked.call, asked.model, asked.record
        jobs = await self._tokenise(request, model, call, asked.principal, record)
        if name is not None:
            jobs = [dataclasses.replace(job, resumable=name) for job in jobs]
        record_id = name.record_id if name is not None else None
        most = sum(map(most_tokens, jobs))
        ticket = await self.gate.admit(asked.principal, most, record_id)
        try:
            policy = self._cache_policy(asked.principal)
            question = await self._cache.question(request, jobs, model, call, policy, record)
            pending = await self._cache.ask(question, record)
            found = self._cache.found(question, pending, record, asked.wake)
            question = self._cache.marked(question)
            prompts = self._prompts(jobs, found, model, request.options, record, asked.wake)
        except BaseException:
            ticket.cancel()
            raise
        if entry is not None:
            kept = Kept(prompts[0].reader.generation, SharedTicket(ticket))
            self.resumption.keep(entry, kept)
            ticket = kept.ticket.share()
        return self._reply(prompts, asked, ticket, question), pending

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
            self.admission.enter(principal.tenant, principal.weight)
        except BaseException as error:
            self.records.settle(record, error)
            raise
        metrics.INFLIGHT.inc()
        try:
            yield principal, record
        except BaseException as exc:
            self.records.settle(record, exc)
            raise
        else:
            self.records.settle(record, None)
        finally:
            self._leave(principal.tenant)

    async def tokenise(self, prompt: Prompt, model: ServedModel) -> list[int]:
        """The token ids of one prompt."""
        if isinstance(prompt, str):
            return await model.text.encode(prompt)
        if isinstance(prompt, Conversation):
            return await model.text.encode_chat(prompt.messages, prompt.template_kwargs)
        check_token_ids("prompt", prompt, model.vocab_size)
        return list(prompt)

    def finish(self, reply: Reply, error: BaseException | None = None) -> None:
        """Accounts for a reply that has ended, well or not, and closes it; one that outlives its
        client's connection goes on.
        """
        if self._may_go_on(reply, error):
            self._detached.add(reply)
        else:
            self._end(reply, error)

    def _end(self, reply: Reply, error: BaseException | None) -> None:
        reply.close()
        self._cache.settle(reply.question, reply, error is None)
        self.records.settle(reply.record, error)
        if reply.is_elsewhere:
            reply.ticket.cancel()
        else:
            reply.ticket.settle(reply.record)

    def hand_over(self) -> None:
        """Leaves requests whose clients have gone to their replicas, for other gateways."""
        self._driving.leaving = True
        self._detached.hand_over()

    def abandon(self, error: MeshError) -> None:
        """Fails whatever is still generated; clients get the error as their last event."""
        self._driving.fail_all(error)

    def _may_go_on(self, reply: Reply, error: BaseException | None) -> bool:
        return self.admission.open and goes_on(reply, error)

    async def _tokenise(
        self,
        request: GenerationRequest,
        model: ServedModel,
        call: Call,
        principal: Principal,
        record: RequestRecord,
    ) -> list[Job]:
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
        asked: Asked,
        ticket: Ticket,
        question: Question | None,
    ) -> Reply:
        deadline, own = self._clock() + self._config.request_timeout_s, asked.call.deadline
        return Reply(
            model=asked.model,
            prompts=prompts,
            wake=asked.wake,
            record=asked.record,
            deadline=deadline if own is None else min(deadline, own),
            clock=self._clock,
            ticket=ticket,
            on_close=functools.partial(self._leave, asked.principal.tenant),
            question=question,
        )

    def _forget(self, generation: Generation) -> None:
        self.flights.forget(generation)
        self.resumption.ended(generation)

    def _leave(self, tenant: str) -> None:
        metrics.INFLIGHT.dec()
        self.admission.leave(tenant)


def _draw_seed() -> int:
    return secrets.randbits(63)
