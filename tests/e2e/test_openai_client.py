"""The official OpenAI client, unmodified, against a mesh of separate processes."""

import openai
import pytest

from tests.e2e.mesh_process import Mesh, wait_until

QUESTION = "What is the capital of France?"


def chat(mesh: Mesh, question: str = QUESTION, **options: object) -> dict[str, object]:
    """The arguments of a chat call."""
    message = {"role": "user", "content": question}
    return {"model": mesh.model, "messages": [message], "temperature": 0, **options}


def test_chat_answers_when_not_streamed(demo_mesh: Mesh) -> None:
    answer = demo_mesh.openai().chat.completions.create(**chat(demo_mesh))
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streams_the_same_text_with_usage_last(demo_mesh: Mesh) -> None:
    client = demo_mesh.openai()
    whole = client.chat.completions.create(**chat(demo_mesh))
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**chat(demo_mesh, stream=True, stream_options=options))
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_completion_accepts_text_and_token_ids_alike(demo_mesh: Mesh) -> None:
    client = demo_mesh.openai()
    text = "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n"
    by_text = client.completions.create(
        model=demo_mesh.model, prompt=text, temperature=0, max_tokens=20
    )
    ids = client.post("/../tokenize", body={"prompt": text}, cast_to=dict[str, list[int]])
    by_ids = client.completions.create(
        model=demo_mesh.model, prompt=ids["tokens"], temperature=0, max_tokens=20
    )
    assert "Rome" in by_text.choices[0].text
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.usage.prompt_tokens == len(ids["tokens"])


def test_completion_streams(demo_mesh: Mesh) -> None:
    chunks = list(
        demo_mesh.openai().completions.create(
            model=demo_mesh.model, prompt="Hello", max_tokens=8, stream=True, temperature=0
        )
    )
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_choices_are_distinct_and_counted_when_n_is_three(demo_mesh: Mesh) -> None:
    answer = demo_mesh.openai().chat.completions.create(
        **chat(
            demo_mesh, n=3, temperature=1.5, seed=7, max_tokens=12, extra_body={"ignore_eos": True}
        )
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 36


def test_logprobs_are_those_of_the_answer(demo_mesh: Mesh) -> None:
    answer = demo_mesh.openai().chat.completions.create(
        **chat(demo_mesh, logprobs=True, top_logprobs=3)
    )
    entries = answer.choices[0].logprobs.content
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert answer.choices[0].message.content in text
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy


def test_stop_string_ends_the_text_before_it(demo_mesh: Mesh) -> None:
    client = demo_mesh.openai()
    whole = client.chat.completions.create(**chat(demo_mesh)).choices[0].message.content
    word = whole.split()[-1]
    cut = client.chat.completions.create(**chat(demo_mesh, stop=[word])).choices[0]
    assert cut.message.content == whole[: whole.index(word)]
    assert cut.finish_reason == "stop"


def test_models_are_listed(demo_mesh: Mesh) -> None:
    client = demo_mesh.openai()
    assert [model.id for model in client.models.list()] == [demo_mesh.model]
    assert client.models.retrieve(demo_mesh.model).object == "model"


def test_wrong_model_is_not_found(demo_mesh: Mesh) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        demo_mesh.openai().chat.completions.create(**{**chat(demo_mesh), "model": "gpt-9"})
    assert caught.value.code == "model_not_found"
    assert "gpt-9" in caught.value.message


def test_too_long_prompt_is_refused_with_the_numbers(demo_mesh: Mesh) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        demo_mesh.openai().chat.completions.create(**chat(demo_mesh, "word " * 5000))
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
)
def test_bad_parameter_is_refused_by_name(
    demo_mesh: Mesh, options: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        demo_mesh.openai().chat.completions.create(**chat(demo_mesh, **options))
    assert caught.value.param == param
    assert param in caught.value.message


def blocks_used(mesh: Mesh) -> float:
    return mesh.metric("scheduler-0", "num_blocks_used")


def test_blocks_are_free_again_when_a_client_closes_in_mid_stream(demo_mesh: Mesh) -> None:
    stream = demo_mesh.openai().chat.completions.create(
        **chat(demo_mesh, stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    )
    next(iter(stream))
    wait_until(lambda: blocks_used(demo_mesh) > 0, 10)
    cancelled_at = demo_mesh.metric("scheduler-0", "steps_total")
    stream.close()
    wait_until(lambda: blocks_used(demo_mesh) == 0, 10)
    # a running 1,500-token generation would have gone on for far longer
    assert demo_mesh.metric("scheduler-0", "steps_total") < cancelled_at + 200
    assert demo_mesh.metric("scheduler-0", "num_requests_running") == 0


def test_seeded_sampling_repeats_itself(demo_mesh: Mesh) -> None:
    client = demo_mesh.openai()
    call = chat(demo_mesh, temperature=1.2, seed=42, max_tokens=24, extra_body={"ignore_eos": True})
    first, second = (client.chat.completions.create(**call) for _ in range(2))
    other = client.chat.completions.create(**{**call, "seed": 43})
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content
