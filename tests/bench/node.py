"""The suite `node`: what a staged volume costs, on a kernel with device-mapper. This is what its parts share."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from plugin.images.image import BackingImage
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes
from tests.bench.ours import Store, secret
from tests.bench.result import MIB, Results
from tests.bench.timing import Clock
from tests.demo.node import Node

HOW = [
    "`ebi serve` runs as a process of its own and is called over its socket; a time is the caller's. The script, run by"
    " bash, is the cryptsetup, dmsetup, losetup, mount and resize2fs commands that make the same devices, with the same"
    " cost of key derivation; it looks at nothing beforehand, and checks no filesystem.",
    "*least derivation*: pbkdf2 with 1000 iterations, the least that cryptsetup takes, so that what is left is"
    " everything else. *forced derivation*: argon2i, CRYPTO_PBKDF_FORCE_ITERATIONS=4, CRYPTO_PBKDF_MEMORY=65536.",
    "The golden image is ext4 with data and holes, that of the table of chunk sizes data throughout, read through the"
    " page cache. The disk is a file of the host through virtio with its cache mode"
    " unsafe: a flush costs nothing there, so that synchronous writes look better than on a disk, for all sides.",
]
_GOLDEN = 64 * MIB


@dataclass
class Suite:
    """What the parts share; `volumes` is how many are staged together."""

    store: Store
    results: Results
    clock: Clock
    volumes: int

    @cached_property
    def node(self) -> Node:
        """The server's side, on the store's data directory."""
        return Node(self.store.work)

    @property
    def settings(self) -> Settings:
        """Those of the server, for looking at what it has, and for what no call can do."""
        return Settings(data_dir=self.store.data)

    @property
    def images(self) -> Images:
        """What the server has."""
        return Images(self.store.data / "images", self.settings)

    @property
    def records(self) -> Volumes:
        """What the server has."""
        return Volumes(self.store.data / "volumes", self.images, self.settings)

    @contextmanager
    def golden(self, derivation: str, disk: Path | None = None) -> Iterator["Golden"]:
        """An encrypted image of `disk`, or else of a filesystem, with that key derivation; gone afterwards."""
        self.store.golden("plain", disk or self._filesystem())
        self.store.ebi(*self.store.clone("golden", "plain", "encrypt", derivation))
        yield Golden(self.images.get("golden"), secret(derivation))
        self.store.delete("golden")
        self.store.delete("plain")

    def _filesystem(self) -> Path:
        raw = self.store.work / "golden.raw"
        options: list[str | Path] = ["-q", "-d", Path(__file__).parents[2] / "plugin", "-E", "lazy_itable_init=1"]
        subprocess.run(["mkfs.ext4", *options, raw, f"{_GOLDEN // MIB}M"], check=True, capture_output=True)
        return raw


@dataclass(frozen=True)
class Golden:
    """An encrypted image, and the Secret that opens it."""

    image: BackingImage
    secret: dict[str, str]

    @property
    def parameters(self) -> dict[str, str]:
        """Those of a StorageClass for volumes that start from it."""
        return {"encrypted": "true", "backingImage": self.image.name}
