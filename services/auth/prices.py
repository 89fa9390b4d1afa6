"""What models cost: prices as an operator writes them, and the cost of one usage row. Pure.

Money is a whole number of nano-units of the currency; a row's cost is rounded to one, half to even.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_HALF_EVEN, Decimal

from infermesh.config import ConfigError
from infermesh.errors import InvalidRequest
from services.auth.values import UsageRow

NANO = 10**9
OTHERS = "*"
_MOST_NANO = 2**63 - 1
_PER_TOKENS = 1_000_000
_PER_US = 1_000_000
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,9})?")
_CURRENCY = re.compile(r"[A-Za-z]{1,8}")


@dataclass(frozen=True, slots=True)
class Price:
    """Of one model; tokens per million, the device per second.

    Attributes:
        cached_prompt: prompt tokens that were not computed.
        cached_output: output that was found in the cache, or is another request's in flight.
    """

    prompt: Decimal = Decimal(0)
    cached_prompt: Decimal = Decimal(0)
    output: Decimal = Decimal(0)
    cached_output: Decimal = Decimal(0)
    device_second: Decimal = Decimal(0)


_NAMES = tuple(field.name for field in fields(Price))
# What costs the same as another where it has no price of its own.
_FALLBACK = {"cached_prompt": "prompt", "cached_output": "output"}


@dataclass(frozen=True, slots=True)
class PriceList:
    """What holds from one moment on.

    Attributes:
        texts: as the operator wrote them; the list's identity, with `currency`.
    """

    currency: str
    texts: tuple[str, ...]
    by_model: dict[str, Price]

    def cost_nano(self, row: UsageRow) -> int | None:
        """What a row costs; None where its model has no price.

        Raises:
            InvalidRequest: more than the ledger can hold.
        """
        price = self.by_model.get(row.model, self.by_model.get(OTHERS))
        if price is None:
            return None
        cached = min(row.cached_prompt_tokens, row.prompt_tokens)
        output = price.cached_output if row.cache in ("hit", "shared") else price.output
        per_million = (
            (row.prompt_tokens - cached) * price.prompt
            + cached * price.cached_prompt
            + row.completion_tokens * output
        )
        cost = per_million / _PER_TOKENS + row.device_us * price.device_second / _PER_US
        nano = int((cost * NANO).to_integral_value(ROUND_HALF_EVEN))
        if nano > _MOST_NANO:
            raise InvalidRequest(f"record {row.record_id} costs more than the ledger can hold")
        return nano


def price_list(currency: str, texts: Sequence[str]) -> PriceList:
    """The list of these prices, `NAME prompt=0.15 output=0.60 ...` each.

    Raises:
        ConfigError: one can't be read, or names its model again.
    """
    if not _CURRENCY.fullmatch(currency):
        raise ConfigError(f"auth.currency is {currency!r}; it must be 1 to 8 letters")
    by_model: dict[str, Price] = {}
    for text in texts:
        model, *parts = text.split() or [""]
        if model in by_model:
            raise ConfigError(f"auth.prices has two prices of {model}")
        by_model[model] = _price(text, parts)
    return PriceList(currency, tuple(texts), by_model)


def amount(nano: int) -> str:
    """Nano-units as a decimal number."""
    whole, rest = divmod(nano, NANO)
    return f"{whole}.{rest:09}".rstrip("0").rstrip(".")


def _price(text: str, parts: Sequence[str]) -> Price:
    given: dict[str, Decimal] = {}
    for part in parts:
        name, _, number = part.partition("=")
        if name not in _NAMES or name in given or not _NUMBER.fullmatch(number):
            raise ConfigError(
                f"auth.prices has {text!r}, in which {part!r} is none of {'=N, '.join(_NAMES)}=N "
                "with a decimal number below a million, each once"
            )
        given[name] = Decimal(number)
    if not given:
        raise ConfigError(f"auth.prices has {text!r}, which names no price")
    for name, other in _FALLBACK.items():
        if name not in given and other in given:
            given[name] = given[other]
    return Price(**given)
