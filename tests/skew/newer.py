"""Messages as a later version may send them: any fields, enum numbers that do not exist yet, fields
and kinds that this version does not know.
"""

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

UNKNOWN_ENUM = 900
# Field 15000 with three bytes, as a length-delimited field; no message of ours has that number.
UNKNOWN_FIELD = b"\xc2\xa9\x07\x03new"
_MAX_DEPTH = 5

_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(0, 3),
    FieldDescriptor.CPPTYPE_INT64: st.integers(0, 3),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 3),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 3),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([0.0, 0.5]),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from([0.0, 0.5]),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(["", "a"]),
}


def messages(kind: Descriptor) -> st.SearchStrategy[Message]:
    """Any message of a kind."""

    @st.composite
    def build(draw: Callable[..., Any]) -> Message:
        return _filled(draw, kind, 0)

    return build()


def has_choices(kind: Descriptor) -> bool:
    """Somewhere in it stands an enum or a oneof, to which a later version may add."""
    return any(
        field.enum_type is not None
        or (field.containing_oneof is not None and len(field.containing_oneof.fields) > 1)
        or (_is_own(field) and has_choices(field.message_type))
        for field in kind.fields
    )


def _is_own(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.full_name.startswith("infermesh.")


def _filled(draw: Callable[..., Any], kind: Descriptor, depth: int) -> Message:
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if depth < _MAX_DEPTH and draw(st.booleans()):
            values = [_value(draw, field, depth) for _ in range(draw(st.integers(1, 2)))]
            _set(message, field, values)
    if draw(st.booleans()):
        message.MergeFromString(UNKNOWN_FIELD)
    return message


def _value(draw: Callable[..., Any], field: FieldDescriptor, depth: int) -> Any:
    if field.message_type is not None:
        if _is_own(field):
            return _filled(draw, field.message_type, depth + 1)
        return GetMessageClass(field.message_type)()  # a duration of nothing
    if field.enum_type is not None:
        return draw(st.sampled_from([UNKNOWN_ENUM, *field.enum_type.values_by_number]))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.sampled_from([b"", b"a"]))
    return draw(_SCALARS[field.cpp_type])


def _set(message: Message, field: FieldDescriptor, values: list[Any]) -> None:
    if field.is_repeated:
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return  # of plain values: nothing that could be unknown
        target.extend(values)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(values[0])
    else:
        setattr(message, field.name, values[0])
