"""A BackingImage manifest: read, with every field checked that can be without looking at other objects."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from plugin.errors import EbiError, invalid, unsupported

API_VERSION = "longhorn.io/v1beta2"
KIND = "BackingImage"
DEFAULT_NAMESPACE = "longhorn-system"
EXPORT = "export-from-volume"

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CHECKSUM = re.compile(r"[0-9a-f]{128}")
_SECRET = ("secret", "secret-namespace")
_SOURCE_SECRET = ("source-secret", "source-secret-namespace")
_PARAMETERS: dict[str, set[str]] = {
    "download": {"url"},
    "upload": set(),
    EXPORT: {"volume-name", "export-type", *_SECRET, "sparse"},
    "clone": {"backing-image", "encryption", *_SECRET, *_SOURCE_SECRET, "sparse"},
}
# Fields of Longhorn's that say where copies go. They are kept, and have no effect on one node.
_WITHOUT_EFFECT = ("minNumberOfCopies", "nodeSelector", "diskSelector", "dataEngine", "disks", "diskFileSpecMap")
_FIELDS = {"sourceType", "sourceParameters", "checksum", "secret", "secretNamespace", *_WITHOUT_EFFECT}


@dataclass(frozen=True)
class Spec:
    """What a manifest asks for; `parameters` are its sourceParameters, `other` holds the fields without effect."""

    source_type: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    checksum: str = ""
    secret: str = ""
    secret_namespace: str = ""
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def encryption(self) -> str:
        """`ignore`, `encrypt`, `decrypt` or `reencrypt` for a clone; empty for anything else."""
        return (self.parameters.get("encryption") or "ignore") if self.source_type == "clone" else ""

    @property
    def source(self) -> str:
        """The backing image that a clone is made from."""
        return self.parameters.get("backing-image", "")

    @property
    def volume(self) -> str:
        """The volume that an image is exported from."""
        return self.parameters.get("volume-name", "")

    @property
    def export_type(self) -> str:
        """`raw` or `qcow2` for an image that is exported from a volume."""
        return self.parameters.get("export-type") or "raw"

    @property
    def sparse(self) -> bool:
        """Whether holes stay holes."""
        return self.parameters.get("sparse", "true") == "true"

    @property
    def completed(self) -> dict[str, str]:
        """Its parameters, those that are left out or empty with their defaults: the same for the same image."""
        defaults = {
            "clone": {"encryption": "ignore", "sparse": "true"},
            EXPORT: {"export-type": "raw", "sparse": "true"},
        }
        given = {key: value for key, value in self.parameters.items() if value}
        return defaults.get(self.source_type, {}) | given

    def to_dict(self) -> dict[str, Any]:
        """As in the manifest."""
        return {
            "sourceType": self.source_type,
            "sourceParameters": dict(self.parameters),
            "checksum": self.checksum,
            "secret": self.secret,
            "secretNamespace": self.secret_namespace,
            **self.other,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_dict`; nothing is checked."""
        return cls(
            str(value.get("sourceType", "")),
            {str(key): _trimmed(item) for key, item in (value.get("sourceParameters") or {}).items()},
            _trimmed(value.get("checksum")),
            _trimmed(value.get("secret")),
            _trimmed(value.get("secretNamespace")),
            {key: value[key] for key in _WITHOUT_EFFECT if value.get(key) is not None},
        )


@dataclass(frozen=True)
class Manifest:
    """A named spec."""

    name: str
    namespace: str
    spec: Spec

    @property
    def described(self) -> str:
        """How messages name it."""
        return f"backing image {self.name}"


def parse(document: Mapping[str, Any]) -> Manifest:
    """Read a BackingImage document. Raises INVALID or UNSUPPORTED naming the object and the field."""
    if document.get("kind") != KIND or document.get("apiVersion") != API_VERSION:
        raise invalid(
            f"this is a {document.get('apiVersion')} {document.get('kind')}", f"{API_VERSION} {KIND} is expected"
        )
    metadata, spec = document.get("metadata"), document.get("spec")
    if not isinstance(metadata, Mapping) or not isinstance(spec, Mapping):
        raise invalid("a BackingImage has no metadata or no spec", "see deploy/examples")
    name = check_name(metadata.get("name"))
    if strange := sorted(str(key) for key in spec.keys() - _FIELDS):
        raise invalid(
            f"unknown field {strange[0]} in the spec of backing image {name}", f"known are {', '.join(sorted(_FIELDS))}"
        )
    parameters = spec.get("sourceParameters")
    if not isinstance(parameters, Mapping | None) or not all(
        isinstance(value, str | bool | int | None) for value in (parameters or {}).values()
    ):
        raise invalid(f"the sourceParameters of backing image {name} are not a map of strings", "quote the values")
    manifest = Manifest(name, _trimmed(metadata.get("namespace")) or DEFAULT_NAMESPACE, Spec.from_dict(spec))
    _check(manifest)
    return manifest


def check_name(name: Any) -> str:
    """`name` if it may be that of a backing image. Raises INVALID."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"invalid name {name}", "a name has at most 63 of a-z, 0-9 and -, none at its ends")
    return name


def _check(manifest: Manifest) -> None:
    spec = manifest.spec
    known = _PARAMETERS.get(spec.source_type)
    if known is None:
        raise unsupported(
            f"the source type {spec.source_type!r} of {manifest.described} is not supported",
            f"supported are {', '.join(sorted(_PARAMETERS))}",
        )
    if strange := set(spec.parameters) - known:
        raise invalid(
            f"invalid parameter {', '.join(sorted(strange))} for source type {spec.source_type} of"
            f" {manifest.described}",
            f"known are {', '.join(sorted(known))}",
        )
    if spec.checksum and not _CHECKSUM.fullmatch(spec.checksum):
        raise invalid(
            f"invalid checksum {spec.checksum} for {manifest.described}", "give the SHA-512 as 128 hex digits"
        )
    if spec.parameters.get("sparse", "true") not in ("true", "false"):
        raise _bad_parameter(manifest, "sparse", 'it is "true" or "false"')
    if spec.source_type == "download":
        _check_url(manifest)
    elif spec.source_type == "clone":
        _check_clone(manifest)
    elif spec.source_type == EXPORT:
        _check_export(manifest)


def _check_export(manifest: Manifest) -> None:
    spec = manifest.spec
    if not spec.volume:
        raise _bad_parameter(manifest, "volume-name", "name the volume to export")
    if spec.export_type not in ("raw", "qcow2"):
        raise invalid(f"unsupported export type {spec.export_type} for {manifest.described}", "use raw or qcow2")
    if spec.checksum:
        raise invalid(
            f"the checksum of {manifest.described} can't be known before it is exported from a volume", "leave it out"
        )


def _check_clone(manifest: Manifest) -> None:
    spec = manifest.spec
    if not _NAME.fullmatch(spec.source):
        raise _bad_parameter(manifest, "backing-image", "name the backing image to clone")
    if spec.encryption not in ("ignore", "encrypt", "decrypt", "reencrypt"):
        raise invalid(
            f"encryption {spec.encryption} is not supported for {manifest.described}",
            "use ignore, encrypt, decrypt or reencrypt",
        )
    if spec.encryption != "ignore":
        _check_secrets(manifest)


def _check_secrets(manifest: Manifest) -> None:
    """A clone that changes the encryption names the secrets for that; `reencrypt` alone needs the source's too."""
    spec = manifest.spec
    if not all(spec.parameters.get(key) for key in _SECRET):
        raise invalid(
            f"secret is not provided for encryption or decryption during cloning of {manifest.described}",
            "set the sourceParameters secret and secret-namespace",
        )
    given = [key for key in _SOURCE_SECRET if spec.parameters.get(key)]
    if spec.encryption == "reencrypt" and len(given) != len(_SOURCE_SECRET):
        raise invalid(
            f"the secret of the source is not provided for reencryption during cloning of {manifest.described}",
            "set the sourceParameters source-secret and source-secret-namespace",
        )
    if spec.encryption != "reencrypt" and given:
        raise _bad_parameter(manifest, given[0], "only encryption: reencrypt knows it")


def _check_url(manifest: Manifest) -> None:
    url = manifest.spec.parameters.get("url", "")
    if not url:
        raise invalid(f"download URL is not provided for {manifest.described}", "set sourceParameters.url")
    try:
        parts = urlsplit(url)
        valid = bool(parts.hostname or parts.scheme == "file") and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise _bad_parameter(manifest, "url", "it is not a URL with a host")
    if parts.scheme not in ("http", "https", "file"):
        raise _bad_parameter(manifest, "url", "its scheme is http or https")
    if parts.username or parts.password:
        raise _bad_parameter(manifest, "url", "a manifest is no place for a user's name or password")


def _bad_parameter(manifest: Manifest, key: str, hint: str) -> EbiError:
    return invalid(f"invalid parameter {key} for source type {manifest.spec.source_type} of {manifest.described}", hint)


def _trimmed(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value).strip()
