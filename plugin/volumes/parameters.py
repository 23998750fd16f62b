"""The parameters of a StorageClass, as Longhorn names them."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plugin.errors import EbiError, invalid
from plugin.volumes.capability import FILESYSTEMS

# They steer Longhorn's replication and choice of nodes; here a volume is one file on one node.
_NO_EFFECT_NAMES = """
    numberOfReplicas staleReplicaTimeout fromBackup dataLocality nodeSelector diskSelector recurringJobSelector
    backingImageMinNumberOfCopies backingImageNodeSelector backingImageDiskSelector
"""
_NO_EFFECT = frozenset(_NO_EFFECT_NAMES.split())
# What the orchestrator keeps for itself, should it come through all the same.
_ORCHESTRATOR = "csi.storage.k8s.io/"


@dataclass(frozen=True)
class VolumeParameters:
    """What a StorageClass asks for; `ignored` are the parameters `given` that have no effect here."""

    given: Mapping[str, str]
    encrypted: bool = False
    image: str = ""
    image_source_type: str = ""
    image_source_parameters: Mapping[str, str] | None = None
    image_checksum: str = ""
    fs_type: str = ""
    mkfs_options: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def parse(parameters: Mapping[str, Any]) -> VolumeParameters:
    """Check and read `parameters`. Raises INVALID naming the one that is wrong."""
    values = {key: str(value).strip() for key, value in parameters.items() if not key.startswith(_ORCHESTRATOR)}
    known = {
        "encrypted",
        "backingImage",
        "backingImageDataSourceType",
        "backingImageDataSourceParameters",
        "backingImageChecksum",
        "fsType",
        "mkfsParams",
    }
    unknown = sorted(values.keys() - known - _NO_EFFECT)
    if unknown:
        raise invalid(f"unknown StorageClass parameter {unknown[0]!r}", f"known are {', '.join(sorted(known))}")
    checksum = values.get("backingImageChecksum", "")
    if checksum and not re.fullmatch(r"[0-9a-fA-F]{128}", checksum):
        raise invalid(f"invalid checksum {checksum} in backingImageChecksum", "give a SHA-512 as 128 hex digits")
    fs_type = values.get("fsType", "")
    if fs_type and fs_type not in FILESYSTEMS:
        raise _bad("fsType", fs_type, f"one of {', '.join(FILESYSTEMS)}")
    return VolumeParameters(
        given=values,
        encrypted=_boolean("encrypted", values.get("encrypted", "")),
        image=values.get("backingImage", ""),
        image_source_type=values.get("backingImageDataSourceType", ""),
        image_source_parameters=_mapping(values.get("backingImageDataSourceParameters", "")),
        image_checksum=checksum.lower(),
        fs_type=fs_type,
        mkfs_options=_options(values.get("mkfsParams", "")),
        ignored=tuple(sorted(key for key in values.keys() & _NO_EFFECT if values[key])),
    )


def _boolean(name: str, value: str) -> bool:
    try:
        return {"": False, "false": False, "true": True}[value.lower()]
    except KeyError:
        raise _bad(name, value, '"true" or "false"') from None


def _mapping(value: str) -> Mapping[str, str] | None:
    if not value:
        return None
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(item, str) for item in found.values()):
        raise _bad("backingImageDataSourceParameters", value, "a JSON object of strings")
    return found


def _options(value: str) -> tuple[str, ...]:
    try:
        options = tuple(shlex.split(value))
    except ValueError:
        raise _bad("mkfsParams", value, "options as a shell would split them") from None
    # mkfs runs as root: a path among its options could name another device, or a file of the host to copy in.
    if any("/" in option for option in options) or (options and not options[0].startswith("-")):
        raise _bad("mkfsParams", value, "options without paths")
    return options


def _bad(name: str, value: str, wanted: str) -> EbiError:
    return invalid(f"invalid value {value!r} for the StorageClass parameter {name}", f"give {wanted}")
