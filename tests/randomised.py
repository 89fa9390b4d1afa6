"""Randomised tests in two lengths: a short one for `make test`, the whole one for `make verify`.

Both draw anew in every run, so the short one finds over days what the whole one finds at once.
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any
from unittest import TestCase

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.strategies import SearchStrategy


def drawn(
    few: int,
    many: int,
    *strategies: SearchStrategy[Any],
    suppress: Collection[HealthCheck] = (),
    **named: SearchStrategy[Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis' `given`, with `few` examples in `make test` and `many` in `make verify`.

    Parameters of the test that are not drawn are fixtures, as with `given`.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        lengths = [few, pytest.param(many, marks=pytest.mark.slow)]

        @pytest.mark.parametrize("num_examples", lengths)
        def run(num_examples: int, **fixtures: Any) -> None:
            limits = settings(
                max_examples=num_examples, deadline=None, suppress_health_check=suppress
            )
            limits(given(*strategies, **named)(test))(**fixtures)

        others = [
            parameter
            for name, parameter in inspect.signature(test).parameters.items()
            if name not in named
        ]
        fixtures = others[: len(others) - len(strategies)]
        count = inspect.Parameter("num_examples", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([count, *fixtures])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def machine_tests(
    machine: type[RuleBasedStateMachine], few: int, many: int, num_steps: int
) -> tuple[type[TestCase], type[TestCase]]:
    """A state machine with `few` runs for `make test`, and with `many` for `make verify`."""

    def test(num_runs: int) -> type[TestCase]:
        limits = settings(
            max_examples=num_runs,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return type(machine.__name__, (machine.TestCase,), {"settings": limits})

    return test(few), pytest.mark.slow(test(many))
