"""The keyslots of a LUKS2 header: told, added, removed, and a passphrase changed by doing both in the safe order."""

import os
from dataclasses import dataclass
from pathlib import Path

from plugin.errors import EbiError, Kind, exhausted
from plugin.host.run import CommandError, run, secret_fd
from plugin.luks import header, metadata
from plugin.luks.derivation import deriving
from plugin.luks.metadata import Header, pbkdf_of
from plugin.luks.parameters import Pbkdf, SecretParameters

_MOST = 32  # LUKS2_KEYSLOTS_MAX of cryptsetup


@dataclass(frozen=True)
class Keyslot:
    """One keyslot: `cipher` and `key_size` (bits) guard the volume key in it, `pbkdf` derives from the passphrase."""

    number: int
    cipher: str
    key_size: int
    pbkdf: Pbkdf


def listed(found: Header) -> list[Keyslot]:
    """The keyslots of a header that take a passphrase, by number. Raises INVALID where they make no sense."""
    try:
        slots = {int(number): slot for number, slot in found.json["keyslots"].items() if slot["type"] == "luks2"}
        return [
            Keyslot(
                number, str(slot["area"]["encryption"]), 8 * int(slot["area"]["key_size"]), pbkdf_of(slot["kdf"])
            )
            for number, slot in sorted(slots.items())
        ]  # fmt: skip
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise EbiError(
            f"the keyslots of the LUKS2 header {found.uuid} make no sense",
            kind=Kind.INVALID,
            hint="restore it from its backup",
        ) from None


def change(path: Path, old: bytes, new: SecretParameters, owner: str, *, keep_old: bool = False) -> None:
    """Have the passphrase of `new`, at the cost that it says, open the LUKS2 file `path`, and `old` no longer.

    The new keyslot is on the disk before the old one goes, so that one of both opens at every instant; interrupted,
    the same call again finishes. Other passphrases stay. The volume key is the same as before: whoever has a copy of
    the old header can open the payload with the old passphrase. `keep_old` leaves it in. Raises INVALID when neither
    of the two opens `owner`.
    """
    kept = _slot_of(path, new, owner)
    if kept is None:
        kept = _add(path, old, new, owner)
        _sync(path)
    if keep_old:
        return
    for slot in listed(header.read(path)):
        if slot.number != kept and opens(path, slot.number, old, owner):
            _remove(path, slot.number, owner)
    _sync(path)


def opens(path: Path, number: int, passphrase: bytes, owner: str) -> bool:
    """Whether the passphrase opens the keyslot `number`; costs its derivation. Raises as `header.volume_key` does."""
    try:
        header.test_passphrase(path, passphrase, owner, slot=number)
    except EbiError as error:
        if error.kind is Kind.INVALID:
            return False
        raise
    return True


def _slot_of(path: Path, wanted: SecretParameters, owner: str) -> int | None:
    """The keyslot that `wanted` would make, if it is there."""
    # Not the parallelism, nor all of the memory: cryptsetup takes less on a smaller machine.
    cost = (wanted.pbkdf.type, wanted.pbkdf.iterations)
    slots = listed(header.read(path))
    candidates = [slot.number for slot in slots if (slot.pbkdf.type, slot.pbkdf.iterations) == cost]
    return next((number for number in candidates if opens(path, number, wanted.passphrase, owner)), None)


def _add(path: Path, old: bytes, new: SecretParameters, owner: str) -> int:
    used = {int(number) for number in header.read(path).json["keyslots"]}
    number = next((number for number in range(_MOST) if number not in used), None)
    if number is None:
        raise exhausted(f"all {_MOST} keyslots of {owner} are in use", "remove one with cryptsetup luksKillSlot")
    # The old passphrase opens the volume key, then the new one derives its own: one after the other.
    costs = [*metadata.costs(path), new.pbkdf]
    with deriving(costs), secret_fd(new.passphrase) as fd:
        argv = ["cryptsetup", "luksAddKey", *header.NO_QUESTIONS, "--type", "luks2", "--key-file", "-"]
        argv += [*new.pbkdf.arguments(), "--hash", new.hash, "--key-slot", str(number)]
        try:
            run([*argv, "--", str(path), f"/proc/self/fd/{fd}"], stdin=old, fds=(fd,))
        except CommandError as error:
            raise header.explained(error, owner, f"cannot add a keyslot to {owner}") from error
    return number


def _remove(path: Path, number: int, owner: str) -> None:
    argv = ["cryptsetup", "luksKillSlot", *header.NO_QUESTIONS, "--type", "luks2", "--", str(path), str(number)]
    try:
        run(argv)
    except CommandError as error:
        raise header.explained(error, owner, f"cannot remove the keyslot {number} of {owner}") from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
