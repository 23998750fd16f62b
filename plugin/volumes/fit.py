"""Whether a new volume, its image and its size go together: asked before anything is made."""

import json

from plugin.errors import exists, invalid, out_of_range, precondition
from plugin.images.image import BackingImage, State
from plugin.images.manifest import Spec
from plugin.volumes import tables
from plugin.volumes.parameters import VolumeParameters
from plugin.volumes.record import GRAIN, Volume

DEFAULT_CAPACITY = 1 << 30
_XFS_LEAST = 300 << 20


def same(
    found: Volume, wanted: VolumeParameters, *, name: str, capacity: int, limit: int = 0, target: str = ""
) -> Volume:
    """`found`, if it is what is asked for. Raises EXISTS."""
    fits = found.capacity >= capacity and (not limit or found.capacity <= limit)
    if (found.name, found.ephemeral) != (name, target) or not fits or dict(found.parameters) != dict(wanted.given):
        raise exists(
            f"volume {found.id} exists with {found.capacity} bytes and parameters {json.dumps(dict(found.parameters))}",
            "delete it, or use another name",
        )
    return found


def capacity(
    wanted: VolumeParameters, image: BackingImage | None, *, asked: int, limit: int, block: bool, fs_type: str = ""
) -> int:
    """Bytes that the volume shall have. Raises OUT_OF_RANGE, and for the image as `check_image` does."""
    if image is not None:
        check_image(image, wanted)
    found = tables.round_up(asked or (image.virtual_size if image else DEFAULT_CAPACITY), GRAIN)
    if limit and found > limit:
        raise out_of_range(
            f"a volume of {found} bytes exceeds the limit of {limit}", "sizes are multiples of 4096 bytes"
        )
    if image is not None and found < image.virtual_size:
        raise out_of_range(
            f"volume size should be larger than the backing image size: {found} bytes are asked for, and"
            f" {image.name} has {image.virtual_size}",
            f"ask for at least {image.virtual_size} bytes",
        )
    if image is None and not block and (fs_type or wanted.fs_type) == "xfs" and found < _XFS_LEAST:
        raise out_of_range(f"{found} bytes are too few for xfs", f"ask for at least {_XFS_LEAST}, or for ext4")
    return found


def check_image(image: BackingImage, wanted: VolumeParameters) -> None:
    """Raise PRECONDITION for an image that is not ready, INVALID for one that the volume can't start from."""
    if not image.ready:
        why = image.status.message if image.status.state in (State.FAILED, State.UNKNOWN) else ""
        raise precondition(
            f"backing image {image.name} is not ready, but {image.status.state}",
            why or "wait until it is; see ebi get backingimages",
        )
    image.check_file()
    if image.encrypted != wanted.encrypted:
        have, ask = ("encrypted", "not encrypted") if image.encrypted else ("not encrypted", "encrypted")
        raise invalid(
            f"the volume is to be {ask}, but the backing image {image.name} is {have}",
            f'set encrypted: "{str(image.encrypted).lower()}", or use a clone of the image that fits',
        )
    check_source(image, wanted)


def check_source(image: BackingImage, wanted: VolumeParameters) -> None:
    """Raise INVALID where the StorageClass says that the image comes from elsewhere."""
    spec, given = image.spec, wanted.image_source_parameters
    source_type = wanted.image_source_type or spec.source_type
    asked = Spec.from_dict({"sourceType": source_type, "sourceParameters": given})
    other_parameters = given is not None and asked.completed != spec.completed
    other_checksum = wanted.image_checksum and wanted.image_checksum != spec.checksum
    if source_type != spec.source_type or other_parameters or other_checksum:
        raise invalid(
            f"existing backing image {image.name} data source is different from the parameters in the creation"
            " request or StorageClass",
            "give the parameters that the image was made with, or none",
        )
