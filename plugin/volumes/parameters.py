"""The parameters of a StorageClass, as Longhorn names them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plugin.errors import EbiError, invalid
from plugin.luks.flags import Flags
from plugin.volumes import mkfs
from plugin.volumes.capability import FILESYSTEMS

# They steer Longhorn's replication and choice of nodes; here a volume is one file on one node.
_NO_EFFECT_NAMES = """
    numberOfReplicas staleReplicaTimeout dataLocality nodeSelector diskSelector recurringJobSelector
    backingImageMinNumberOfCopies backingImageNodeSelector backingImageDiskSelector
    backupTargetName dataEngine disableRevisionCounter unmapMarkSnapChainRemoved replicaAutoBalance
    replicaSoftAntiAffinity replicaZoneSoftAntiAffinity replicaDiskSoftAntiAffinity freezeFilesystemForSnapshot
"""
_NO_EFFECT = frozenset(_NO_EFFECT_NAMES.split())
_BACKUP = "fromBackup"
_DISCARD = "discard"
_WORKQUEUES = ("cryptNoReadWorkqueue", "cryptNoWriteWorkqueue")
FLAGS = (_DISCARD, *_WORKQUEUES)
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
    flags: Flags = Flags()
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
        _BACKUP,
        *FLAGS,
    }
    unknown = sorted(values.keys() - known - _NO_EFFECT)
    if unknown:
        raise invalid(f"unknown StorageClass parameter {unknown[0]!r}", f"known are {', '.join(sorted(known))}")
    if values.get(_BACKUP):  # it would start empty
        raise invalid(
            f"the StorageClass parameter {_BACKUP} is not supported: no volume is restored from a backup here",
            "take it out, or make it empty; make a backing image of what shall be restored",
        )
    checksum = values.get("backingImageChecksum", "")
    if checksum and not re.fullmatch(r"[0-9a-fA-F]{128}", checksum):
        raise invalid(f"invalid checksum {checksum} in backingImageChecksum", "give a SHA-512 as 128 hex digits")
    fs_type = values.get("fsType", "")
    if fs_type and fs_type not in FILESYSTEMS:
        raise _bad("fsType", fs_type, f"one of {', '.join(FILESYSTEMS)}")
    encrypted = _boolean("encrypted", values.get("encrypted", ""))
    return VolumeParameters(
        given=values,
        encrypted=encrypted,
        image=values.get("backingImage", ""),
        image_source_type=values.get("backingImageDataSourceType", ""),
        image_source_parameters=_mapping(values.get("backingImageDataSourceParameters", "")),
        image_checksum=checksum.lower(),
        fs_type=fs_type,
        mkfs_options=_options(values.get("mkfsParams", "")),
        flags=_checked_flags(values, encrypted=encrypted),
        ignored=tuple(sorted(key for key in values.keys() & _NO_EFFECT if values[key])),
    )


def flags(given: Mapping[str, str]) -> Flags:
    """The flags in the parameters of a volume that exists: what else they say was checked when it was made."""
    return Flags(*(_boolean(name, given.get(name, "")) for name in FLAGS))


def _boolean(name: str, value: str) -> bool:
    try:
        return {"": False, "false": False, "true": True}[value.lower()]
    except KeyError:
        raise _bad(name, value, '"true" or "false"') from None


def _checked_flags(values: Mapping[str, str], *, encrypted: bool) -> Flags:
    found = flags(values)
    if (found.no_read_workqueue or found.no_write_workqueue) and not encrypted:
        name = _WORKQUEUES[0] if found.no_read_workqueue else _WORKQUEUES[1]
        raise invalid(f"the StorageClass parameter {name} is for encrypted volumes", "take it out")
    if found.discards and values.get("backingImage"):
        raise invalid(
            f"the StorageClass parameter {_DISCARD} is for volumes that start from no backing image",
            "take it out: dm-snapshot lets no discards through",
        )
    return found


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
        return mkfs.options(value)
    except ValueError as error:
        raise _bad("mkfsParams", value, f"options of mkfs that name no file and no device: {error}") from None


def _bad(name: str, value: str, wanted: str) -> EbiError:
    return invalid(f"invalid value {value!r} for the StorageClass parameter {name}", f"give {wanted}")
