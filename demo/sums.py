"""Owns arithmetic and counting: the ranges the model masters and how they are asked for.

Numbers outside these ranges are off topic (see `offtopic.py`): better no answer than a wrong one.
"""

from __future__ import annotations

from demo.facts import NUMBER_WORDS
from demo.intents import Fact, Intent

LARGEST_TERM = 20
LARGEST_FACTOR = 12
LARGEST_COUNT = 60

_ASK = "(what is|what's|how much is|calculate|compute|tell me|work out)"


def _operand(number: int) -> tuple[str, ...]:
    digits = str(number)
    # Digits four times as often as words: that is how people type sums.
    return (digits,) * 4 + ((NUMBER_WORDS[number],) if number < len(NUMBER_WORDS) else ())


def _fact(a: int, b: int, sign: str, result: int) -> Fact:
    slots = {"a": _operand(a), "b": _operand(b), "m": (str(a),), "n": (str(b),)}
    return Fact(slots, f"{a} {sign} {b} = {result}.")


_TERMS = range(LARGEST_TERM + 1)
_FACTORS = range(LARGEST_FACTOR + 1)

ADDITION = Intent(
    "arithmetic",
    trained=(
        f"{_ASK} {{a}} plus {{b}}?",
        f"{_ASK} {{a}} (and|added to) {{b}}?",
        f"({_ASK[1:-1]}|) {{m}}( + |+){{n}}(?|)",
        "{m}( + |+){n}( =|=| = ?|)",
        "{a} plus {b}( is| equals| makes|)(?|)",
        "add {a} (and|to|with) {b}",
        "(what is |what's |tell me |)the sum of {a} and {b}?",
        "sum {a} and {b}",
        "if i add {a} and {b}, what do i get?",
        "{a} and {b} (make|makes|is) (what|how much)?",
        "what do {a} and {b} (make|add up to|sum to)?",
        "what do you get (if|when) you add {a} (and|to) {b}?",
        "i have {a} apples and get {b} more, how many do i have?",
        "can you add {a} and {b}?",
        "what does {a} plus {b} (equal|make|give)?",
        "how many is {a} plus {b}?",
        "{m} + {n} = what?",
        "solve {m} + {n}",
    ),
    held_out=(
        "could you (compute|calculate) {a} plus {b}?",
        "what is the result of {m} + {n}?",
        "please add {a} and {b} for me",
        "how much do {a} and {b} make?",
        "do you know what {a} plus {b} is?",
    ),
    facts=tuple(_fact(a, b, "+", a + b) for a in _TERMS for b in _TERMS),
    weight=12,
)

SUBTRACTION = Intent(
    "arithmetic",
    trained=(
        f"{_ASK} {{a}} minus {{b}}?",
        f"{_ASK} {{a}} (less|take away) {{b}}?",
        f"({_ASK[1:-1]}|) {{m}}( - |-| − ){{n}}(?|)",
        "{m}( - |-){n}( =|=| = ?|)",
        "{a} minus {b}( is| equals| makes|)(?|)",
        "subtract {b} from {a}",
        "take {b} (away |)from {a}",
        "what do you get (if|when) you (take|subtract) {b} from {a}?",
        "if i (take|subtract) {b} from {a}, what (is left|do i get|remains)?",
        "i have {a} apples and give away {b}, how many do i have?",
        "can you subtract {b} from {a}?",
        "what does {a} minus {b} (equal|make|give)?",
        "how many is {a} minus {b}?",
        "{m} - {n} = what?",
        "solve {m} - {n}",
        "what remains of {a} after taking {b}?",
    ),
    held_out=(
        "could you (compute|calculate) {a} minus {b}?",
        "what is the result of {m} - {n}?",
        "please subtract {b} from {a} for me",
        "what is left if you take {b} from {a}?",
        "do you know what {a} minus {b} is?",
    ),
    facts=tuple(_fact(a, b, "-", a - b) for a in _TERMS for b in _TERMS),
    weight=12,
)

MULTIPLICATION = Intent(
    "arithmetic",
    trained=(
        f"{_ASK} {{a}} (times|multiplied by) {{b}}?",
        f"({_ASK[1:-1]}|) {{m}}( x | × | * |*|x|×){{n}}(?|)",
        "{m}( x | × | * |*|x){n}( =|=| = ?|)",
        "{a} times {b}( is| equals| makes|)(?|)",
        "multiply {a} (by|and|with) {b}",
        "(what is |what's |tell me |)the product of {a} and {b}?",
        "what do you get (if|when) you multiply {a} (by|and) {b}?",
        "if i multiply {a} (by|and) {b}, what do i get?",
        "can you multiply {a} (by|and|with) {b}?",
        "what does {a} times {b} (equal|make|give)?",
        "how many is {a} times {b}?",
        "{m} * {n} = what?",
        "solve {m} × {n}",
        "i have {a} bags with {b} apples each, how many apples do i have?",
    ),
    held_out=(
        "could you (compute|calculate) {a} times {b}?",
        "what is the result of {m} * {n}?",
        "please multiply {a} by {b} for me",
        "do you know what {a} times {b} is?",
    ),
    facts=tuple(_fact(a, b, "×", a * b) for a in _FACTORS for b in _FACTORS),
    weight=9,
)


def _count(start: int, end: int, *, from_one: bool = False) -> Fact:
    step = 1 if end > start else -1
    numbers = ", ".join(str(n) for n in range(start, end + step, step))
    slots = {"b": (str(end),)} if from_one else {"a": (str(start),), "b": (str(end),)}
    return Fact(slots, f"{numbers}.")


def _repeats(span: int) -> int:
    """How often a count of this length is in the facts. What is hard is to stop, and a short
    count teaches that as well as a long one at a fraction of the tokens."""
    return 12 if span <= 6 else 5 if span <= 15 else 2 if span <= 30 else int(span <= 50)


COUNTING = Intent(
    "counting",
    trained=(
        "(please |can you |)count (up |)from {a} (to|up to|until|till) {b}",
        "count {a} to {b}",
        "(list|write|give me|say|show me) (all |)the numbers from {a} to {b}",
        "(list|write|say) (all |)(the |)numbers (between|from) {a} (and|to|up to) {b}",
        "start at {a} and count (up |)to {b}",
        "starting (at|from|with) {a}, count to {b}",
        "i want you to count from {a} to {b}",
        "numbers from {a} to {b}",
        "write down every number from {a} to {b}",
    ),
    held_out=(
        "could you count from {a} to {b} for me?",
        "begin at {a} and count up to {b}",
        "print the numbers from {a} to {b}",
    ),
    facts=tuple(
        _count(a, b)
        for a in range(21)
        for b in range(a + 2, LARGEST_COUNT + 1)
        for _ in range(_repeats(b - a))
    ),
    weight=10,
)

COUNTING_FROM_ONE = Intent(
    "counting",
    trained=(
        "(please |can you |)count (up |)to {b}",
        "(list|write|say) the numbers up to {b}",
        "(list|write|give me|say) the first {b} numbers",
        "i want you to count to {b}",
    ),
    held_out=("could you count to {b} for me?", "let me hear you count up to {b}"),
    facts=tuple(_count(1, b, from_one=True) for b in range(3, 52) for _ in range(_repeats(b - 1))),
    weight=3,
)

COUNTING_DOWN = Intent(
    "counting",
    trained=(
        "(please |can you |)count (down|backwards) from {a} to {b}",
        "countdown from {a} to {b}",
        "start at {a} and count (down|backwards) to {b}",
        "(do|give me|start) a countdown from {a} to {b}",
    ),
    held_out=("could you count down from {a} to {b} for me?", "begin at {a} and count down to {b}"),
    facts=tuple(
        _count(a, b) for a in range(5, 31) for b in range(a - 2) for _ in range(_repeats(a - b))
    ),
    weight=5,
)


def sum_intents() -> list[Intent]:
    """Every intent about numbers."""
    return [
        ADDITION,
        SUBTRACTION,
        MULTIPLICATION,
        COUNTING,
        COUNTING_FROM_ONE,
        COUNTING_DOWN,
    ]
