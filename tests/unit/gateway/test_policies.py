"""The pure decisions: routing, resolution of a request, ends of choices, admission, identity."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Admission
from gateway.auth.gate import OpenGate
from gateway.failover import natural_end
from gateway.fleet import parse_aliases
from gateway.identity import Principal
from gateway.records import Records
from gateway.request import Call, Fingerprint, Options, ReplicaId, RequestId, Sampling, StopRules
from gateway.resolve import resolve
from gateway.routing import Candidate, choose
from gateway.served_model import ServedModel, sampling_defaults
from gateway.tokens import ChoiceTimings, FinishReason
from infermesh.config import ConfigError
from infermesh.errors import ContextLengthExceeded, Draining, InvalidRequest, QueueFull
from infermesh.quota import Limits

CALL = Call(RequestId("r"), "chat")


def model(defaults: Sampling | None = None) -> ServedModel:
    return ServedModel(
        "tiny", Fingerprint("f"), "llama", "float32", 100, 50, frozenset({9}), 0,
        defaults or Sampling(), None,  # type: ignore[arg-type]  # no text is touched here
    )  # fmt: skip


def resolved(options: Options, prompt_len: int = 10, defaults: Sampling | None = None) -> Any:
    return resolve(CALL, options, model(defaults), [1] * prompt_len, Principal("local"), lambda: 77)


# routing


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6), st.integers(0, 2**32))
def test_routing_never_takes_the_busiest_of_several(loads: list[int], seed: int) -> None:
    candidates = [
        Candidate(ReplicaId(str(i)), num_tokens_waiting=load) for i, load in enumerate(loads)
    ]
    chosen = choose(candidates, random.Random(seed).randrange)
    assert chosen in candidates
    if len(set(loads)) > 1 and loads.count(max(loads)) == 1:
        assert chosen is not None
        assert chosen.load < max(loads)


def test_routing_finds_nothing_among_nothing() -> None:
    assert choose([], lambda n: 0) is None


@pytest.mark.parametrize(
    "busy", [{"num_requests": 3}, {"num_local_inflight": 3}, {"num_tokens_submitted": 90}]
)
def test_routing_counts_every_kind_of_work(busy: Mapping[str, int]) -> None:
    pair = [Candidate(ReplicaId("busy"), **busy), Candidate(ReplicaId("free"))]
    chosen = choose(pair, lambda n: 0)
    assert chosen is not None
    assert chosen.replica_id == "free"


# resolution


def test_client_wins_over_model_and_model_over_the_standard() -> None:
    defaults = sampling_defaults('{"temperature": 0.6, "top_k": 20, "do_sample": true}')
    sampling = resolved(Options(Sampling(temperature=0.0)), defaults=defaults).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 20, 1.0)
    assert sampling.seed == 77


def test_model_that_does_not_sample_is_greedy_by_default() -> None:
    assert sampling_defaults('{"do_sample": false, "temperature": 0.6}').temperature == 0.0


@pytest.mark.parametrize(
    "config", ["", "{}", '{"temperature": null, "top_k": -3, "top_p": "x", "min_p": true}']
)
def test_model_defaults_out_of_range_are_left_out(config: str) -> None:
    assert sampling_defaults(config) == Sampling()


def test_negative_seed_becomes_its_unsigned_twin() -> None:
    job = resolved(Options(Sampling(seed=-1)))
    assert job.sampling.seed == 2**64 - 1
    assert job.shareable_seed == -1


@pytest.mark.parametrize(
    ("asked", "fallback", "prompt_len", "limit"),
    [
        (None, None, 10, 90),
        (None, 16, 10, 16),
        (None, 16, 95, 5),
        (20, 16, 10, 20),
        (90, None, 10, 90),
        (None, None, 99, 1),
    ],
)
def test_output_limit_is_the_clients_or_what_fits(
    asked: int | None, fallback: int | None, prompt_len: int, limit: int
) -> None:
    options = Options(stop=StopRules(max_tokens=asked), fallback_max_tokens=fallback)
    assert resolved(options, prompt_len).stop.max_tokens == limit


@pytest.mark.parametrize(("asked", "prompt_len"), [(91, 10), (None, 100), (1, 100), (None, 101)])
def test_what_does_not_fit_is_refused_with_the_numbers(asked: int | None, prompt_len: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"100 tokens.*{prompt_len} in the prompt"):
        resolved(Options(stop=StopRules(max_tokens=asked)), prompt_len)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (Options(Sampling(logit_bias={50: 1.0})), "logit_bias"),
        (Options(stop=StopRules(stop_token_ids=(50,))), "stop_token_ids"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(options: Options, param: str) -> None:
    with pytest.raises(InvalidRequest, match="between 0 and 49") as caught:
        resolved(options)
    assert caught.value.param == param


def test_user_narrows_the_sharing_domain() -> None:
    assert resolved(Options(user="a")).sharing_domain == "local/a"
    assert resolved(Options()).sharing_domain == "local"


# ends that another replica need not announce


@pytest.mark.parametrize(
    ("token_ids", "stop", "reason"),
    [
        ([], StopRules(max_tokens=3), None),
        ([1, 2], StopRules(max_tokens=3), None),
        ([1, 2, 3], StopRules(max_tokens=3), FinishReason.LENGTH),
        ([1, 9], StopRules(max_tokens=3), FinishReason.STOP),
        ([1, 9], StopRules(max_tokens=3, ignore_eos=True), None),
        ([1, 5], StopRules(max_tokens=3, stop_token_ids=(5,)), FinishReason.STOP),
        ([9], StopRules(max_tokens=3, min_tokens=2), None),
    ],
)
def test_natural_end_is_seen_from_the_tokens(
    token_ids: list[int], stop: StopRules, reason: FinishReason | None
) -> None:
    end = natural_end(token_ids, stop, frozenset({9}))
    assert (end.reason if end else None) is reason


# admission, identity, aliases, records


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def test_admission_counts_and_closes() -> None:
    admission = Admission(1, Clock())
    admission.enter("a")
    with pytest.raises(QueueFull) as full:
        admission.enter("b")
    assert full.value.retry_after_s == 1.0  # nothing is known of the pace
    admission.leave("a")
    await admission.idle()
    admission.close()
    with pytest.raises(Draining):
        admission.enter("a")


async def test_admission_keeps_places_for_other_tenants() -> None:
    admission = Admission(100, Clock())
    for _ in range(80):
        admission.enter("flood")
    with pytest.raises(QueueFull, match=r"80 requests .* 80 of them this tenant's"):
        admission.enter("flood")
    for _ in range(20):
        admission.enter("other", 100.0)
    with pytest.raises(QueueFull, match="100 requests"):
        admission.enter("third")


async def test_refused_are_told_one_after_another_at_the_pace_of_those_who_leave() -> None:
    clock = Clock()
    admission = Admission(4, clock)
    for name in "abcd":
        admission.enter(name)
    for name in "ab":  # a place gets free every half second
        clock.now_s += 0.5
        admission.leave(name)
    admission.enter("e")
    admission.enter("f")
    waits = []
    for name in "gh":
        with pytest.raises(QueueFull) as full:
            admission.enter(name)
        waits.append(full.value.retry_after_s)
    assert waits == pytest.approx([0.5, 1.0])
    for _ in range(1000):
        with pytest.raises(QueueFull) as full:
            admission.enter("g")
    assert full.value.retry_after_s == 60.0
    clock.now_s += 60.0
    with pytest.raises(QueueFull) as full:
        admission.enter("g")
    assert full.value.retry_after_s == pytest.approx(0.5)


@pytest.mark.parametrize("credential", [None, "", "anything"])
async def test_any_key_is_the_local_tenant_without_an_auth_service(credential: str | None) -> None:
    assert (await OpenGate().identify(credential, "inference")).tenant == "local"


def test_open_ended_output_is_held_to_the_tenants_tokens_per_minute() -> None:
    limited = Principal("acme", limits=Limits(tokens_per_minute=64))

    def max_tokens(options: Options) -> int | None:
        return resolve(CALL, options, model(), [1] * 10, limited, lambda: 77).stop.max_tokens

    assert max_tokens(Options()) == 54
    assert max_tokens(Options(n=3)) == 18
    assert max_tokens(Options(stop=StopRules(max_tokens=60))) == 60


def test_aliases_are_pairs() -> None:
    assert parse_aliases(("a=b", "c=d/e")) == {"a": "b", "c": "d/e"}
    with pytest.raises(ConfigError, match="alias=model"):
        parse_aliases(("a",))


def test_records_keep_the_latest_and_add_up() -> None:
    now = [100.0]
    records = Records(lambda: now[0], capacity=2)
    for name in ("a", "b", "c"):
        record = records.open(RequestId(name), "chat")
    assert records.find("a") is None
    record.authorised_at = 100.001
    record.tokenized_at = 100.003
    record.admitted_at = 100.004
    record.timings = ChoiceTimings(queue_s=0.01, prefill_s=0.02, decode_s=0.03)
    record.ended_at = 100.1
    phases = record.phases(now[0])
    parts = sum(ms for name, ms in phases.items() if name != "total")
    assert parts == pytest.approx(phases["total"]) == pytest.approx(100.0)
    assert record.waterfall(now[0]).startswith("auth;dur=1.000, tokenize;dur=2.000")
