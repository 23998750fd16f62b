"""Which layers a volume has, and how its LUKS devices are opened."""

import os
from collections.abc import Mapping
from pathlib import Path

from plugin import events
from plugin.errors import EbiError, precondition
from plugin.host import blockdev
from plugin.images import BackingImage
from plugin.luks import header, mapping
from plugin.luks.parameters import SecretParameters
from plugin.volumes import imagemap, names
from plugin.volumes.layers import Base, Crypt, DeviceBacking, FileBacking, Layer, Linear, Snapshot
from plugin.volumes.record import Volume
from plugin.volumes.stack import Stack


class Keys:
    """The node-stage secret, read when a layer has to be opened, so that what is open already needs none."""

    def __init__(self, secrets: Mapping[str, str], owner: str) -> None:
        self._secrets = secrets
        self._owner = owner

    def parameters(self) -> SecretParameters:
        """Raises INVALID when the secret is missing or wrong, in words about the owner."""
        return SecretParameters.from_data(self._secrets, self._owner)


def volume(record: Volume, image: BackingImage | None, keys: Keys, *, block: bool = False) -> Stack:
    """The stack of a volume of ours; `image` is the one it starts from. One never formatted is formatted on the way.

    `block` says that its first use is as a raw device.
    """
    fresh = not record.formatted
    top, below = names.top(record.id), FileBacking(record.path)
    own = top if image is None else names.store(record.id)

    def unlock(device: Path) -> None:
        parameters = keys.parameters()
        if not fresh:
            _open(device, own, parameters, record.described)
            return
        key = os.urandom(parameters.key_size // 8)
        source = header.read(image.disk) if image is not None else None
        sector_size = source.sector_size if source else 512 if block else 4096
        # The image's cost of a key derivation is taken over, so that none need be measured.
        cost = source.pbkdf if source else None
        header.create(
            record.path,
            parameters,
            key,
            sector_size=sector_size,
            owner=record.described,
            cost=cost,
            step="format_volume",
        )
        with events.step("unlock_volume"):
            mapping.open_with_key(device, own, key, record.described)

    lowest: Layer = Crypt(own, below, unlock) if record.encrypted else Linear(own, below)
    if image is None:
        return Stack([lowest])
    base = Base(
        names.base(record.id),
        names.image(image.uuid),
        lambda: imagemap.opened(image, keys.parameters().passphrase if image.encrypted else b"", check=fresh),
        image.extents,
        image.virtual_size,
        record.capacity,
    )
    return Stack([base, lowest, Snapshot(top, base.name, own, record.capacity, record.chunk, fresh)])


def attached(volume_id: str, device: Path, keys: Keys, *, encrypted: bool) -> Stack:
    """The stack of a volume that another system attaches as `device`: LUKS2 if `encrypted`, else as it is.

    Raises PRECONDITION when the device holds something else, or nothing: it is never formatted here.
    """
    found = blockdev.probe(device)
    what = "nothing that is known" if found is None else found.type
    if not encrypted and found is not None and found.type == "crypto_LUKS":
        raise _refused(volume_id, device, what, "plain", 'give it encrypted: "true" and its secret')
    if encrypted and (found is None or found.type != "crypto_LUKS"):
        # That it reads as zeros would not prove that it is new: a degraded one may read so, too.
        raise _refused(volume_id, device, what, "encrypted", "it is not formatted unless it is known to be new")
    return mapped(volume_id, device, keys, encrypted=encrypted)


def mapped(volume_id: str, device: Path, keys: Keys, *, encrypted: bool) -> Stack:
    """The same, for a device that need not be looked at."""
    top, backing = names.top(volume_id), DeviceBacking(device)

    def unlock(opened: Path) -> None:
        _open(opened, top, keys.parameters(), f"encrypted volume {volume_id}")

    return Stack([Crypt(top, backing, unlock) if encrypted else Linear(top, backing)])


def _refused(volume_id: str, device: Path, found: str, sort: str, hint: str) -> EbiError:
    return precondition(f"unsupported disk encryption format {found} on {device} of {sort} volume {volume_id}", hint)


def _open(device: Path, name: str, parameters: SecretParameters, owner: str) -> None:
    mapping.open_with_passphrase(device, name, parameters.passphrase, owner, step="unlock_volume")
