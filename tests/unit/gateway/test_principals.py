"""How long a verified key is good for: watched, unwatched, expired, changed."""

import dataclasses

import pytest

from gateway.auth.account import Grant
from gateway.auth.headers import duration, limit_headers
from gateway.auth.principals import PrincipalCache, digest
from gateway.identity import Principal
from infermesh.errors import InvalidApiKey
from infermesh.quota import NOTHING, Amounts, Limits

KEY = digest("im-key")
ACME = Principal("acme", key_id="k1")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> PrincipalCache:
    made = PrincipalCache(ttl_s=60.0, outage_s=30.0, clock=clock)
    made.watched(5, resync=True)
    return made


def test_verified_key_needs_no_question_for_its_ttl(cache: PrincipalCache, clock: Clock) -> None:
    cache.put(KEY, ACME, None, 5)
    clock.now += 59
    assert cache.fresh(KEY) == ACME
    clock.now += 1
    assert cache.fresh(KEY) is None


def test_key_ends_when_it_expires_also_in_an_outage(cache: PrincipalCache, clock: Clock) -> None:
    cache.put(KEY, ACME, 10.0, 5)
    clock.now += 10
    assert cache.fresh(KEY) is None
    cache.unwatched()
    assert cache.stale(KEY) is None


def test_ttl_shortens_and_the_allowance_begins_when_the_feed_breaks(
    cache: PrincipalCache, clock: Clock
) -> None:
    cache.put(KEY, ACME, None, 5)
    clock.now += 10
    cache.unwatched()
    assert cache.fresh(KEY) is None
    clock.now += 29
    assert cache.stale(KEY) == ACME
    clock.now += 1
    assert cache.stale(KEY) is None


@pytest.mark.parametrize("change", [{"key_id": "k1"}, {"tenant": "acme"}])
def test_changed_key_or_tenant_is_dropped(cache: PrincipalCache, change: dict[str, str]) -> None:
    other = dataclasses.replace(ACME, tenant="globex", key_id="k2")
    cache.put(KEY, ACME, None, 5)
    cache.put(digest("other"), other, None, 5)
    cache.drop(6, **change)
    assert cache.fresh(KEY) is None
    assert cache.stale(KEY) is None
    assert cache.fresh(digest("other")) == other


def test_answer_from_before_the_last_change_is_not_kept(cache: PrincipalCache) -> None:
    cache.drop(6, key_id="k1")
    cache.put(KEY, ACME, None, 5)
    assert cache.fresh(KEY) is None


def test_everything_is_dropped_when_changes_were_missed(cache: PrincipalCache) -> None:
    cache.put(KEY, ACME, None, 5)
    cache.watched(9, resync=True)
    assert cache.fresh(KEY) is None


def test_refused_key_is_refused_again_for_a_moment(cache: PrincipalCache, clock: Clock) -> None:
    cache.refuse(KEY, "no")
    with pytest.raises(InvalidApiKey, match="no"):
        cache.fresh(KEY)
    clock.now += 5
    assert cache.fresh(KEY) is None


def test_refused_key_keeps_nothing_of_the_requests_that_used_it(cache: PrincipalCache) -> None:
    cache.refuse(KEY, "no")
    seen: list[InvalidApiKey] = []
    for _ in range(2):
        with pytest.raises(InvalidApiKey) as caught:
            cache.fresh(KEY)
        seen.append(caught.value)
    assert seen[0] is not seen[1]


def test_refused_keys_are_forgotten_when_their_moment_is_over(
    cache: PrincipalCache, clock: Clock
) -> None:
    for number in range(100):
        cache.refuse(digest(str(number)), "no")
    clock.now += 5
    cache.refuse(KEY, "no")
    assert cache.num_refused == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.12, "120ms"), (0, "0ms"), (1, "1s"), (59.2, "59s"), (360, "6m0s")]
)
def test_reset_is_written_as_openai_writes_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_headers_name_what_is_limited_and_what_is_left() -> None:
    grant = Grant("l", NOTHING, 20.0, False, None, Amounts(tokens=300), 0.0, 31.0)
    headers = limit_headers(Limits(tokens_per_minute=1000), (grant, Amounts(tokens=50)))
    assert headers == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "350",
        "x-ratelimit-reset-tokens": "31s",
    }
