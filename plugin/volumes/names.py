"""The names of a volume's mappers, and of volumes."""

import hashlib
import re

from plugin.host.udev import PREFIX

# 68 characters are what kubelet gives an inline volume; with the longest prefix a mapper's name may have 127.
_ID = re.compile(r"[a-z0-9]([-a-z0-9.]{0,66}[a-z0-9])?")
READONLY = f"{PREFIX}ro-"
TOP = f"{PREFIX}vol-"
STORE = f"{PREFIX}cow-"
BASE = f"{PREFIX}base-"
IMAGE = f"{PREFIX}img-"


def readonly(volume: str) -> str:
    """The raw device, for publishing it read-only: a read-only bind mount of a device node holds no writer back."""
    return READONLY + volume


def top(volume: str) -> str:
    """The device that is mounted or published."""
    return TOP + volume


def store(volume: str) -> str:
    """What was written: the store of the snapshot."""
    return STORE + volume


def base(volume: str) -> str:
    """The image as this volume sees it: holes and the rest up to the volume's size as zeros."""
    return BASE + volume


def mappers(volume: str) -> list[str]:
    """Every mapper that the volume may have of its own, uppermost first."""
    return [readonly(volume), top(volume), store(volume), base(volume)]


def volume_of(mapper: str) -> str:
    """The volume that has the mapper of this name for its own; "" for an image's and for any other."""
    prefix = next((prefix for prefix in (READONLY, TOP, STORE, BASE) if mapper.startswith(prefix)), None)
    return mapper.removeprefix(prefix) if prefix else ""


def image(uuid: str) -> str:
    """The image's content, one device a node."""
    return IMAGE + uuid


def is_volume_id(text: str) -> bool:
    """Whether `text` can be a volume's id: a part of a path and of a mapper's name."""
    return _ID.fullmatch(text) is not None


def volume_id(name: str) -> str:
    """The id of the volume named `name`: the name itself where that can be one, else its letters and a hash."""
    if is_volume_id(name):
        return name
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-") or "volume"
    return f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
