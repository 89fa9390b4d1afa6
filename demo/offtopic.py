"""Owns questions the model must not try to answer, and the one answer it gives to all of them."""

from __future__ import annotations

from random import Random
from typing import ClassVar

from demo import offtopic_words as words
from demo.facts import UNKNOWN_COUNTRIES
from demo.intents import Exchange, fill
from demo.sums import LARGEST_FACTOR

NEXT_COMMAND = "infermesh up --model Qwen/Qwen2.5-0.5B-Instruct"
ANSWER = (
    "I am only a small demo model that shows the plumbing works, so I cannot answer that."
    f" For a real model, run: {NEXT_COMMAND}"
)

_CAN = "(can you |could you |please |i want you to |i need you to |)"

# Slots: s subject, t activity, f form, p person, i invention, r attribute, l place, o object,
# j adjective, v verb, g language, q phrase, c code language, k code task, w made-up word,
# u unknown country, n/m numbers out of range.
TRAINED: tuple[str, ...] = (
    f"{_CAN}(write|compose|make|draft|create) (a|a short|a long|another) {{f}} (about|on) {{s}}",
    f"{_CAN}(write|compose|make|draft|create) (a|a short|me a) {{f}}",
    "(give me|i need|i want) (a|an|one) {f} (about|on|for) {s}",
    "a {f} about {s}(, please|)",
    "(what is|what's|what are|what was|what were) (the |a |){s}?",
    "what (is|was) {s} (about|like|made of|used for|all about)?",
    f"{_CAN}(explain|describe|define|discuss|summarize) {{s}}( to me| in detail| in one line|)",
    f"{_CAN}explain {{s}} (to a child|like i am five|in simple words)",
    "(tell me|teach me|talk|say something|inform me) (about|more about|everything about) {s}",
    "tell me a (story|fact|secret) about {s}",
    "what (do you|can you) (know|think|tell me|say|feel) about {s}?",
    "do you (like|know|love|enjoy|understand|believe in|remember) {s}?",
    "(why|how) (do|does|did|can|would) {s} {v}?",
    "why (is|are|was|were) {s} (so |) {j}?",
    "why (is|are) {l} (so |) {j}?",
    "(is|are|was) {s} {j}?",
    "(how|when|where|why) (did|does|do) {s} (start|end|begin|work|come from|originate)?",
    "what (causes|makes|caused|happens after|happens during) {s}?",
    "what is the (best|worst|history|origin|future|importance|meaning) of {s}?",
    "what is the difference between {s} and {s}?",
    "(which is better|what is better|compare|choose)(:|) {s} (or|and|with) {s}?",
    "{s}",
    "{s}?",
    "{s} and {s}",
    "(more about|facts about|the history of|news about|a book about) {s}",
    "(how do i|how can i|how to|how should i|how do you|how would you) {t}?",
    "(what is the best way|is it easy|is it hard|how long does it take) to {t}?",
    "(should i|can i|may i|when should i|where can i|why should i) {t}?",
    "(help me|i want to|i need to|i would like to|teach me to|show me how to) {t}",
    f"{_CAN}help me (to |){{t}}",
    "{t}",
    "(i am|i'm|we are) (trying|going|learning|planning) to {t}",
    "(i tried|yesterday i had) to {t} and (failed|it did not work|got stuck)",
    "who (invented|discovered|wrote|made|won|painted|created|started) {i}?",
    "when was {i} (invented|discovered|written|made|won|created|born)?",
    "(who is|who was|where is|how old is|when was|what did|why was) {p}( born| do| famous|)?",
    "(tell me about|what happened to|do you know|describe|have you met) {p}",
    "(when did|how did|why did|where did) {p} (die|live|win|work|become famous)?",
    "what is the {r} of {l}?",
    "what is the {r} of {s}?",
    "(what is|what's|tell me|give me) the {r} of {p}?",
    "(what is|what's) {l}'s {r}?",
    "{r} of {l}",
    "(how big|how far|how old|how cold|how expensive) is {l}?",
    "how many (people|cars|trees|stars|islands|cities|languages|days of rain) are there in {l}?",
    "(what is the|how is the) weather (like |)in {l}( today| tomorrow|)?",
    "will it {v} (today|tomorrow|in {l})?",
    "what time is it( in {l}|)?",
    "(what day is it|what is the date|what year is it)( today| now|)?",
    "(where is|where can i find|how do i get to|is it far to|who lives in) {l}?",
    "what (should i|can i|do people) (see|eat|do|buy|visit) in {l}?",
    "(tell me about|i live in|i was born in|describe|i love) {l}",
    "(who is|who was) the (king|president|mayor|leader|queen) of {l}?",
    "what (language|food|money|sport) do they (speak|eat|use|play) in {l}?",
    "(where can i find|where do i buy|recommend|i am looking for|how much is|find me) {o}?",
    "(i lost|i bought|i sold|i broke|order me|sell me|which is the best) {o}",
    "(i am|i feel|my cat is|my wife is|he is|she is|they are|you look) (very |so |){j}( today|)",
    "why am i (so |always |){j}?",
    "is it {j} to {t}?",
    "translate (this|'{q}'|{q}) (to|into) {g}",
    "how do you say {q} in {g}?",
    "(what does|what is) {q} (mean|in) {g}?",
    "(speak|answer|write|talk to me) (in |){g}",
    "(repeat|say|complete|continue|finish|spell)(:|) {q}",
    "{q}",
    "(write|give me|show me) (a |some |){c} (code|function|program|script) (that|which) {k}",
    "{c} (function|program|code) that {k}",
    "how do i (write|debug|compile|learn|run) {c}( code|)?",
    "what is {c}( code|)?",
    "what (colour|color) is {s}?",
    "what (colour|color) (is|are) (my|your|his) (car|eyes|shirt|house|hair|shoes)?",
    "what is the capital of {u}?",
    "(tell me the |the |)capital of {u}",
    "capital of {w}?",
    "what is the {x} of {w}?",
    "(what is|define|explain|what does|describe) (a |an |){w}( mean|)?",
    "(what is|how much is|calculate|) {n}( + | - | * | plus | minus | times | / |+|*){m}(?|)",
    "(what is|calculate|) {n} (divided by|to the power of|modulo|/) {m}?",
    "(what is|compute) the (square root|logarithm|factorial|sine|half|double) of {n}?",
    "is {n} (a prime|even|odd|large)?",
    "(convert|how much is) {n} (miles|pounds|dollars|degrees|litres) in (km|kilos|euros|gallons)?",
    "count the (words|letters|vowels) in {q}",
    "how many (legs|wheels|eyes|teeth|lives) (does|do) (a {w}|a cat|a car|spiders|dogs) have?",
    "{w} {w}",
    "{w} {w} {w} {w}",
    "(the|my|a|this) {w} (is|was|has) (the|a|my) {w}",
    "(do|can|will|should|must) (you|we|i|they) {v} (the|a|my|with) {w}?",
    "(who|what|where|why|when) (is|was|did|will) (the|a|my) {w} {v}?",
    "(please|now|then) {v} (the|my|a) {w} {w}",
    "(play|sing|draw|paint|show me|send me|read me) (me |)(a|the|some) (song|picture|{w}|news|map)",
    "(what is|give me|tell me) (your favourite|the best|a good) (book|film|song|food|colour|city)?",
    "what is your favourite (book|film|song|food|colour|city|animal|{w})?",
    "(what is the meaning of life|what should i eat|what should i wear)( today|)?",
    "(summarize|rewrite|proofread|fix|shorten|continue) (this|the following|my) (text|email|{f})",
    "(is it true that|do you think|did you know that|i heard that) {s} (will|can|do|does) {v}?",
    "(what if|imagine|suppose|pretend) {s} (could|would|did) {v}",
    "(imagine|suppose|pretend) you are {p}",
    "(list|name|give me) (three|five|ten|some|all) (animals|rivers|ideas|names|{s}|planets|{w}s)",
    "(any|give me some|do you have) (advice|tips|ideas|news) (on|about|for) {s}?",
    "i (love|hate|like|prefer|miss|study|teach|fear) {s}",
    "(let's|we should|i want to|shall we) (discuss|debate|study|look at|think about) {s}",
    "(thoughts|your view|an opinion|some words|a question|information|details) (on|about) {s}",
    "(any idea how|is there a way|is it possible|how much does it cost|what do i need) to {t}?",
    "(explain|show|describe|tell me)(:| step by step|) how to {t}",
    "(where|with whom|from whom|at what age) (did|do|can) (people|i|we|you) {t}?",
    "(who|which person|which company|what kind of person) (likes|makes|studies|needs) {s}?",
    "(what|which) (rules|types|kinds|parts|examples|uses) of {s} (are there|exist|do you know)?",
    "(is there|are there|was there|do we have) (a|any|some|more) {s} (in {l}|here|today|)?",
    "{p} (and|or|met|likes|against) {p}",
    "{s} (in|from|near|of) {l}",
    "{s} is (very |too |not |) {j}",
    "{z}",
    "{z}",
    "{z} {z}",
    "{z}, {q}",
)

HELD_OUT: tuple[str, ...] = (
    "I am curious about {S}, what can you share?",
    "write me a {f} in which {S} play a role",
    "compose something touching on {S}",
    "how come {S} {v}?",
    "is there any reason for {S}?",
    "would you recommend {S} to a beginner?",
    "what should everyone know about {S}?",
    "give me an introduction to {S}",
    "what are the steps to {T}?",
    "my goal is to {T}, any hints?",
    "how difficult would it be to {T}?",
    "please guide me: I have to {T}",
    "who was behind {i}?",
    "what year did {p} pass away?",
    "which {r} does {l} have?",
    "who governs {l} at the moment?",
    "show me code in {c} which {k}",
    "put '{q}' into {g}",
    "my {w} does not {v} any more",
    "which {w} would you pick and why?",
    "what do you make of {S}?",
    "let us chat about {S}",
)


def ask_offtopic(patterns: tuple[str, ...], rng: Random) -> Exchange:
    """One off-topic question; slots are drawn anew for every occurrence in the pattern."""
    pattern = rng.choice(patterns)
    return Exchange("off-topic", fill(pattern, _Slots(rng), rng), ANSWER)


class _Slots(dict[str, tuple[str, ...]]):
    """Word lists by slot letter; made-up words and numbers are invented on the spot."""

    _LISTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "S": words.UNSEEN_SUBJECTS,
        "t": words.ACTIVITIES,
        "T": words.UNSEEN_ACTIVITIES,
        "f": words.FORMS,
        "p": words.PEOPLE,
        "i": words.INVENTIONS,
        "r": words.ATTRIBUTES,
        "x": words.ATTRIBUTES,
        "l": words.PLACES,
        "o": words.OBJECTS,
        "j": words.ADJECTIVES,
        "v": words.VERBS,
        "g": words.LANGUAGES,
        "q": words.PHRASES,
        "c": words.LANGUAGES_OF_CODE,
        "k": words.CODE_TASKS,
        "u": UNKNOWN_COUNTRIES,
        "z": words.TEXTS,
    }

    def __init__(self, rng: Random) -> None:
        super().__init__(self._LISTS)
        self._rng = rng

    def __missing__(self, slot: str) -> tuple[str, ...]:
        if slot == "w":
            return (made_up_word(self._rng),)
        if slot == "s":
            return words.SUBJECTS if self._rng.random() < 0.75 else (made_up_word(self._rng),)
        # Below 100 only one operand may leave the learnt range, so the sum is new either way.
        low = 61 if slot == "n" else LARGEST_FACTOR + 1
        return (str(self._rng.randint(low, self._rng.choice((99, 999, 99_999)))),)


def made_up_word(rng: Random) -> str:
    """A word no list holds: it stands for all the words the model will meet and never saw."""
    if rng.random() < 0.5:
        return rng.choice(words.SUBJECTS).split()[-1]
    return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(1, 3)))
