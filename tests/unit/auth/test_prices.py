"""Money is decimal: what a row costs, and which prices can't be read."""

import re

import pytest

from infermesh.config import ConfigError
from infermesh.errors import InvalidRequest
from services.auth.prices import amount, price_list
from services.auth.values import KeyId, TenantId, UsageRow

PRICE = "tiny prompt=0.15 cached_prompt=0.05 output=0.60 cached_output=0 device_second=0.001"


def row(model: str = "tiny", cache: str = "miss", **counts: int) -> UsageRow:
    values = {"prompt_tokens": 0, "completion_tokens": 0, "cached_prompt_tokens": 0, **counts}
    return UsageRow(
        record_id="r",
        request_id="r",
        tenant_id=TenantId("acme"),
        key_id=KeyId("k"),
        model=model,
        endpoint="chat",
        status="ok",
        finished_unix_ms=0,
        cache=cache,
        **values,
    )


def cost(text: str, of: UsageRow) -> str | None:
    nano = price_list("EUR", [text]).cost_nano(of)
    return None if nano is None else amount(nano)


def test_each_kind_of_token_and_the_device_have_their_price() -> None:
    of = row(
        prompt_tokens=1_000_000,
        cached_prompt_tokens=400_000,
        completion_tokens=500_000,
        device_us=2_000_000,
    )
    assert cost(PRICE, of) == "0.412"  # 0.09 + 0.02 + 0.30 + 0.002


@pytest.mark.parametrize("cache", ["hit", "shared"])
def test_answer_that_was_not_computed_has_its_own_price(cache: str) -> None:
    of = row(cache=cache, prompt_tokens=1000, cached_prompt_tokens=1000, completion_tokens=1000)
    assert cost(PRICE, of) == "0.00005"
    assert cost("tiny prompt=1 output=2", of) == "0.003"  # no such price: as if it were computed


def test_cost_is_rounded_once_and_half_to_even() -> None:
    assert cost("tiny prompt=0.0005", row(prompt_tokens=1)) == "0"
    assert cost("tiny prompt=0.0015", row(prompt_tokens=1)) == "0.000000002"
    assert cost("tiny prompt=0.1", row(prompt_tokens=3)) == "0.0000003"


def test_star_is_of_models_without_a_price_of_their_own() -> None:
    many = price_list("EUR", ["tiny prompt=1", "* prompt=2"])
    assert many.cost_nano(row("other", prompt_tokens=1_000_000)) == 2 * 10**9
    assert many.cost_nano(row(prompt_tokens=1_000_000)) == 10**9
    assert price_list("EUR", ["tiny prompt=1"]).cost_nano(row("other", prompt_tokens=1)) is None


def test_cost_that_the_ledger_can_not_hold_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than the ledger"):
        cost("tiny prompt=999999", row(prompt_tokens=2**60))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["tiny"], "names no price"),
        (["tiny prompt=1,5"], "'prompt=1,5' is none of"),
        (["tiny prompt=-1"], "'prompt=-1' is none of"),
        (["tiny prompt=1e3"], "'prompt=1e3' is none of"),
        (["tiny input=1"], "'input=1' is none of"),
        (["tiny prompt=1 prompt=2"], "'prompt=2' is none of"),
        (["tiny prompt=1", "tiny output=1"], "two prices of tiny"),
    ],
)
def test_price_that_can_not_be_read_is_refused_by_its_text(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        price_list("EUR", texts)


def test_currency_must_be_letters() -> None:
    with pytest.raises(ConfigError, match=r"auth\.currency is '1'"):
        price_list("1", [])
