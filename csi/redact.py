"""Messages as they may be logged: what the descriptors mark as secret is struck out, and mount flags with it."""

import json
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi.stubs import csi_pb2

# Generated code is typed too loosely here for mypy.
_SECRET: Any = csi_pb2.csi_secret
_STRUCK = "***stripped***"
# The specification does not mark them, but says that they may hold sensitive information.
_FLAGS = "csi.v1.VolumeCapability.MountVolume.mount_flags"


def redacted(message: Message) -> str:
    """The message in one line of JSON, without its secrets. The message itself stays as it is."""
    return json.dumps(_plain(message), default=str)


def without_secrets(text: str, request: Message) -> str:
    """`text`, which may quote anything, without the values that `request` carries as secrets."""
    for secret in sorted(set(_secrets(request)), key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1], secret.strip()):
            text = text.replace(form, _STRUCK) if form else text
    return text


def _plain(message: Message) -> dict[str, Any]:
    return {field.name: _STRUCK if _is_secret(field) else _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> Any:
    if _is_map(field):
        return {str(key): _one(field, item) for key, item in sorted(value.items())}
    return [_one(field, item) for item in value] if field.is_repeated else _one(field, value)


def _one(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Message):
        return _plain(value)
    known = field.enum_type.values_by_number.get(value) if field.enum_type is not None else None
    return known.name if known is not None else value


def _secrets(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        is_map = _is_map(field)
        values = list(value.values()) if is_map else list(value) if field.is_repeated else [value]
        for one in values:
            if _is_secret(field):
                yield str(one)
            elif isinstance(one, Message):
                yield from _secrets(one)


def _is_secret(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[_SECRET]) or field.full_name == _FLAGS


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
