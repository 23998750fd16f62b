"""What a manifest may ask for, given the other images and the secrets; and what follows from those for itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from plugin.errors import EbiError, Kind, exists, invalid, precondition, unsupported
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.manifest import EXPORT, Manifest, Spec
from plugin.images.secrets import SecretSource
from plugin.images.volume import VolumeFacts, VolumeSource, secret_of
from plugin.luks import payload
from plugin.luks.parameters import SecretParameters


def resolved(manifest: Manifest, find: Callable[[str], BackingImage | None], volumes: VolumeSource | None) -> Manifest:
    """`manifest` with what it inherits: as Longhorn does it. Raises INVALID or PRECONDITION."""
    spec = manifest.spec
    if spec.source_type == EXPORT:
        secret, namespace = secret_of(manifest, _facts(manifest, volumes))
        return replace(manifest, spec=replace(spec, secret=secret, secret_namespace=namespace))
    if spec.source_type != "clone":
        return manifest
    source = _source(manifest, find)
    if spec.encryption == "ignore":
        # The manifest's checksum is that of a file as it came, which for a packed one is not that of the image's.
        checksum = "" if source.status.packing else source.spec.checksum
        found = (checksum, source.spec.secret, source.spec.secret_namespace)
    elif spec.encryption == "encrypt":
        if source.encrypted:
            raise _already(manifest, "re-encrypt", "encrypted", source)
        found = ("", spec.parameters["secret"], spec.parameters["secret-namespace"])
    elif spec.encryption == "reencrypt":
        if not source.encrypted:
            raise invalid(
                f"cannot re-encrypt the backing image, {source.name} is not encrypted: {manifest.described}",
                "use encryption: encrypt",
            )
        found = ("", spec.parameters["secret"], spec.parameters["secret-namespace"])
    else:
        if not source.encrypted:
            raise _already(manifest, "re-decrypt", "decrypted", source)
        found = ("", "", "")
    parameters = {**spec.parameters, "encryption": spec.encryption}
    return replace(manifest, spec=Spec(spec.source_type, parameters, *found, spec.other))


def unchanged(wanted: Manifest, image: BackingImage) -> Spec:
    """The spec of `image`, which is ready, with those fields of `wanted` that may change.

    Raises INVALID for another secret, EXISTS where `wanted` asks for another image under the same name.
    """
    old, new = image.spec, wanted.spec
    secret, namespace = _secret(new), _namespace(new)
    if secret and secret != _secret(old):
        raise invalid(f"changing secret for BackingImage {image.name} is not supported", "make a new image")
    if namespace and namespace != _namespace(old):
        raise invalid(f"changing secret namespace for BackingImage {image.name} is not supported", "make a new image")
    other = []
    if new.source_type != old.source_type:
        other.append("sourceType")
    if new.completed != old.completed:
        other.append("sourceParameters")
    if new.source_type in ("download", "upload") and new.checksum and new.checksum != old.checksum:
        other.append("checksum")
    if other:
        raise exists(
            f"existing {image.described} differs in {', '.join(other)}", "delete it first, or use another name"
        )
    return replace(old, other=new.other)


@dataclass(frozen=True)
class Keys:
    """`old` opens the source of a clone, `new` closes the image (and opens a volume); None where there is none."""

    old: SecretParameters | None = None
    new: SecretParameters | None = None


def keys(manifest: Manifest, secrets: SecretSource) -> Keys:
    """What the manifest's secrets say, where it needs any. Raises NOT_FOUND, INVALID, UNSUPPORTED."""
    spec = manifest.spec
    if spec.source_type == EXPORT:
        if not spec.secret:
            return Keys()
        found = _parameters(manifest, secrets, spec.secret, spec.secret_namespace)
        payload.check(found.cipher, found.key_size, manifest.described)
        return Keys(new=found)
    if (
        spec.source_type in ("download", "upload") and spec.secret
    ):  # it has no use for it; that it is there is Longhorn's rule
        _parameters(manifest, secrets, spec.secret, spec.secret_namespace or manifest.namespace)
    if spec.encryption in ("", "ignore"):
        return Keys()
    found = parameters(manifest, secrets, "secret")
    if spec.encryption == "decrypt":
        return Keys(old=found)
    payload.check(found.cipher, found.key_size, manifest.described)
    if spec.encryption == "encrypt":
        return Keys(new=found)
    return Keys(parameters(manifest, secrets, "source-secret"), found)


def parameters(manifest: Manifest, secrets: SecretSource, key: str) -> SecretParameters:
    """What the secret says that the parameter `key` names. Raises NOT_FOUND, INVALID."""
    given = manifest.spec.parameters
    return _parameters(manifest, secrets, given[key], given[f"{key}-namespace"])


def _parameters(manifest: Manifest, secrets: SecretSource, name: str, namespace: str) -> SecretParameters:
    try:
        data = secrets.get(name, namespace)
    except EbiError as error:
        if error.kind is not Kind.NOT_FOUND:
            raise
        raise EbiError(
            f"failed to get the secret {name} in the namespace {namespace} for the {manifest.described}",
            kind=error.kind,
            hint=error.hint,
        ) from error
    return SecretParameters.from_data(data, manifest.described)


def _facts(manifest: Manifest, volumes: VolumeSource | None) -> VolumeFacts:
    name = manifest.spec.volume
    if volumes is None:
        raise unsupported(f"{manifest.described} can't be exported here: there are no volumes", "apply it on a node")
    try:
        return volumes.facts(name)
    except EbiError as error:
        if error.kind is not Kind.NOT_FOUND:
            raise
        raise invalid(
            f"invalid parameter volume-name {name} for source type {EXPORT} of {manifest.described}",
            "there is no such volume on this node",
        ) from error


def _secret(spec: Spec) -> str:
    return spec.parameters.get("secret") or spec.secret


def _namespace(spec: Spec) -> str:
    return spec.parameters.get("secret-namespace") or spec.secret_namespace


def _source(manifest: Manifest, find: Callable[[str], BackingImage | None]) -> BackingImage:
    name = manifest.spec.source
    source = find(name)
    if source is None or name == manifest.name:
        raise invalid(
            f"invalid parameter backing-image {name} for source type clone of {manifest.described}",
            "there is no such backing image to clone",
        )
    if not source.ready:
        raise precondition(
            f"cannot clone {source.described} as {manifest.name}: it is {source.status.state}, not ready",
            source.status.message,
        )
    source.check_file()
    if source.encrypted and source.status.format is not Format.LUKS:
        raise precondition(f"{source.described} is encrypted, but its file is not", "delete it")
    return source


def _already(manifest: Manifest, verb: str, state: str, source: BackingImage) -> EbiError:
    return invalid(
        f"cannot {verb} the backing image, {source.name} is already {state}: {manifest.described}",
        "use encryption: ignore for a copy as it is",
    )
