"""Backing images: manifests, the catalog, sources and formats, and the engine that copies, encrypts and decrypts."""

from plugin.images.image import BackingImage, State
from plugin.images.progress import Progress
from plugin.images.secrets import DocumentSecrets, SecretSource
from plugin.images.store import Images
from plugin.images.volume import VolumeFacts, VolumeSource

__all__ = [
    "BackingImage",
    "DocumentSecrets",
    "Images",
    "Progress",
    "SecretSource",
    "State",
    "VolumeFacts",
    "VolumeSource",
]
