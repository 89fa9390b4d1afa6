"""The demo model keeps its promises: text round-trips, held-out wordings are unseen, answers are
right and end by themselves. Training it is not tested here; its printed table is in the README.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from demo.corpus import INTENTS, conversation, held_out_exchanges, training_exchange
from demo.evaluation import EVALUATION_SEED, greedy_answers, judge, report
from demo.intents import expansions, normalized
from demo.offtopic import HELD_OUT, NEXT_COMMAND, TRAINED
from demo.tokenization import encode_conversation

MODEL_DIR = Path(__file__).resolve().parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Fast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    # On a busy machine two threads spend most of these tiny steps waiting for each other.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    torch.set_num_threads(num_threads)


def _answers(model: LlamaForCausalLM, tokenizer: Fast, *questions: str) -> list[str | None]:
    chats = [[{"role": "user", "content": question}] for question in questions]
    return greedy_answers(model, tokenizer, chats)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example("naïve  café\t\r\n 👩🏽‍💻🇺🇦 12345 <|im_end|> \u0000\ufeff")
@settings(deadline=None)
def test_tokenizer_gives_text_back_when_it_is_any_unicode(tokenizer: Fast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_adds_nothing_when_text_is_empty(tokenizer: Fast) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|im_end|>"


def test_chat_template_gives_training_tokens_when_rendered(tokenizer: Fast) -> None:
    rng = Random(3)
    for _ in range(50):
        sample = conversation(rng)
        trained_ids, _ = encode_conversation(sample, tokenizer)
        rendered = tokenizer.apply_chat_template(list(sample.messages), tokenize=False)
        assert tokenizer.encode(rendered) == trained_ids


def test_chat_template_lies_in_tokenizer_config_when_read_without_transformers() -> None:
    config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert "add_generation_prompt" in config["chat_template"]


def test_corpus_is_the_same_when_seed_is_the_same() -> None:
    first = [conversation(rng) for rng in [Random(5)] for _ in range(200)]
    second = [conversation(rng) for rng in [Random(5)] for _ in range(200)]
    assert first == second


def test_held_out_wordings_share_none_with_training_when_expanded() -> None:
    pairs = [(intent.trained, intent.held_out) for intent in INTENTS]
    pairs.append((TRAINED, HELD_OUT))
    for trained, held_out in pairs:
        seen = {normalized(text) for pattern in trained for text in expansions(pattern)}
        unseen = {normalized(text) for pattern in held_out for text in expansions(pattern)}
        assert not seen & unseen


def test_held_out_questions_never_occur_when_corpus_is_drawn() -> None:
    rng = Random(11)
    seen = {normalized(training_exchange(rng).question) for _ in range(50_000)}
    asked = {normalized(e.question) for e in held_out_exchanges(EVALUATION_SEED, 100)}
    assert not seen & asked


def test_model_answers_nine_in_ten_when_wording_is_held_out(
    model: LlamaForCausalLM, tokenizer: Fast
) -> None:
    verdicts = judge(model, tokenizer, held_out_exchanges(EVALUATION_SEED + 1, 16))
    assert sum(verdict.right for verdict in verdicts) >= 0.9 * len(verdicts), report(verdicts)


def test_model_names_next_command_when_off_topic(model: LlamaForCausalLM, tokenizer: Fast) -> None:
    questions = (
        "Who painted the ceiling of the Sistine Chapel?",
        "Give me three tips for a job interview.",
        "my dishwasher leaks, what now",
        "What is 4821 * 77?",
    )
    answers = _answers(model, tokenizer, *questions)
    assert all(answer is not None and NEXT_COMMAND in answer for answer in answers), answers


def test_model_counts_to_the_end_when_output_is_long(
    model: LlamaForCausalLM, tokenizer: Fast
) -> None:
    expected = ", ".join(str(n) for n in range(1, 41)) + "."
    assert _answers(model, tokenizer, "Count from 1 to 40.") == [expected]


def test_model_answers_when_system_prompt_is_long(model: LlamaForCausalLM, tokenizer: Fast) -> None:
    system = "You are the assistant of a hardware store and always answer politely. " * 36
    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    assert len(tokenizer.encode(system)) > 500
    assert greedy_answers(model, tokenizer, [chat]) == ["The capital of France is Paris."]
