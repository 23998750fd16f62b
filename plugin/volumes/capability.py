"""How a volume is to be used: CSI's VolumeCapability, without the wire."""

from dataclasses import dataclass
from enum import Enum

from plugin.errors import invalid

FILESYSTEMS = ("ext4", "xfs", "btrfs")


class AccessMode(Enum):
    """CSI's access modes, by its names."""

    UNKNOWN = "UNKNOWN"
    SINGLE_NODE_WRITER = "SINGLE_NODE_WRITER"
    SINGLE_NODE_READER_ONLY = "SINGLE_NODE_READER_ONLY"
    MULTI_NODE_READER_ONLY = "MULTI_NODE_READER_ONLY"
    MULTI_NODE_SINGLE_WRITER = "MULTI_NODE_SINGLE_WRITER"
    MULTI_NODE_MULTI_WRITER = "MULTI_NODE_MULTI_WRITER"
    SINGLE_NODE_SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"
    SINGLE_NODE_MULTI_WRITER = "SINGLE_NODE_MULTI_WRITER"

    @property
    def reads_only(self) -> bool:
        """Whether nobody may write."""
        return self in (AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY)

    @property
    def one_path(self) -> bool:
        """Whether it may be published at one path of a node only."""
        return self in (AccessMode.SINGLE_NODE_WRITER, AccessMode.SINGLE_NODE_SINGLE_WRITER)


# Options that would mount something else, somewhere else, or change who may: not a user's to give.
_DENIED_NAMES = """
    bind rbind move rmove remount shared rshared slave rslave private rprivate unbindable runbindable
    loop offset sizelimit encryption helper uhelper suid dev user users owner group fscontext rootcontext defcontext
    device journal_path journal_dev logdev rtdev fatal_errors
"""
# Whole options: they would let a broken filesystem take the node down.
_DENIED_OPTIONS = frozenset({"errors=panic"})
# libmount's own: it would make directories, or open files of the node as dm-verity devices.
_DENIED_PREFIXES = ("x-", "verity.")
_DENIED = frozenset(_DENIED_NAMES.split())
_LAST_GROUP = (1 << 32) - 2  # the one behind it means "leave it" to chown(2)


@dataclass(frozen=True)
class Capability:
    """Raw block, or a filesystem of the type `fs_type` ("" for whichever is there) mounted with `mount_flags`.

    `mount_group` is the group id that the files shall belong to, "" for as they are.
    """

    block: bool = False
    fs_type: str = ""
    mount_flags: tuple[str, ...] = ()
    access: AccessMode = AccessMode.SINGLE_NODE_WRITER
    mount_group: str = ""

    @property
    def reads_only(self) -> bool:
        """Whether nothing shall be written: by its access mode, or by its mount options."""
        return self.access.reads_only or (not self.block and "ro" in self.options)

    @property
    def group(self) -> int | None:
        """The mount group as a number; None for none. Raises INVALID for what is no group id."""
        text = self.mount_group
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _LAST_GROUP):
            raise invalid(f"invalid volume_mount_group {text!r}", f"give a group id from 0 to {_LAST_GROUP}")
        return int(text)

    @property
    def options(self) -> tuple[str, ...]:
        """Its mount options, one each."""
        return tuple(option for flag in self.mount_flags for option in flag.split(",") if option)

    def check(self) -> None:
        """Raise INVALID naming a filesystem, a mount option or a group that is not to be had."""
        _ = self.group
        if self.fs_type not in ("", *FILESYSTEMS):
            raise invalid(f"unsupported filesystem {self.fs_type!r}", f"use one of {', '.join(FILESYSTEMS)}")
        for option in self.options:
            name = option.partition("=")[0].strip().lower()
            if name in _DENIED or name.startswith(_DENIED_PREFIXES) or option.strip().lower() in _DENIED_OPTIONS:
                raise invalid(f"the mount option {name!r} is not allowed", "take it out of mountOptions")
