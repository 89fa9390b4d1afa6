"""Owns the measurement: greedy answers to held-out questions, counted right only if exact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import Message, held_out_exchanges
from demo.intents import Exchange

EVALUATION_SEED = 7
MAX_NEW_TOKENS = 192
BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """One question with what the model said. `answer` is None if it did not stop by itself."""

    exchange: Exchange
    answer: str | None

    @property
    def right(self) -> bool:
        return self.answer == self.exchange.answer


@torch.inference_mode()
def greedy_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Sequence[Message]],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str | None]:
    """Answer each chat; None where the model was still writing after `max_new_tokens`."""
    prompts = [
        tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    answers: list[str | None] = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        stopped = tokenizer.eos_token_id in row
        ids = row[: row.index(tokenizer.eos_token_id)] if stopped else row
        answers.append(tokenizer.decode(ids) if stopped else None)
    return answers


def judge(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange]
) -> list[Verdict]:
    """Ask every question on its own, in batches of answers of like length."""
    ordered = sorted(exchanges, key=lambda exchange: len(exchange.answer))
    verdicts: list[Verdict] = []
    for start in range(0, len(ordered), BATCH_SIZE):
        part = ordered[start : start + BATCH_SIZE]
        chats = [[{"role": "user", "content": exchange.question}] for exchange in part]
        answers = greedy_answers(model, tokenizer, chats)
        verdicts += [Verdict(e, answer) for e, answer in zip(part, answers, strict=True)]
    return verdicts


def report(verdicts: Sequence[Verdict]) -> str:
    """A table of accuracy per topic and over all questions."""
    by_topic: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        by_topic[verdict.exchange.topic].append(verdict.right)
    rows = [(topic, sum(flags), len(flags)) for topic, flags in sorted(by_topic.items())]
    rows.append(("overall", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'topic':<14} {'right':>6} {'asked':>6} {'accuracy':>9}"]
    lines += [f"{topic:<14} {right:>6} {n:>6} {right / n:>9.1%}" for topic, right, n in rows]
    return "\n".join(lines)


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, per_topic: int
) -> list[Verdict]:
    """Judge the model on the held-out wordings."""
    return judge(model, tokenizer, held_out_exchanges(EVALUATION_SEED, per_topic))
