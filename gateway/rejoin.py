"""The stage that looks for the answer of an idempotency key: here, then at the replicas."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from gateway import attachment, metrics
from gateway.attempt import Adopted
from gateway.auth.gate import Gate
from gateway.fleet import Fleet
from gateway.generation import Generation
from gateway.idempotency import positions, resumable
from gateway.identity import Principal
from gateway.records import RequestRecord
from gateway.request import Call, GenerationRequest, Resumable
from gateway.resolve import bare_job, most_tokens
from gateway.resumption import Entry, Kept, Resumption, SharedTicket
from gateway.served_model import ServedModel
from infermesh.config import GatewayConfig
from infermesh.errors import InvalidRequest, NotFound


@dataclass(slots=True)
class Asked:
    """A request on its way through the stages.

    Attributes:
        num_had: tokens of each choice that its client has.
    """

    request: GenerationRequest
    call: Call
    model: ServedModel
    principal: Principal
    record: RequestRecord
    wake: asyncio.Event
    num_had: tuple[int, ...] = ()


class Rejoin:
    """Finds answers that other requests began.

    Args:
        drive: follows a generation whose attempt is under way.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        resumption: Resumption,
        fleet: Fleet,
        gate: Gate,
        config: GatewayConfig,
        drive: Callable[[Generation, Adopted], None],
        clock: Callable[[], float],
    ) -> None:
        self._resumption = resumption
        self._fleet = fleet
        self._gate = gate
        self._grace_s = config.resume_grace_s
        self._timeout_s = config.request_timeout_s
        self._drive = drive
        self._clock = clock

    def name(self, asked: Asked) -> Resumable | None:
        """What names the request to every gateway; None for one without a key.

        Raises:
            InvalidRequest, UnsupportedParameter: it can't be resumed as it asks.
        """
        call, request = asked.call, asked.request
        param = "Last-Event-ID"
        asked.num_had = positions(call.resume_from, call.idempotency_key, request.options.n, param)
        if any(asked.num_had) and call.whole:
            raise InvalidRequest(f"{param} is for streams alone", param=param)
        tenant, model_id = asked.principal.tenant, asked.model.model_id
        return resumable(tenant, call.idempotency_key, request, model_id, self._grace_s)

    async def find(self, asked: Asked, name: Resumable, entry: Entry) -> Kept | None:
        """The answer that is there, or on its way; None where the request begins it.

        Raises:
            NotFound: there is none, and the client has seen a part of one.
        """
        kept, source = self._resumption.found(entry), "gateway"
        if kept is None:
            kept, source = await self._attach(asked, name), "replica"
            if kept is not None:
                self._resumption.keep(entry, kept)
        if kept is None and any(asked.num_had):
            raise NotFound(
                "nothing is kept under this Idempotency-Key any more; without Last-Event-ID the "
                "request begins anew",
                param="Idempotency-Key",
            )
        if kept is not None:
            metrics.RESUMED.labels(source).inc()
            record = asked.record
            record.model, record.num_choices = asked.model.model_id, asked.request.options.n
            record.resumed_from = kept.generation.job.request_id
        return kept

    async def _attach(self, asked: Asked, name: Resumable) -> Kept | None:
        options, deadline = asked.request.options, self._clock() + self._timeout_s
        job = bare_job(asked.call, options, asked.model, asked.principal, name, deadline)
        found = await attachment.find(self._fleet, name, job, self._clock)
        if found is None or found.generation is None or found.attached is None:
            return None
        generation, attached = found.generation, found.attached
        self._drive(generation, Adopted(found.replica, found.attempt, found.sink))
        # what a gateway has had all of is in the quota; the ledger takes a record once anyway
        most = 0 if attached.is_accounted else most_tokens(generation.job)
        try:
            ticket = await self._gate.admit(asked.principal, most, attached.record_id or None)
        except BaseException:
            generation.elsewhere = True  # it stays where it is
            found.attempt.release()
            generation.on_abandoned()
            raise
        return Kept(generation, SharedTicket(ticket))
