"""Which layers a volume has, and how its LUKS devices are opened."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from plugin import events
from plugin.images.image import BackingImage
from plugin.luks import header, mapping
from plugin.luks.flags import NONE, Flags
from plugin.luks.parameters import SecretParameters
from plugin.volumes import imagemap, names, parameters
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
    flags = parameters.flags(record.parameters)
    top, below = names.top(record.id), FileBacking(record.path, discards=flags.discards)
    own = top if image is None else names.store(record.id)

    def unlock(device: Path) -> None:
        secret = keys.parameters()
        if not fresh:
            _open(device, own, secret, record.described)
            return
        key = os.urandom(secret.key_size // 8)
        source = header.read(image.disk) if image is not None else None
        sector_size = source.sector_size if source else 512 if block else 4096
        # The image's cost of a key derivation is taken over, so that none need be measured.
        cost = source.pbkdf if source else None
        header.create(
            record.path,
            secret,
            key,
            sector_size=sector_size,
            owner=record.described,
            cost=cost,
            step="format_volume",
        )
        with events.step("unlock_volume"):
            mapping.open_with_key(device, own, key, record.described, flags=flags.arguments())

    lowest: Layer = Crypt(own, below, unlock) if record.encrypted else Linear(own, below)
    if image is None:
        return Stack([lowest])
    base = Base(
        names.base(record.id),
        names.image(image.uuid),
        lambda: imagemap.opened(image, keys.parameters().passphrase if image.encrypted else b"", check=fresh),
        image.extents,
        image.virtual_size,
        record.covered,
    )
    return Stack([base, lowest, Snapshot(top, base.name, own, record.covered, record.capacity, record.chunk, fresh)])


def mapped(volume_id: str, device: Path, keys: Keys, *, encrypted: bool, flags: Flags = NONE) -> Stack:
    """The stack of a volume that another system attaches as `device`: LUKS2 if `encrypted`, else as it is.

    `flags` are written into the header where they are not in it yet.
    """
    top, backing = names.top(volume_id), DeviceBacking(device)

    def unlock(opened: Path) -> None:
        kept = header.read(opened).json["config"].get("flags", []) if flags.names else ()
        _open(opened, top, keys.parameters(), f"encrypted volume {volume_id}", flags.arguments(kept))

    return Stack([Crypt(top, backing, unlock) if encrypted else Linear(top, backing)])


def _open(device: Path, name: str, parameters: SecretParameters, owner: str, options: Sequence[str] = ()) -> None:
    mapping.open_with_passphrase(device, name, parameters.passphrase, owner, flags=options, step="unlock_volume")
