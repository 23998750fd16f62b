"""The specification's size limits, checked for every field of every request by its descriptor."""

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from plugin.errors import EbiError, invalid

# Bytes ("Size Limits" in the specification, and what single fields say instead).
_STRING = 128
_MAP = 4096
_NODE_ID = 256
_FLAGS = 4096  # all mount flags together
_PATH = 4095  # PATH_MAX of Linux, without the byte that ends it


def check(message: Message) -> None:
    """Raise INVALID naming the first field of `message` that is too long or holds a NUL byte; never its value."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            parts = [text for item in value.items() for text in item]
            _check(field, _MAP, parts)
        elif field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                check(one)
        elif field.type == FieldDescriptor.TYPE_STRING and field.is_repeated:
            _check(field, _FLAGS, value)
        elif field.type == FieldDescriptor.TYPE_STRING:
            _check(field, _limit(field.name), [value])


def _limit(name: str) -> int:
    if name.endswith("_path"):
        return _PATH
    return _NODE_ID if name == "node_id" else _STRING


def _check(field: FieldDescriptor, limit: int, parts: list[str]) -> None:
    if sum(len(part.encode()) for part in parts) > limit:
        raise _bad(field, f"holds more than {limit} bytes")
    if any("\0" in part for part in parts):
        raise _bad(field, "holds a NUL byte")


def _bad(field: FieldDescriptor, what: str) -> EbiError:
    return invalid(f"{field.name} {what}", "see the size limits in the CSI specification")
