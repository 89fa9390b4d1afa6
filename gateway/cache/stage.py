"""The cache as a stage of the pipeline: what may be asked, how long a request waits, what is kept.

The cache has a head start, in which it says most of what it has to say: the same request was
answered, or nothing like it was. Then the scheduling begins beside it; a hit that comes before
anything could be shown ends that generation.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gateway import metrics
from gateway.cache.client import CacheClient
from gateway.cache.directives import parse_cache_control
from gateway.cache.fingerprint import Fingerprints, Subject, fingerprints
from gateway.cache.keepable import answer_to_keep
from gateway.cache.lookups import UNAVAILABLE
from gateway.cache.replay import Replay
from gateway.cache.translate import Question
from gateway.cache.verdict import Verdict, bypass, miss
from gateway.records import RequestRecord
from gateway.reply import Reply
from gateway.request import Call, Conversation, GenerationRequest, Job
from gateway.served_model import ServedModel
from gateway.single_flight import may_share
from infermesh.config import GatewayConfig
from infermesh.errors import InvalidRequest, ProtocolViolation

# Longer prompts are fingerprinted off the event loop.
_INLINE_TOKENS = 1024
Pending = asyncio.Future[Verdict]


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What a tenant lets the cache do.

    Attributes:
        reuse: which requests may share answers, as `single_flight.may_share` takes it.
        semantic: answers of similar questions will do.
    """

    reuse: str
    semantic: bool


class CacheStage:
    """Asks the cache for requests and gives it fresh answers.

    Args:
        client: None where no cache is configured.
        threads: where long prompts are hashed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        client: CacheClient | None,
        config: GatewayConfig,
        threads: ThreadPoolExecutor,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._timeout_s = config.cache_timeout_ms / 1e3
        self._head_start_s = config.cache_head_start_ms / 1e3
        self._hold_s = config.cache_hold_ms / 1e3
        self._threads = threads
        self._clock = clock

    async def question(
        self,
        request: GenerationRequest,
        jobs: Sequence[Job],
        model: ServedModel,
        call: Call,
        policy: CachePolicy,
        record: RequestRecord,
    ) -> Question | None:
        """What to ask for a request; None where the cache has no part in it."""
        if self._client is None:
            return None
        wishes = parse_cache_control(call.cache_control)
        if wishes.no_store:
            record.cache = bypass("no_store")
        elif len(jobs) > 1:
            record.cache = bypass("several_prompts")
        elif not may_share(jobs[0], policy.reuse):
            record.cache = bypass("sampling")
        elif self._client.embedder is None:  # it was never there: its name is part of the key
            record.cache = UNAVAILABLE
        else:
            keys = await self._fingerprints(request, jobs[0], model, self._client.embedder.model_id)
            if wishes.no_cache:
                record.cache = bypass("no_cache")
            return Question(
                jobs[0],
                keys,
                semantic=policy.semantic,
                max_age_s=wishes.max_age_s,
                replace=wishes.no_cache or wishes.max_age_s is not None,
            )
        return None

    async def ask(self, question: Question | None, record: RequestRecord) -> Pending | None:
        """Asks, and gives the cache its head start; None where there is nothing to ask."""
        if self._client is None or question is None or record.cache is not None:
            return None
        record.asked_at = self._clock()
        pending = self._client.lookup(question, self._timeout_s)
        try:
            await asyncio.wait({pending}, timeout=self._head_start_s)
        except asyncio.CancelledError:
            pending.cancel()
            raise
        record.looked_up_at = self._clock()
        return pending

    def marked(self, question: Question | None) -> Question | None:
        """Called where the generation begins: its answer is younger than what is known now."""
        if self._client is None or question is None:
            return None
        return dataclasses.replace(question, mark=self._client.mark)

    def found(
        self,
        question: Question | None,
        pending: Pending | None,
        record: RequestRecord,
        wake: asyncio.Event,
    ) -> Replay | None:
        """The stored answer, where the verdict is there and is a hit."""
        if question is None or pending is None or not pending.done():
            return None
        record.cache = pending.result()
        if record.cache.answer is None:
            return None
        try:
            return Replay(record.cache.answer, question.job, wake, self._clock)
        except ProtocolViolation:  # other choices or logprobs than were asked for
            record.cache = miss("malformed")
            return None

    async def found_late(
        self,
        question: Question | None,
        pending: Pending | None,
        reply: Reply,
        wake: asyncio.Event,
        whole: bool,
    ) -> Replay | None:
        """The stored answer that came while the request was being scheduled.

        Waits only while nothing is there that could be shown, and a little longer for a stream.

        Args:
            whole: nothing can be shown before the end.
        """
        record = reply.record
        if pending is None or record.cache is not None:
            return None
        try:
            if record.shared or reply.is_kept:  # what is being answered needs no stored answer
                record.cache = miss("in_flight")
                return None
            pending.add_done_callback(lambda _: wake.set())
            await reply.until(lambda: pending.done() or reply.has_news(whole))
            if not pending.done() and not reply.ended:
                began = self._clock()
                await asyncio.wait({pending}, timeout=self._hold_s)
                record.held_s = self._clock() - began
            if not pending.done():
                record.cache = miss("late")
                return None
        finally:
            pending.cancel()
        replay = self.found(question, pending, record, wake)
        if replay is not None:
            # what was scheduled meanwhile is nobody's time
            record.looked_up_at, record.held_s, record.admitted_at = self._clock(), 0.0, None
        return replay

    def settle(self, question: Question | None, reply: Reply, ended_well: bool) -> None:
        """Keeps a fresh answer and counts what the cache did."""
        record = reply.record
        if self._client is None or record.cache is None:
            return
        count(record)
        if question is None or record.cache.is_hit or record.shared or not ended_well:
            return
        elapsed_s = self._clock() - (record.admitted_at or record.started_at)
        answer = answer_to_keep(reply.prompts[0], elapsed_s)
        if answer is not None:
            self._client.keep(question, answer)

    async def _fingerprints(
        self, request: GenerationRequest, job: Job, model: ServedModel, embedder_id: str
    ) -> Fingerprints:
        prompt = request.prompts[0]
        subject = Subject(job, prompt, request.options, model.max_model_len, embedder_id)

        def render(conversation: Conversation) -> str | None:
            try:
                return model.text.render(conversation.messages, conversation.template_kwargs)
            except InvalidRequest:
                return None

        if len(job.prompt_token_ids) <= _INLINE_TOKENS:
            return fingerprints(subject, render)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, fingerprints, subject, render)


def count(record: RequestRecord) -> None:
    """What became of one request that the cache had a part in."""
    verdict = record.cache
    assert verdict is not None
    tier = verdict.tier.value if verdict.tier else "none"
    metrics.CACHE_REQUESTS.labels(verdict.outcome.value, tier, verdict.reason).inc()
    if record.looked_up_at is not None and record.asked_at is not None:
        wait_s = record.looked_up_at - record.asked_at + record.held_s
        metrics.CACHE_WAIT.labels(verdict.outcome.value).observe(wait_s)
    if verdict.answer is not None:
        metrics.CACHE_SAVED.inc(verdict.answer.compute_s)
