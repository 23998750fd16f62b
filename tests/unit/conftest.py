"""What the unit tests share. None of them needs root."""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError
from plugin.images import formats
from plugin.images.formats import Format
from plugin.images.image import BackingImage
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.luks import header
from plugin.luks.parameters import Pbkdf, SecretParameters
from plugin.settings import Settings

PASSPHRASE = b"correct horse battery staple\n"
NAMESPACE = "longhorn-system"
KIB, MIB = 1 << 10, 1 << 20
# The least that cryptsetup takes: a key derivation in a few milliseconds.
CHEAP = {"CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}


def secret(name: str = "key", passphrase: bytes = PASSPHRASE, **more: str) -> dict[str, Any]:
    """A Secret document with a key derivation that costs next to nothing."""
    data = {"CRYPTO_KEY_VALUE": passphrase.decode(), **CHEAP, **{f"CRYPTO_{key}": value for key, value in more.items()}}
    return {"kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "stringData": data}


def manifest(name: str, source_type: str, checksum: str = "", **parameters: str) -> dict[str, Any]:
    """A BackingImage document; underscores in parameters stand for hyphens."""
    return {
        "apiVersion": "longhorn.io/v1beta2",
        "kind": "BackingImage",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "sourceType": source_type,
            "sourceParameters": {key.replace("_", "-"): value for key, value in parameters.items()},
            "checksum": checksum,
        },
    }


def clone(name: str, source: str, encryption: str = "ignore", **parameters: str) -> dict[str, Any]:
    """The manifest of a clone, with the secret that it needs."""
    keys = {} if encryption == "ignore" else {"secret": "key", "secret_namespace": NAMESPACE}
    return manifest(name, "clone", backing_image=source, encryption=encryption, **{**keys, **parameters})


def make_raw(path: Path, size: int, runs: Sequence[tuple[int, int]]) -> Path:
    """A file of `size` bytes, holes but for `runs` (start, length) of random bytes."""
    with path.open("wb") as file:
        file.truncate(size)
        for start, length in runs:
            file.seek(start)
            file.write(os.urandom(length))
    return path


def opens(path: Path, passphrase: bytes) -> bool:
    """Whether the passphrase opens the LUKS2 file."""
    try:
        header.test_passphrase(path, passphrase, "it")
    except EbiError:
        return False
    return True


def sha512(path: Path) -> str:
    """128 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha512").hexdigest()


def disk_hash(path: Path, passphrase: bytes = PASSPHRASE) -> str:
    """The SHA-512 of the disk in the file, whatever its format."""
    form = formats.detect(path)
    key = header.volume_key(path, passphrase, str(path)) if form is Format.LUKS else None
    found = hashlib.sha512()
    with formats.opened(path, form, key) as source:
        for at in range(0, source.size, MIB):
            piece = bytearray(min(MIB, source.size - at))
            source.read(memoryview(piece), at)
            found.update(piece)
    return found.hexdigest()


@dataclass
class Store:
    """A data directory, and the secret that its images are made with."""

    work: Path
    images: Images
    secrets: DocumentSecrets = field(default_factory=lambda: DocumentSecrets([secret()]))

    def download(self, path: Path, name: str = "golden", checksum: str = "") -> BackingImage:
        """The file as a backing image."""
        return self.apply(manifest(name, "download", checksum, url=path.as_uri()))

    def apply(self, document: dict[str, Any]) -> BackingImage:
        """Apply one manifest."""
        return self.images.apply(document, self.secrets)

    def copied(self, work: Path) -> "Store":
        """The same in `work`, holes as holes: what takes long to make is made once for all tests of a file."""
        subprocess.run(["cp", "--archive", f"{self.work}/.", work], check=True)
        return Store(work, _images(work), self.secrets)


def _images(work: Path) -> Images:
    return Images(work / "data" / "images", Settings(workers=2, download_retry_seconds=0.001))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, _images(tmp_path))


@pytest.fixture(scope="module")
def first_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """For what the tests of a file share; each of them gets a copy."""
    work = tmp_path_factory.mktemp("first")
    return Store(work, _images(work))


@pytest.fixture
def parameters() -> SecretParameters:
    """Parameters with a key derivation that costs next to nothing."""
    return SecretParameters(PASSPHRASE, pbkdf=Pbkdf("pbkdf2", 1000))
