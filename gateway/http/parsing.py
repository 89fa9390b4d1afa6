"""Body bytes to a pydantic model, with OpenAI's words for what is wrong in them; and which fields
are known but not served, or not known at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from infermesh.errors import InvalidRequest, UnsupportedParameter

Body = TypeVar("Body", bound=BaseModel)
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
_MAX_NAMED = 20
_MAX_VALUE_CHARS = 60


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """The body as a model.

    Raises:
        InvalidRequest: it is no JSON, or a field is missing or of the wrong type.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as exc:
        raise _refusal(exc.errors(include_url=False, include_context=False)) from None


def _refusal(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    first = errors[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['msg']}")
    location = first["loc"]
    if not location:
        return InvalidRequest("the body must be a JSON object")
    param = _field(location)
    if first["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    wanted = " or ".join(dict.fromkeys(_wanted(e) for e in errors if _field(e["loc"]) == param))
    return InvalidRequest(f"{param} is {_shown(first['input'])}; {wanted}", param=param)


def _wanted(error: Mapping[str, Any]) -> str:
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def _field(location: tuple[int | str, ...]) -> str:
    """`messages[0].role`; the names that pydantic adds for branches of a union are left out."""
    path = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}"
        else:
            break
    return path


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "…"


def token_id_key(key: str) -> int:
    """logit_bias' keys are token ids in strings."""
    if not _TOKEN_ID.fullmatch(key):
        raise InvalidRequest(
            f"logit_bias has the key {_shown(key)}; keys must be token ids", param="logit_bias"
        )
    return int(key)


def refuse_unserved(extra: Mapping[str, Any], harmless: Mapping[str, Sequence[Any]]) -> None:
    """Raises UnsupportedParameter for a known field whose value asks for what is not served.

    Args:
        harmless: each known but unserved field with the values that ask for nothing.
    """
    for name, value in extra.items():
        if name not in harmless or value is None or value in harmless[name]:
            continue
        raise UnsupportedParameter(f"{name} is not supported by this server", param=name)


def ignored_fields(extra: Mapping[str, Any], known: Mapping[str, object]) -> str:
    """Names of fields that nobody knows, for a response header; empty where there are none."""
    unknown = [n for n in extra if n not in known and _HEADER_SAFE.fullmatch(n)]
    return ", ".join(unknown[:_MAX_NAMED])
