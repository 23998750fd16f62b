"""The LUKS2 header of an image: its passphrase changed, its backup taken and restored, its facts told."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plugin.errors import EbiError, Kind, invalid, not_found, precondition
from plugin.images.image import BackingImage
from plugin.images.manifest import Spec
from plugin.images.store import Images
from plugin.luks import backup, header, keyslots, metadata
from plugin.luks.parameters import SecretParameters


def rekey(
    images: Images,
    name: str,
    old: Mapping[str, bytes],
    new: Mapping[str, bytes],
    secret: tuple[str, str],
    *,
    keep_old: bool = False,
    users: Sequence[str] = (),
) -> BackingImage:
    """Change the passphrase of the image `name` from the Secret data `old` to `new`, named `secret` (namespace, name).

    The old or the new opens at every instant; after a kill, the same call again finishes. The volume key stays. The
    volumes `users`, which `new` does not open, need `keep_old`, which leaves the old passphrase in.
    Raises NOT_FOUND, BUSY, INVALID when neither opens the image, PRECONDITION for an image that is not encrypted or in
    use.
    """
    if users and not keep_old:
        raise precondition(
            f"cannot take the old passphrase from backing image {name} since there are volumes using it:"
            f" {', '.join(sorted(users))}",
            "one secret opens both; keep the old one too (--keep-old), and ebi volume rekey those",
        )
    with images.changing(name) as (image, save):
        _check_encrypted(image)
        was = SecretParameters.from_data(old, f"{image.described} (old secret)")
        wanted = SecretParameters.from_data(new, f"{image.described} (new secret)")
        if not image.header_path.exists():
            backup.save(image.path, image.header_path, image.described)
        # From here on the file is another one, and its SHA-512 with it.
        save(image.changed(checksum=""))
        keyslots.change(image.path, was.passphrase, wanted, image.described, keep_old=keep_old)
        backup.save(image.path, image.header_path, image.described)  # or the old passphrase would go on in it
        changed = replace(image, spec=_under(image.spec, *secret)).changed(checksum="")
        changed = changed.noted(f"rekeyed: the secret is now {'/'.join(secret)}")
        save(changed)
        return changed


def save_backup(images: Images, name: str, file: Path) -> None:
    """Write the header of the image `name` to `file`, mode 0600. Raises NOT_FOUND, PRECONDITION, INVALID."""
    with images.ready(name) as image:
        _check_encrypted(image)
        backup.save(image.path, file, image.described)


def restore(images: Images, name: str, file: Path | None = None) -> BackingImage:
    """Put the header in `file`, or in the backup beside the image, back; with it come the passphrases it had.

    An image that has failed for its header stays so until it is verified.
    Raises NOT_FOUND, PRECONDITION, and INVALID for the header of another device.
    """
    with images.changing(name, damaged=True) as (image, save):
        _check_encrypted(image)
        source = file or image.header_path
        if not source.exists():
            raise not_found(f"there is no header backup {source} for {image.described}", "name one")
        backup.restore(source, image.path, image.described, _known(image))
        if file:
            backup.save(image.path, image.header_path, image.described)
        changed = image.changed(checksum="").noted(f"its header was restored from {source}")
        if not image.ready:
            changed = changed.changed(message=f"its header was restored; now ebi image verify {name}")
        save(changed)
        return changed


def show(images: Images, name: str) -> dict[str, Any]:
    """The facts in the header of the image `name`; `damaged` names its copies that are not whole.

    Raises NOT_FOUND, PRECONDITION for an image that is not encrypted, INVALID when no copy is whole.
    """
    with images.ready(name) as image:
        _check_encrypted(image)
        found = header.read(image.path)
        return {
            "uuid": found.uuid,
            "label": found.label,
            "cipher": found.cipher,
            "keySize": found.key_size,
            "sectorSize": found.sector_size,
            "payloadOffset": found.payload_offset,
            "damaged": metadata.damaged(image.path),
            "backup": str(image.header_path) if image.header_path.exists() else "",
            "keyslots": [
                {
                    "number": slot.number,
                    "cipher": slot.cipher,
                    "keySize": slot.key_size,
                    "pbkdf": slot.pbkdf.type,
                    "iterations": slot.pbkdf.iterations,
                    "memoryKiB": slot.pbkdf.memory_kib,
                    "parallel": slot.pbkdf.parallel,
                }
                for slot in keyslots.listed(found)
            ],
        }


def _known(image: BackingImage) -> header.Header | None:
    """The header that the image has or, where it is damaged, had when its backup was taken."""
    for path in (image.path, image.header_path):
        try:
            return header.read(path)
        except (OSError, EbiError) as error:
            if isinstance(error, EbiError) and error.kind is not Kind.INVALID:
                raise
    return None


def _check_encrypted(image: BackingImage) -> None:
    if not image.encrypted:
        raise invalid(f"{image.described} is not encrypted", "it has no header and no passphrase")


def _under(spec: Spec, namespace: str, name: str) -> Spec:
    parameters = dict(spec.parameters)
    if "secret" in parameters:
        parameters |= {"secret": name, "secret-namespace": namespace}
    return replace(spec, parameters=parameters, secret=name, secret_namespace=namespace)
