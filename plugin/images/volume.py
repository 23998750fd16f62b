"""An image made from a volume: what this layer has to know of volumes, which are kept above it, and the operation."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from plugin.errors import invalid
from plugin.images import operations
from plugin.images.disk import Source
from plugin.images.formats import Format
from plugin.images.manifest import Manifest
from plugin.images.operations import Made, Operation, Work
from plugin.luks.parameters import SecretParameters


@dataclass(frozen=True)
class VolumeFacts:
    """What a manifest is checked against: `secret` and `namespace` name the Secret of its image."""

    encrypted: bool
    secret: str = ""
    namespace: str = ""


class VolumeSource(Protocol):
    """Hands out the disks of volumes."""

    def facts(self, volume: str) -> VolumeFacts:
        """Those of a volume that can be exported. Raises NOT_FOUND, and PRECONDITION for one that can't be."""

    def disk(self, volume: str, passphrase: bytes, work: Work) -> AbstractContextManager[Source]:
        """The disk of `volume` as it is at one instant, read without a device; `passphrase` opens an encrypted one.

        Nobody changes what is read within the block. What has to be kept aside for that lies beside `work.path`.
        """


def export(volumes: VolumeSource, manifest: Manifest, parameters: SecretParameters | None) -> Operation:
    """The disk of the volume that `manifest` names: LUKS2 under `parameters` if there are some, else raw or qcow2."""
    spec = manifest.spec

    def run(work: Work) -> Made:
        with volumes.disk(spec.volume, parameters.passphrase if parameters else b"", work) as source:
            runs = operations.data_runs(source, sparse=spec.sparse)
            if parameters is not None:
                return operations.encrypted(source, runs, parameters, work, sparse=spec.sparse)
            if spec.export_type == Format.QCOW2:
                return operations.as_qcow2(source, runs, work, sparse=spec.sparse)
            return operations.unpacked(source, runs, work, sparse=spec.sparse)

    return run


def secret_of(manifest: Manifest, facts: VolumeFacts) -> tuple[str, str]:
    """Name and namespace of the Secret of an exported volume: the manifest's or its image's; none for a plain one.

    Raises INVALID where an encrypted volume has none, or is to be a qcow2 file, or a plain one is given a secret.
    """
    spec = manifest.spec
    given = (
        spec.parameters.get("secret") or spec.secret,
        spec.parameters.get("secret-namespace") or spec.secret_namespace,
    )
    if not facts.encrypted:
        if any(given):
            raise invalid(
                f"the secret of {manifest.described} has no use: volume {spec.volume} is not encrypted",
                "leave it out, and clone the image with encryption: encrypt",
            )
        return "", ""
    if spec.export_type != Format.RAW:
        raise invalid(
            f"volume {spec.volume} is encrypted, so {manifest.described} is a LUKS2 file and no {spec.export_type}",
            "leave export-type out, or set it to raw",
        )
    found = (given[0] or facts.secret, given[1] or facts.namespace)
    if not all(found):
        raise invalid(
            f"secret is not provided for the export of the encrypted volume {spec.volume} as {manifest.described}",
            "set the sourceParameters secret and secret-namespace",
        )
    return found
