"""Encoding and chat templates agree with what transformers does with the same files."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import processors

from gateway.text.chat_template import ChatTemplate, template_source
from gateway.text.tokenizer import ModelText, load_tokenizer
from infermesh.errors import InvalidRequest, UnsupportedParameter
from tests.tiny_tokenizer import CHATML, EOS, byte_level, tokenizer_json

MESSAGES = [{"role": "user", "content": "Hello 😀"}]


def model_text(config: dict[str, object], template: str = CHATML) -> ModelText:
    return ModelText("tiny", tokenizer_json(byte_level()), config, template, ThreadPoolExecutor(1))


def test_named_token_is_made_special_when_tokenizer_json_has_it_as_text() -> None:
    tokenizer = load_tokenizer(tokenizer_json(byte_level()), {"eos_token": {"content": "<think>"}})
    assert tokenizer.decode(tokenizer.encode("a<think>b").ids) == "ab"


def test_bos_is_added_when_the_config_asks_for_it() -> None:
    config = {"bos_token": "<|endoftext|>", "add_bos_token": True, "add_eos_token": False}
    tokenizer = load_tokenizer(tokenizer_json(byte_level()), config)
    bos = tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.encode("Hello").ids[0] == bos
    assert bos not in tokenizer.encode("Hello", add_special_tokens=False).ids


def test_truncation_of_tokenizer_json_is_lifted() -> None:
    source = byte_level().from_str(byte_level().to_str())
    source.enable_truncation(2)
    loaded = load_tokenizer(tokenizer_json(source), {})
    assert len(loaded.encode("Hello world, how are you").ids) > 2


async def test_text_prompt_gets_special_tokens_and_chat_does_not() -> None:
    source = byte_level().from_str(byte_level().to_str())
    bos = source.token_to_id("<|endoftext|>")
    source.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    text = ModelText("tiny", tokenizer_json(source), {}, CHATML, ThreadPoolExecutor(1))
    assert (await text.encode("Hello"))[0] == bos
    assert bos not in await text.encode_chat(MESSAGES)


async def test_long_text_is_encoded_as_a_short_one() -> None:
    text = model_text({})
    words = "Hello world " * 400
    assert await text.encode(words) == byte_level().encode(words).ids
    chat = await text.encode_chat([{"role": "user", "content": words}])
    rendered = f"<|im_start|>user\n{words}{EOS}\n<|im_start|>assistant\n"
    assert chat == byte_level().encode(rendered).ids


async def test_chat_is_refused_by_name_when_the_model_has_no_template() -> None:
    with pytest.raises(UnsupportedParameter, match="tiny"):
        await model_text({}, "").encode_chat(MESSAGES)


@pytest.mark.parametrize(
    "found",
    [
        "T",
        {"default": "T", "tool_use": "U"},
        [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}],
    ],
)
def test_template_is_found_in_each_form_of_the_config(found: object) -> None:
    assert template_source("", {"chat_template": found}) == "T"


def test_template_of_its_own_file_comes_first() -> None:
    assert template_source("file", {"chat_template": "config"}) == "file"
    assert template_source("", {}) is None


def test_template_sees_special_tokens_and_extra_variables() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content | tojson }}{% if think %}T{% endif %}",
        {"bos_token": "<s>"},
    )
    assert template.render([{"role": "user", "content": "é<b>"}], {"think": True}) == '<s>"é<b>"T'


def test_template_blocks_are_trimmed_as_transformers_does() -> None:
    source = "  {% for m in messages %}\n{{ m.role }}\n  {% endfor %}\nend"
    assert ChatTemplate(source, {}).render(MESSAGES) == "user\nend"


def test_refusal_of_the_template_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(MESSAGES)
    assert caught.value.param == "messages"


def test_template_can_not_leave_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(InvalidRequest):
        template.render(MESSAGES)


def test_generation_blocks_pass_their_body_on() -> None:
    source = "{% generation %}{{ messages[0].role }}{% endgeneration %}"
    assert ChatTemplate(source, {}).render(MESSAGES) == "user"


def test_absent_content_is_no_text() -> None:
    template = ChatTemplate("{% if messages[0].name is defined %}named{% endif %}", {})
    assert template.render([{"role": "user", "content": "x", "name": None}]) == ""
