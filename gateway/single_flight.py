"""Identical requests in flight share one generation, where the reuse policy allows it.

Owns the index of shared generations; what runs them is passed in.
"""

import asyncio
import hashlib
from array import array
from collections.abc import Callable

from gateway import metrics
from gateway.generation import Generation, Reader
from gateway.request import Job

Key = bytes
# Tokens that a reader of a kept answer may leave unread: any number.
KEPT_UNREAD = 1 << 62


def may_share(job: Job, policy: str) -> bool:
    """Whether the caller's semantics allow one answer for several requests.

    Args:
        policy: "never", "greedy" (temperature 0), "unset" (also where the client named no
            temperature) or "all"; where the job's tenant has no policy of its own.
    """
    policy = job.reuse_policy or policy
    if policy == "never":
        return False
    if policy == "all" or job.sampling.temperature == 0:
        return True
    return policy == "unset" and not job.temperature_given


def fingerprint(job: Job) -> Key:
    """Equal for jobs whose generations are interchangeable, to the same sharing domain."""
    sampling, stop = job.sampling, job.stop
    facts = (
        job.fingerprint,
        job.sharing_domain,
        job.num_choices,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        sorted(sampling.logit_bias.items()),
        sampling.top_logprobs,
        # greedy tokens depend on no seed
        None if sampling.temperature == 0 else job.shareable_seed,
        stop.max_tokens,
        stop.min_tokens,
        sorted(stop.stop_token_ids),
        stop.ignore_eos,
    )
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(array("q", job.prompt_token_ids).tobytes())
    return digest.digest()


def serves(running: Job, newcomer: Job) -> bool:
    """The running job's priority and deadline are at least what the newcomer asks for."""
    if newcomer.priority > running.priority:
        return False
    if running.deadline is None:
        return True
    return newcomer.deadline is not None and newcomer.deadline <= running.deadline


class SingleFlight:
    """Joins a request to a running generation, or starts one.

    Args:
        start: begins to drive a new generation.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        policy: str,
        max_unread: int,
        start: Callable[[Generation], None],
        clock: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._max_unread = max_unread
        self._start = start
        self._clock = clock
        self._running: dict[Key, Generation] = {}
        self._keys: dict[Generation, Key] = {}

    def join(self, job: Job, wake: asyncio.Event) -> Reader:
        """A reader of the job's generation; leaving it is the reader's `close`."""
        if job.resumable is not None or not may_share(job, self._policy):
            return self._begin(job, wake)  # one with a key is its clients' own: see `resumption`
        key = fingerprint(job)
        running = self._running.get(key)
        if running is not None and running.joinable and serves(running.job, job):
            metrics.SINGLE_FLIGHT_HITS.inc()
            return running.join(wake, self._max_unread)
        reader = self._begin(job, wake)
        self._running[key] = reader.generation
        self._keys[reader.generation] = key
        return reader

    def forget(self, generation: Generation) -> None:
        """The generation has ended, or nobody wants it any more: nobody may join it."""
        key = self._keys.pop(generation, None)
        if key is not None and self._running.get(key) is generation:
            del self._running[key]

    def __len__(self) -> int:
        return len(self._running)

    def _begin(self, job: Job, wake: asyncio.Event) -> Reader:
        generation = Generation(job, self._clock)
        # all of an answer that has a key is kept in any case
        reader = generation.join(wake, KEPT_UNREAD if job.resumable else self._max_unread)
        self._start(generation)
        return reader
