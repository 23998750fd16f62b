"""Devices that another system attaches, such as /dev/longhorn/<volume>: used as they are, and formatted once at most.

That a device is blank does not prove that it is new: one whose backend fails may read as zeros too. So it is formatted
only where its context says that it never was, this node has not done it, and nothing is on it. The context of a volume
can't change, so what this node has formatted it marks, durably: before it begins, with the UUID that it will give, so
that what was cut short is known as its own; and when it has ended. See decision 073.
"""

import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from plugin.errors import EbiError, Kind, invalid, precondition
from plugin.host import blockdev
from plugin.host.files import private_directory, read_json, write_json
from plugin.luks import header
from plugin.volumes import assemble, filesystem, names, parameters
from plugin.volumes.assemble import Keys
from plugin.volumes.capability import Capability
from plugin.volumes.parameters import VolumeParameters
from plugin.volumes.stack import Stack, take_down

# The key of a volume's or publish's context that says "false" of a volume that was never formatted.
FORMATTED = "ebi/formatted"
# What else of a context is heeded; the rest is the other system's own.
_KNOWN = ("encrypted", "fsType", "mkfsParams", *parameters.FLAGS)


@dataclass(frozen=True)
class Context:
    """What the context of an attached volume says; `new`: that it was never formatted."""

    wanted: VolumeParameters
    new: bool


def parse(context: Mapping[str, str]) -> Context:
    """Read `context`. Raises INVALID."""
    wanted = parameters.parse({key: value for key, value in context.items() if key in _KNOWN})
    said = context.get(FORMATTED, "true").lower()
    if said not in ("true", "false"):
        raise invalid(f"invalid value {said!r} for {FORMATTED} in the volume's context", 'give "true" or "false"')
    return Context(wanted, said == "false")


@dataclass(frozen=True)
class Mark:
    """That this node began to format a device at `begun`, and whether it has `done` so; `uuid` is what it gives."""

    uuid: str
    begun: str
    done: bool = False


class Marks:
    """A file a volume, in `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, volume: str) -> Mark | None:
        """The volume's mark, if there is one."""
        value = read_json(self._root / f"{volume}.json")
        return Mark(**value) if value is not None else None

    def write(self, volume: str, mark: Mark) -> None:
        """Keep it, on the disk when this returns."""
        write_json(private_directory(self._root) / f"{volume}.json", asdict(mark))


@dataclass(frozen=True)
class Attached:
    """The attached `device` of `volume`."""

    volume: str
    device: Path
    context: Context
    marks: Marks

    @property
    def owner(self) -> str:
        """Its name for messages."""
        return f"{'encrypted ' if self.context.wanted.encrypted else ''}volume {self.volume}"

    def stack(self, keys: Keys, *, block: bool) -> Stack:
        """Its layers; a new device has got its LUKS2 header then.

        Raises INVALID and PRECONDITION for a device that holds what it should not.
        """
        wanted = self.context.wanted
        if not self._may_format():
            self._check()
        elif wanted.encrypted or not block:
            self._begin(keys, block=block)
        else:  # from now on somebody else writes there
            self._check()
            self.marks.write(self.volume, replace(_fresh(), done=True))
        return assemble.mapped(self.volume, self.device, keys, encrypted=wanted.encrypted, flags=wanted.flags)

    def finish(self, top: Path, capability: Capability) -> None:
        """Give a device that was begun its filesystem, on its uppermost device `top`, and say that it is formatted."""
        mark = self.marks.read(self.volume)
        if mark is None or mark.done or not self.context.new:
            return
        if not capability.block:
            wanted = self.context.wanted
            fs_type = capability.fs_type or wanted.fs_type or "ext4"
            filesystem.make(top, fs_type, [*filesystem.with_uuid(fs_type, mark.uuid), *wanted.mkfs_options])
        blockdev.flush(top)
        self.marks.write(self.volume, replace(mark, done=True))

    def _may_format(self) -> bool:
        """The context must say so each time: since this node has begun, another one may have formatted it."""
        mark = self.marks.read(self.volume)
        return self.context.new and (mark is None or not mark.done)

    def _begin(self, keys: Keys, *, block: bool) -> None:
        take_down(names.mappers(self.volume))  # half made by one that was cut short
        mark = self.marks.read(self.volume)
        found = blockdev.probe(self.device)
        # What was cut short before has begun on a blank device, and bears our UUID or none yet.
        ours = mark is not None and (found is None or found.uuid == mark.uuid)
        if not ours and (found is not None or not blockdev.is_blank(self.device)):
            what = found.type if found else "data of an unknown kind"
            raise precondition(
                f"volume {self.volume} is said to be new, but its device {self.device} holds {what}",
                f'set {FORMATTED}: "true" in its context if it was formatted; it is left as it is',
            )
        secret = keys.parameters() if self.context.wanted.encrypted else None
        if mark is None:
            mark = _fresh()
            self.marks.write(self.volume, mark)
        if secret is not None:
            small = block or blockdev.size(self.device) % 4096
            header.create(
                self.device,
                secret,
                os.urandom(secret.key_size // 8),
                sector_size=512 if small else 4096,
                owner=self.owner,
                step="format_volume",
                uuid=mark.uuid,
            )

    def _check(self) -> None:
        """Raise INVALID when the device does not hold what the volume is said to be, PRECONDITION when nothing."""
        found = blockdev.probe(self.device)
        is_luks = found is not None and found.type == "crypto_LUKS"
        if is_luks == self.context.wanted.encrypted:
            return
        if is_luks:
            raise self._refused("crypto_LUKS", "plain", 'give it encrypted: "true" and its secret', Kind.INVALID)
        mark = self.marks.read(self.volume)
        since = f"; this node formatted it at {mark.begun}, so its device is not what it was" if mark else ""
        what, kind = ("nothing that is known", Kind.PRECONDITION) if found is None else (found.type, Kind.INVALID)
        raise self._refused(
            what, "encrypted", f'only one whose context says {FORMATTED}: "false" is ever formatted{since}', kind
        )

    def _refused(self, found: str, sort: str, hint: str, kind: Kind) -> EbiError:
        text = f"unsupported disk encryption format {found} on {self.device} of {sort} volume {self.volume}"
        return EbiError(text, kind=kind, hint=hint)


def _fresh() -> Mark:
    return Mark(str(uuid.uuid4()), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
