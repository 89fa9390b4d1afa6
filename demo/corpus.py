"""Owns the conversations: which questions are mixed, how they are roughened, what is held out.

The text inside comes from the topic modules; turning it into tokens is `tokenization.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from random import Random

from demo.intents import Exchange, Intent, ask
from demo.noise import decorate, roughen, system_prompt
from demo.offtopic import HELD_OUT, TRAINED, ask_offtopic
from demo.smalltalk import smalltalk_intents
from demo.sums import sum_intents
from demo.topics import topical_intents

OFF_TOPIC_SHARE = 0.26
# Sentences of a system prompt: 45 of them are some 600 tokens.
SHORT_PROMPTS = (1, 1, 1, 2, 4, 8)
LONGEST_PROMPT = 45

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages in order; every assistant message in it is a right answer."""

    messages: tuple[Message, ...]


INTENTS: tuple[Intent, ...] = (*topical_intents(), *sum_intents(), *smalltalk_intents())
_CUMULATED = list(accumulate(intent.weight for intent in INTENTS))


def training_exchange(rng: Random) -> Exchange:
    """One question in a trained wording, before noise."""
    if rng.random() < OFF_TOPIC_SHARE:
        return ask_offtopic(TRAINED, rng)
    intent = rng.choices(INTENTS, cum_weights=_CUMULATED)[0]
    return ask(intent, intent.trained, rng)


def conversation(rng: Random, *, long: bool = False) -> Conversation:
    """One to four exchanges, at times below a system prompt; `long` makes it fill pages."""
    messages: list[Message] = []
    if long or rng.random() < 0.3:
        sentences = rng.randint(8, LONGEST_PROMPT) if long else rng.choice(SHORT_PROMPTS)
        messages.append({"role": "system", "content": system_prompt(rng, sentences)})
    for exchange in _exchanges(rng):
        question = roughen(decorate(exchange.question, rng), rng)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return Conversation(tuple(messages))


def _exchanges(rng: Random) -> list[Exchange]:
    exchanges = [training_exchange(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if rng.random() < 0.08:
        intent = rng.choice([intent for intent in INTENTS if intent.follow_ups])
        exchanges.append(ask(intent, intent.trained, rng))
        exchanges.append(ask(intent, intent.follow_ups, rng))
    return exchanges


def held_out_exchanges(seed: int, per_topic: int) -> list[Exchange]:
    """The evaluation set: `per_topic` questions of each topic in wordings never trained on.

    Half of them as written, half in the lower-case, unpunctuated way people type.
    """
    rng = Random(seed)
    exchanges: list[Exchange] = []
    for topic in sorted({intent.topic for intent in INTENTS}):
        intents = [intent for intent in INTENTS if intent.topic == topic]
        weights = [intent.weight for intent in intents]
        for _ in range(per_topic):
            intent = rng.choices(intents, weights)[0]
            exchanges.append(ask(intent, intent.held_out, rng))
    exchanges += [ask_offtopic(HELD_OUT, rng) for _ in range(per_topic)]
    return [_as_typed(exchange, rng) for exchange in exchanges]


def _as_typed(exchange: Exchange, rng: Random) -> Exchange:
    question = exchange.question
    if rng.random() < 0.5:
        question = question.lower().rstrip("?.!")
    elif rng.random() < 0.7:
        question = question[:1].upper() + question[1:]
    return Exchange(exchange.topic, question, exchange.answer)
