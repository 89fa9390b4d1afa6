"""Stop strings are found wherever the text is cut, and nothing of them is shown."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.text.stop_strings import StopMatcher

LETTERS = st.text(alphabet="abc", max_size=24)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def shown(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + ("" if matcher.matched else matcher.finish()), matcher.matched


def oracle(stops: list[str], text: str) -> tuple[str, bool]:
    """Reads one character at a time and stops as soon as the text ends in a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(STOPS, LETTERS, st.data())
@settings(max_examples=500)
def test_outcome_is_that_of_single_characters_however_the_text_is_cut(
    stops: list[str], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert shown(stops, pieces) == oracle(stops, text)


def test_possible_beginning_is_held_back_until_it_is_none() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(piece) for piece in ("go ST", "O", "NE")] == ["go ", "", "STONE"]


def test_rest_is_shown_when_the_text_ends_in_a_beginning() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go STO") + matcher.finish() == "go STO"
    assert not matcher.matched


def test_nothing_is_held_when_there_are_no_stop_strings() -> None:
    assert StopMatcher([]).push("anything") == "anything"
