"""What the tests of volumes start from: golden images made of real files, plain and encrypted, and a node on them."""

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plugin import events
from plugin.host import mounts
from plugin.images.image import BackingImage
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Capability, Volume, Volumes

MIB = 1 << 20
PASSPHRASE = "a passphrase of the tests\n"  # the newline counts
# The cheapest key derivation that cryptsetup takes: what it costs is not what these tests are about.
SECRET = {"CRYPTO_KEY_VALUE": PASSPHRASE, "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
CBC = {**SECRET, "CRYPTO_KEY_CIPHER": "aes-cbc-essiv:sha256", "CRYPTO_KEY_SIZE": "256"}
WRONG = {**SECRET, "CRYPTO_KEY_VALUE": PASSPHRASE.strip()}


def tree_hash(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory`, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file or device."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


class World:
    """Images below `directory`; `files` is what the golden ones hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = Images(directory / "images", Settings(data_dir=directory))
        tree = directory / "tree"
        (tree / "deep" / "er").mkdir(parents=True)
        for number in range(40):
            (tree / "deep" / f"file{number}").write_bytes(os.urandom(number * 4097))
        (tree / "deep" / "er" / "text").write_text("golden\n" * 5000)
        self.tree = tree
        self.files = tree_hash(tree)

    @cached_property
    def plain(self) -> BackingImage:
        """ext4 of 24 MiB with holes."""
        raw = self.directory / "golden.raw"
        command = ["mkfs.ext4", "-q", "-d", self.tree, "-E", "lazy_itable_init=1", raw, "24M"]
        subprocess.run(command, check=True, capture_output=True)
        return self._download("golden", raw)

    @cached_property
    def encrypted(self) -> BackingImage:
        """The same, encrypted."""
        return self._encrypt(self.plain)

    @cached_property
    def cbc(self) -> BackingImage:
        """The same, under the secret `CBC`."""
        return self._encrypt(self.plain, "golden-cbc", CBC)

    @cached_property
    def xfs(self) -> BackingImage:
        """XFS of 300 MiB with 4 KiB sectors, encrypted."""
        raw = self.directory / "xfs.raw"
        with raw.open("wb") as file:
            file.truncate(300 * MIB)
        subprocess.run(["mkfs.xfs", "-q", "-s", "size=4096", raw], check=True, capture_output=True)
        return self._encrypt(self._download("xfs", raw))

    @cached_property
    def partitioned(self) -> BackingImage:
        """A disk of 8 MiB with a partition table, encrypted."""
        raw = self.directory / "disk.raw"
        first = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (2048).to_bytes(4, "little")
        raw.write_bytes(bytes(446) + first + bytes(48) + b"\x55\xaa")
        os.truncate(raw, 8 * MIB)
        return self._encrypt(self._download("disk", raw))

    def _download(self, name: str, raw: Path) -> BackingImage:
        return self._apply(name, "download", {"url": f"file://{raw}"})

    def _encrypt(self, image: BackingImage, name: str = "", data: Mapping[str, str] = SECRET) -> BackingImage:
        source = {"backing-image": image.name, "encryption": "encrypt", "secret": "key", "secret-namespace": "tests"}
        return self._apply(name or f"{image.name}-encrypted", "clone", source, data)

    def _apply(
        self, name: str, source_type: str, parameters: Mapping[str, str], data: Mapping[str, str] = SECRET
    ) -> BackingImage:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "key", "namespace": "tests"},
            "stringData": data,
        }
        manifest = {
            "apiVersion": "longhorn.io/v1beta2",
            "kind": "BackingImage",
            "metadata": {"name": name, "namespace": "tests"},
            "spec": {"sourceType": source_type, "sourceParameters": parameters},
        }
        return self.images.apply(manifest, DocumentSecrets([secret]))


@dataclass
class Machine:
    """A node with volumes below `home`, and the calls that an orchestrator makes, with their usual arguments."""

    home: Path
    world: World
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        self.volumes = Volumes(self.home / "volumes", self.world.images, self.settings)
        self.staging = self.home / "staging"

    def create(self, name: str, size: int, image: BackingImage | None = None, **parameters: str) -> Volume:
        """CreateVolume; encrypted as the image is, or if `encrypted` says so."""
        if image is not None:
            parameters = {"backingImage": image.name, "encrypted": str(image.encrypted).lower(), **parameters}
        return self.volumes.create(name, size, parameters)

    def staging_of(self, volume: str) -> Path:
        """The staging directory, there."""
        path = self.staging / volume
        path.mkdir(parents=True, exist_ok=True)
        return path

    def stage(self, volume: str, secret: Mapping[str, str] = SECRET, **capability: Any) -> Path:
        """NodeStageVolume; returns the staging path."""
        staging = self.staging_of(volume)
        self.volumes.stage(volume, staging, Capability(**capability), secret, {})
        return staging

    def publish(self, volume: str, name: str = "target", *, readonly: bool = False, **capability: Any) -> Path:
        """NodePublishVolume; returns the target path."""
        target = self.home / f"{volume}-{name}"
        self.volumes.publish(volume, self.staging / volume, target, Capability(**capability), readonly)
        return target

    def unpublish(self, volume: str, name: str = "target") -> None:
        """NodeUnpublishVolume."""
        self.volumes.unpublish(volume, self.home / f"{volume}-{name}")

    def unstage(self, volume: str) -> None:
        """NodeUnstageVolume."""
        self.volumes.unstage(volume, self.staging / volume)

    @contextmanager
    def used(self, volume: str, **capability: Any) -> Iterator[Path]:
        """The volume staged and published, and both undone."""
        self.stage(volume, **capability)
        yield self.publish(volume, **capability)
        self.unpublish(volume)
        self.unstage(volume)

    def is_mounted(self, path: Path) -> bool:
        """Whether something is mounted at `path`."""
        return mounts.at(path) is not None


@contextmanager
def steps() -> Iterator[list[str]]:
    """The names of the steps that the block makes."""
    made: list[str] = []
    stop = events.subscribe(lambda event: made.append(event.name) if isinstance(event, events.Step) else None)
    try:
        yield made
    finally:
        stop()
