"""Which requests share a generation: what the policy allows, and what would be the same answer."""

import asyncio
from typing import Any

import pytest

from gateway.generation import Generation
from gateway.request import Fingerprint, Priority
from gateway.single_flight import SingleFlight, fingerprint, may_share, serves
from gateway.tokens import Finish, FinishReason
from tests.unit.gateway.jobs import JOB, job


class Flights:
    """SingleFlight with what it started."""

    def __init__(self, policy: str = "greedy") -> None:
        self.started: list[Generation] = []
        self.index = SingleFlight(policy, 100, self.started.append, lambda: 0.0)

    def join(self, **changes: Any) -> Generation:
        return self.index.join(job(**changes), asyncio.Event()).generation


@pytest.mark.parametrize(
    ("policy", "temperature", "given", "shared"),
    [
        ("greedy", 0.0, True, True),
        ("greedy", 1.0, False, False),
        ("greedy", 0.7, True, False),
        ("unset", 0.0, True, True),
        ("unset", 1.0, False, True),
        ("unset", 0.7, True, False),
        ("all", 0.7, True, True),
        ("never", 0.0, True, False),
    ],
)
def test_policy_decides_on_temperature(
    policy: str, temperature: float, given: bool, shared: bool
) -> None:
    assert may_share(job(temperature=temperature, temperature_given=given), policy) is shared


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "another"},
        {"traceparent": "00-1-2-01"},
        {"seed": 99},  # greedy tokens depend on no seed
        {"shareable_seed": 7},
        {"deadline": 5.0},
        {"priority": Priority.LOW},
    ],
)
def test_fingerprint_is_equal_when_the_answer_would_be(changes: dict[str, Any]) -> None:
    assert fingerprint(job(**changes)) == fingerprint(JOB)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": (1, 2, 4)},
        {"prompt_token_ids": (1, 2, 3, 3)},
        {"sharing_domain": "local/user"},
        {"fingerprint": Fingerprint("g")},
        {"num_choices": 2},
        {"temperature": 0.1},
        {"top_k": 1},
        {"repetition_penalty": 1.2},
        {"logit_bias": {1: 1.0}},
        {"top_logprobs": 0},
        {"max_tokens": 17},
        {"min_tokens": 1},
        {"stop_token_ids": (4,)},
        {"ignore_eos": True},
    ],
)
def test_fingerprint_differs_when_the_answer_may(changes: dict[str, Any]) -> None:
    assert fingerprint(job(**changes)) != fingerprint(JOB)


def test_sampled_requests_share_only_the_clients_own_seed() -> None:
    sampled = {"temperature": 1.0}
    assert fingerprint(job(**sampled, seed=1)) == fingerprint(job(**sampled, seed=2))
    assert fingerprint(job(**sampled, shareable_seed=1)) != fingerprint(
        job(**sampled, shareable_seed=2)
    )


def test_identical_requests_share_and_different_ones_do_not() -> None:
    flights = Flights()
    assert flights.join() is flights.join()
    assert flights.join(max_tokens=3) is not flights.started[0]
    assert len(flights.started) == 2


def test_nobody_joins_what_has_ended_or_was_abandoned() -> None:
    flights = Flights()
    first = flights.join()
    first.finish(0, Finish(FinishReason.STOP))
    second = flights.join()
    assert second is not first
    reader = second._readers[0]
    reader.close()
    assert flights.join() is not second


def test_forgotten_generation_leaves_its_successor_alone() -> None:
    flights = Flights()
    first = flights.join()
    first.finish(0, Finish(FinishReason.STOP))
    second = flights.join()
    flights.index.forget(first)
    assert flights.join() is second
    flights.index.forget(second)
    assert len(flights.index) == 0


@pytest.mark.parametrize(
    ("running", "newcomer", "joined"),
    [
        ({}, {"deadline": 5.0}, True),
        ({"deadline": 5.0}, {"deadline": 4.0}, True),
        ({"deadline": 5.0}, {"deadline": 6.0}, False),
        ({"deadline": 5.0}, {}, False),
        ({"priority": Priority.HIGH}, {}, True),
        ({}, {"priority": Priority.HIGH}, False),
    ],
)
def test_newcomer_joins_what_serves_it_at_least_as_well(
    running: dict[str, Any], newcomer: dict[str, Any], joined: bool
) -> None:
    assert serves(job(**running), job(**newcomer)) is joined
