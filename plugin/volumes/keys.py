"""The keys of a volume: its passphrase changed, and all of them destroyed."""

import os
from collections.abc import Mapping
from pathlib import Path

from plugin.errors import EbiError, Kind, invalid, precondition
from plugin.host.blockdev import MIB
from plugin.host.files import write_exactly
from plugin.luks import header, keyslots
from plugin.luks.parameters import SecretParameters
from plugin.volumes.node import Node
from plugin.volumes.record import LUKS_HEADER, Volume


def change(
    node: Node, record: Volume, old: Mapping[str, bytes], new: Mapping[str, bytes], *, keep_old: bool = False
) -> None:
    """As `Volumes.rekey` says; the volume's lock is held."""
    if not record.encrypted:
        raise invalid(f"{record.described} is not encrypted", "it has no passphrase")
    if not record.formatted:
        raise precondition(
            f"{record.described} has no passphrase yet", "it takes that of the secret with which it is first staged"
        )
    was = SecretParameters.from_data(old, f"{record.described} (old secret)")
    wanted = SecretParameters.from_data(new, f"{record.described} (new secret)")
    image = node.image(record)
    if image is not None and image.encrypted:
        try:
            header.test_passphrase(image.path, wanted.passphrase, image.described)
        except EbiError as error:
            if error.kind is not Kind.INVALID:
                raise
            raise precondition(
                f"the new passphrase does not open {image.described}, which {record.described} starts from",
                f"let it open that first: ebi image rekey {image.name} --keep-old",
            ) from error
    keyslots.change(record.path, was.passphrase, wanted, record.described, keep_old=keep_old)


def opens(record: Volume, secret: Mapping[str, bytes]) -> bool:
    """Whether the volume can be staged with the Secret data `secret`; one never formatted takes any."""
    if not record.encrypted or not record.formatted:
        return True
    parameters = SecretParameters.from_data(secret, record.described)
    try:
        header.test_passphrase(record.path, parameters.passphrase, record.described)
    except (EbiError, OSError) as error:
        if isinstance(error, EbiError) and error.kind is not Kind.INVALID:
            raise
        return False
    return True


def destroy(path: Path) -> None:
    """Overwrite the LUKS header and keyslots: without them nobody opens what the disk may keep of the rest."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        # Both copies of the header lie in the first MiB, the salts among them: without those a keyslot is noise.
        size = min(LUKS_HEADER, os.fstat(fd).st_size)
        for start, end in ((0, min(MIB, size)), (MIB, size)):
            write_exactly(fd, bytes(max(0, end - start)), start)
            os.fsync(fd)
    finally:
        os.close(fd)
