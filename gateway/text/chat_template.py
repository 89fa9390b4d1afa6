"""Conversations to prompt text through a model's Jinja template, as transformers renders it
(transformers/utils/chat_template_utils.py). Templates are foreign code: they run sandboxed.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from infermesh.errors import InvalidRequest, UnsupportedParameter

Message = Mapping[str, Any]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here it only passes its body on."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template with the special tokens that it may name.

    Raises:
        jinja2.TemplateSyntaxError: the source is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], extra: Mapping[str, Any] | None = None) -> str:
        """The prompt text, ending where the assistant is to speak.

        Args:
            extra: the client's `chat_template_kwargs`, such as enable_thinking.

        Raises:
            InvalidRequest: the template refuses these messages, and says why.
        """
        names: dict[str, Any] = {**self._special_tokens, **(extra or {})}
        # None would be printed as "None" where a missing key is handled
        present = [{k: v for k, v in message.items() if v is not None} for message in messages]
        names |= {"messages": present, "tools": None, "documents": None}
        names["add_generation_prompt"] = True
        try:
            return self._template.render(names)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as exc:
            raise InvalidRequest(
                f"messages don't fit the model's chat template: {exc}", param="messages"
            ) from exc


def template_source(manifest_source: str, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template of a model: its own file first, then tokenizer_config.json's, where several
    may be named: as a mapping, or as a list of {name, template}. None where there is none.
    """
    if manifest_source:
        return manifest_source
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        found = {item["name"]: item["template"] for item in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) and found else None


def no_template(model_id: str) -> UnsupportedParameter:
    """The refusal of a chat with a model that has no template."""
    return UnsupportedParameter(
        f"messages can't be given to {model_id}: it has no chat template; use /v1/completions",
        param="messages",
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML characters, which models were not trained on
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(style: str) -> str:
    return datetime.datetime.now().strftime(style)
