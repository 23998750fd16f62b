"""What comes over the wire, checked and in the driver's own types."""

from collections.abc import Iterable
from pathlib import Path

from csi.stubs import csi_pb2
from plugin.errors import invalid, out_of_range, precondition
from plugin.volumes import AccessMode, Capability

_MODES = csi_pb2.VolumeCapability.AccessMode.Mode
# Which of them a volume of one node can have.
_POSSIBLE = frozenset(mode for mode in AccessMode if mode.value.startswith("SINGLE_NODE"))


def required(value: str, field: str) -> str:
    """`value`, which must be there. Raises INVALID naming the field."""
    if not value:
        raise invalid(f"{field} is missing", "the caller must give it")
    return value


def path(value: str, field: str) -> Path:
    """A path, there; which ones may be used is the driver's business."""
    return Path(required(value, field))


def staging_path(value: str) -> Path:
    """The staging path of a publish: its absence is a wrong state, not a bad request."""
    if not value:
        raise precondition("staging_target_path is missing", "this driver stages volumes: call NodeStageVolume first")
    return Path(value)


def capability(wire: csi_pb2.VolumeCapability, present: bool) -> Capability:
    """One capability. Raises INVALID when it is missing or says too little."""
    if not present:
        raise invalid("volume_capability is missing", "the caller must give it")
    kind = wire.WhichOneof("access_type")
    if kind is None:
        raise invalid("volume_capability names no access type", "give block or mount")
    access = AccessMode[_MODES.Name(wire.access_mode.mode)]
    if access is AccessMode.UNKNOWN:
        raise invalid("volume_capability names no access mode", "give one, such as SINGLE_NODE_WRITER")
    return Capability(
        block=kind == "block",
        fs_type=wire.mount.fs_type,
        mount_flags=tuple(wire.mount.mount_flags),
        access=access,
        mount_group=wire.mount.volume_mount_group,
    )


def capabilities(wire: Iterable[csi_pb2.VolumeCapability]) -> list[Capability]:
    """Several, at least one. Raises INVALID."""
    found = [capability(one, present=True) for one in wire]
    if not found:
        raise invalid("volume_capabilities are missing", "give at least one")
    return found


def why_impossible(wanted: Iterable[Capability]) -> str:
    """Why a volume of this driver can't be used like that; empty where it can."""
    for one in wanted:
        if one.access not in _POSSIBLE:
            return f"access mode {one.access.value} is not to be had: a volume is on one node"
    return ""


def capacity(wire: csi_pb2.CapacityRange) -> tuple[int, int]:
    """Bytes: at least, at most; 0 leaves an end open. Raises OUT_OF_RANGE for what no size can be."""
    least, most = wire.required_bytes, wire.limit_bytes
    if least < 0 or most < 0 or (most and least > most):
        raise out_of_range(f"no size is at least {least} and at most {most} bytes", "give a range that holds a size")
    return least, most
