"""The sparse token history against a plain count."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.shard.history import TokenHistory

_tokens = st.lists(st.integers(0, 200), max_size=150)


@given(prompt=_tokens, output=_tokens, later=_tokens)
def test_history_equals_a_plain_count_when_tokens_repeat(
    prompt: list[int], output: list[int], later: list[int]
) -> None:
    history = TokenHistory(prompt, output)
    for token in later:
        history.append(token)
    counts = Counter(output + later)
    ids, of_output = history.token_ids.tolist(), history.output_counts.tolist()
    assert ids == list(dict.fromkeys(prompt + output + later))
    assert of_output == [counts[token] for token in ids]


def test_history_has_room_for_more_distinct_tokens_than_it_began_with() -> None:
    history = TokenHistory([], [])
    for token in [*range(1000), 0]:
        history.append(token)
    assert history.token_ids.tolist() == list(range(1000))
    assert history.output_counts.tolist() == [2.0] + [1.0] * 999
