"""Where the objects of backing images are kept: a protocol, and files for a machine alone."""

import shutil
from pathlib import Path
from typing import Protocol

from plugin.host.files import read_json, sync_directory, write_json
from plugin.images.image import BackingImage, State, Status
from plugin.images.manifest import Spec


class Catalog(Protocol):
    """Holds `BackingImage` values by name. Locks are not its business."""

    def get(self, name: str) -> BackingImage | None:
        """The image as it was saved last; None where there is none."""

    def list(self) -> list[BackingImage]:
        """All images, by name."""

    def save(self, image: BackingImage, *, durable: bool = True) -> None:
        """Keep `image`; `durable` waits for the disk."""

    def remove(self, image: BackingImage) -> None:
        """Forget `image`, then remove its directory; in this order, so that no record outlives its file."""


class LocalCatalog:
    """`<root>/<name>/record.json`, each replaced whole."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, name: str) -> BackingImage | None:
        """As the protocol says; a record that can't be read gives an image in state unknown."""
        directory = self._root / name
        try:
            record = read_json(directory / "record.json")
            return None if record is None else BackingImage.from_record(record, directory)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            status = Status(State.UNKNOWN, message=f"its record is damaged: {error}")
            return BackingImage(name, "", "", "", Spec(""), status, directory)

    def list(self) -> list[BackingImage]:
        """As the protocol says."""
        names = sorted(entry.parent.name for entry in self._root.glob("*/record.json"))
        return [image for name in names if (image := self.get(name)) is not None]

    def save(self, image: BackingImage, *, durable: bool = True) -> None:
        """As the protocol says."""
        write_json(image.directory / "record.json", image.to_record(), durable=durable)

    def remove(self, image: BackingImage) -> None:
        """As the protocol says."""
        (image.directory / "record.json").unlink(missing_ok=True)
        sync_directory(image.directory)
        shutil.rmtree(image.directory)
        sync_directory(self._root)
