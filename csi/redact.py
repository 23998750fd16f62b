"""Messages as they may be logged: what the descriptors mark as secret is struck out, and mount flags with it."""

from typing import Any

from google.protobuf.message import Message

from csi.stubs import csi_pb2

# Generated code is typed too loosely here for mypy.
_SECRET: Any = csi_pb2.csi_secret
_STRUCK = "***stripped***"
# The specification does not mark them, but says that they may hold sensitive information.
_FLAGS = csi_pb2.VolumeCapability.MountVolume.DESCRIPTOR.fields_by_name["mount_flags"].full_name


def redacted(message: Message) -> str:
    """The message in one line, without its secrets. The message itself stays as it is."""
    copy = type(message)()
    copy.CopyFrom(message)
    _strike(copy)
    return " ".join(str(copy).split())


def _strike(message: Message) -> None:
    for field, value in message.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.GetOptions().Extensions[_SECRET] or field.full_name == _FLAGS:
            if is_map:
                for key in value:
                    value[key] = _STRUCK
            elif field.is_repeated:
                message.ClearField(field.name)
                getattr(message, field.name).append(_STRUCK)
            else:
                setattr(message, field.name, _STRUCK)
        elif field.message_type is not None and not is_map:
            for one in value if field.is_repeated else [value]:
                _strike(one)
