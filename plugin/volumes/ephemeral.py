"""Inline ephemeral volumes: a pod's manifest asks for one, and it lives as long as its publish.

NodePublishVolume makes, stages and publishes it; NodeUnpublishVolume undoes all three. Its record names its target, and
that from its beginning: so whatever was cut short is finished by the repeated call, or undone by the unpublish, and
what nobody will ever unpublish can be told.
"""

from collections.abc import Mapping
from pathlib import Path

from plugin.errors import invalid
from plugin.host import sizes
from plugin.volumes.record import Volume

# What kubelet adds to the attributes of every volume; this one says that the volume is an inline one.
_ASKED = "csi.storage.k8s.io/ephemeral"
_SIZE = "size"
_DATA_SOURCE = "backingImageDataSource"


def is_asked(context: Mapping[str, str]) -> bool:
    """Whether the `context` of a publish asks for an ephemeral volume."""
    return context.get(_ASKED, "").lower() == "true"


def request(context: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """Its size in bytes (0: the default), and its other attributes, which are a StorageClass's parameters.

    Raises INVALID for a size that is none, and for what would make an image: that is for who may write a StorageClass.
    """
    parameters = {key: value for key, value in context.items() if key != _SIZE}
    source = next((key for key in parameters if key.startswith(_DATA_SOURCE)), None)
    if source is not None:
        raise invalid(f"an inline volume can't have {source}", "name a backing image that exists")
    try:
        size = sizes.parse(context[_SIZE]) if context.get(_SIZE) else 0
    except ValueError as error:
        raise invalid(f"invalid size of an inline volume: {error}", "give volumeAttributes.size such as 1Gi") from error
    return size, parameters


def is_forgotten(volume: Volume) -> bool:
    """Whether nobody will unpublish it: kubelet removes the directory above the target when it is done with it."""
    return bool(volume.ephemeral) and not Path(volume.ephemeral).parent.exists()
