"""Backups of LUKS2 headers: both copies of the metadata and the keyslots, everything in front of the payload.

The file has the form of cryptsetup's luksHeaderBackup, so either can restore what the other saved; what no keyslot uses
is a hole in it. With a passphrase it opens the payload: it is as secret as the device itself, and as old as its
passphrases.
"""

import os
from pathlib import Path

from plugin.errors import invalid
from plugin.host.files import Extent, sync_directory, write_exactly
from plugin.luks import metadata
from plugin.luks.metadata import Header

_MOST = 64 << 20  # bytes; cryptsetup's are 16 MiB


def save(path: Path, backup: Path, owner: str) -> Header:
    """Write the header of the LUKS2 file or device `path` to `backup`, mode 0600, whole or not at all.

    Where one copy of the metadata is damaged the backup has that too, and the whole one. Raises INVALID when none is.
    """
    found = metadata.read(path)
    partial = backup.with_name(f"{backup.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        _copy(path, partial, _areas(found, owner), os.O_CREAT | os.O_EXCL)
        os.truncate(partial, found.payload_offset)
        partial.replace(backup)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(backup.parent)
    return found


def restore(backup: Path, path: Path, owner: str, known: Header | None) -> Header:
    """Write the header in `backup` over that of `path`; the payload is not touched. Interrupted: do it again.

    `known` is a header that `owner` is known to have had; None if nothing is left to tell. Raises INVALID where
    `backup` holds no whole header, that of another device, or one that does not fit the file.
    """
    found = metadata.read(backup)
    areas = _areas(found, owner)
    if known and found.uuid != known.uuid:
        raise invalid(
            f"{backup.name} is the header of another device: its UUID is {found.uuid}, that of {owner} is {known.uuid}",
            "name the backup of this image",
        )
    if known and _payload(found, owner) != _payload(known, owner):
        raise invalid(
            f"the header in {backup.name} has another volume key or payload than {owner}",
            "it was made before the payload was encrypted anew",
        )
    if not backup.stat().st_size >= found.payload_offset < path.stat().st_size:
        raise invalid(f"the header in {backup.name} does not fit {owner}", "is the file complete?")
    _copy(backup, path, areas, 0)
    return found


def _payload(found: Header, owner: str) -> tuple[object, ...]:
    """What tells one volume key and payload from another."""
    try:
        return found.json["segments"], sorted(str(digest["digest"]) for digest in found.json["digests"].values())
    except (KeyError, TypeError, AttributeError):
        raise invalid(f"the LUKS2 header of {owner} makes no sense", "its digests are damaged") from None


def _areas(found: Header, owner: str) -> list[Extent]:
    """Where the header keeps something: its two copies and its keyslots; keyslots first, as they are restored."""
    try:
        areas = [slot["area"] for slot in found.json["keyslots"].values()]
        runs = [Extent(int(area["offset"]), int(area["size"])) for area in areas]
        # A copy of the metadata is a binary header of 4096 bytes and the JSON area; the second follows the first.
        runs.append(Extent(0, 2 * (4096 + int(found.json["config"]["json_size"]))))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        runs = []
    if not runs or any(run.start < 0 or run.length < 0 or run.end > min(found.payload_offset, _MOST) for run in runs):
        raise invalid(f"the LUKS2 header of {owner} makes no sense", "its keyslots lie outside of it")
    return runs


def _copy(source: Path, target: Path, runs: list[Extent], flags: int) -> None:
    to = os.open(target, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
    try:
        with source.open("rb") as file:
            for run in runs:
                file.seek(run.start)
                write_exactly(to, file.read(run.length), run.start)
                os.fsync(to)
    finally:
        os.close(to)
