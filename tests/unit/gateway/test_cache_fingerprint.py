"""Two requests share an answer only where every field that decides it is equal."""

import dataclasses
from typing import Any

import pytest

from gateway.cache.fingerprint import Fingerprints, Subject, fingerprints
from gateway.request import (
    Conversation,
    Fingerprint,
    Job,
    Options,
    Priority,
    Sampling,
    StopRules,
)
from tests.unit.gateway.jobs import JOB, job

SYSTEM = {"role": "system", "content": "Be short."}
CHAT = Conversation((SYSTEM, {"role": "user", "content": "What is the capital of France?"}))
OPTIONS = Options(Sampling(temperature=0.0), StopRules(max_tokens=16))
SUBJECT = Subject(JOB, CHAT, OPTIONS, max_model_len=256, embedder_id="mini")


def rendered(conversation: Conversation) -> str:
    lines = [f"{m['role']}: {m['content']}" for m in conversation.messages]
    return "\n".join(lines) + repr(sorted(conversation.template_kwargs.items()))


def of(**changes: Any) -> Fingerprints:
    return fingerprints(dataclasses.replace(SUBJECT, **changes), rendered)


def asking(text: object, *, system: str = "Be short.", **more: Any) -> Conversation:
    first = {"role": "system", "content": system}
    return Conversation((first, {"role": "user", "content": text, **more}))


# field -> a subject in which that field alone differs
SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 4,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {7: 1.0},
    "top_logprobs": 2,
}
JOB_FIELDS = {
    "fingerprint": Fingerprint("g"),
    "num_choices": 2,
    "sharing_domain": "local/someone",
    "shareable_seed": 3,
}
STOP = {"max_tokens": 17, "min_tokens": 2, "stop_token_ids": (9,), "ignore_eos": True}
OPTION_FIELDS = {"stop_strings": ("\n",), "fallback_max_tokens": 5}
SUBJECT_FIELDS = {"max_model_len": 128, "embedder_id": "maxi", "adapter_id": "lora"}
CONVERSATIONS = {
    "system prompt": asking("What is the capital of France?", system="Be long."),
    "history": Conversation((SYSTEM, *({"role": r, "content": "x"} for r in ("user", "assistant")),
                             CHAT.messages[-1])),
    "name": asking("What is the capital of France?", name="Ann"),
    "role": Conversation((SYSTEM, {**CHAT.messages[-1], "role": "assistant"})),
    "tools": asking("What is the capital of France?", tools=[{"type": "function"}]),
    "template variables": Conversation(CHAT.messages, {"enable_thinking": True}),
    "response format": Conversation(CHAT.messages, {"response_format": {"type": "json_object"}}),
}  # fmt: skip

DIFFERENT: dict[str, Fingerprints] = {
    **{name: of(job=job(**{name: value})) for name, value in (SAMPLING | JOB_FIELDS).items()},
    **{
        f"stop.{name}": of(options=dataclasses.replace(OPTIONS, stop=StopRules(**{name: value})))
        for name, value in STOP.items()
    },
    **{
        f"options.{name}": of(options=dataclasses.replace(OPTIONS, **{name: value}))
        for name, value in OPTION_FIELDS.items()
    },
    **{f"subject.{name}": of(**{name: value}) for name, value in SUBJECT_FIELDS.items()},
    **{name: of(prompt=conversation) for name, conversation in CONVERSATIONS.items()},
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_both_fingerprints_differ_when_one_field_does(field: str) -> None:
    assert DIFFERENT[field].exact != of().exact or field in CONVERSATIONS  # there the ids would
    assert DIFFERENT[field].compatibility != of().compatibility


def test_every_field_of_a_request_is_in_the_table_or_decides_no_answer() -> None:
    """A field that is added must be put into the fingerprint, or named here with its reason."""
    not_deciding = {
        "request_id", "traceparent", "deadline", "priority", "tenant", "model_id",  # no token
        "temperature_given", "reuse_policy",  # whether it is asked for at all
        "tenant_weight", "resumable",
        "attribution",  # the ledger's
        "rope_switch_len",  # the model's, which its fingerprint stands for
        "prompt_token_ids",  # exact alone; see below
        "seed",  # drawn where the client gave none, else equal to shareable_seed
        "sampling", "stop",  # by their fields
        "n", "user",  # num_choices, sharing_domain
    }  # fmt: skip
    fields = {
        f.name for kind in (Job, Sampling, StopRules, Options) for f in dataclasses.fields(kind)
    }
    known = set(SAMPLING) | set(JOB_FIELDS) | set(STOP) | set(OPTION_FIELDS) | not_deciding
    assert fields - known == set()
    assert {f.name for f in dataclasses.fields(Subject)} - set(SUBJECT_FIELDS) == {
        "job", "prompt", "options",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(Conversation)} == {"messages", "template_kwargs"}


def test_compatibility_alone_is_equal_when_the_last_user_text_differs() -> None:
    other = of(prompt=asking("Name France's capital"), job=job(prompt_token_ids=(9, 8)))
    assert other.compatibility == of().compatibility
    assert other.exact != of().exact
    assert (of().text, other.text) == ("What is the capital of France?", "Name France's capital")


def test_compatibility_is_equal_when_the_limit_follows_from_the_prompts_length() -> None:
    open_ended = dataclasses.replace(OPTIONS, stop=StopRules())
    one = of(options=open_ended, job=job(max_tokens=240))
    two = of(options=open_ended, job=job(max_tokens=230), prompt=asking("Longer question?"))
    assert one.compatibility == two.compatibility
    assert one.exact != two.exact


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "another"},
        {"traceparent": "00-1-2-01"},
        {"seed": 99},
        {"deadline": 5.0},
        {"priority": Priority.LOW},
    ],
)
def test_fingerprints_are_equal_when_the_answer_would_be(changes: dict[str, Any]) -> None:
    assert of(job=job(**changes)) == of()


@pytest.mark.parametrize(
    "prompt",
    [
        "a raw prompt",
        (1, 2, 3),
        Conversation((SYSTEM, {"role": "assistant", "content": "Paris is"})),
        asking("   "),
    ],
)
def test_prompt_without_a_last_user_text_has_no_semantic_tier(prompt: Any) -> None:
    found = of(prompt=prompt)
    assert found.text == ""
    assert found.compatibility != of(prompt=prompt, job=job(prompt_token_ids=(4,))).compatibility


def test_template_that_refuses_a_blank_text_closes_the_semantic_tier() -> None:
    found = fingerprints(SUBJECT, lambda conversation: None)
    assert found.text == ""
    assert found.exact == of().exact
    assert found.compatibility != of().compatibility


def test_what_the_template_adds_is_part_of_both() -> None:
    tomorrow = fingerprints(SUBJECT, lambda c: rendered(c) + "Today is Friday.")
    assert tomorrow.compatibility != of().compatibility


def test_text_that_no_utf8_can_hold_has_a_fingerprint() -> None:
    assert of(prompt=asking("half \ud83d")).text == "half \ud83d"
