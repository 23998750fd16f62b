"""Image operations on a disk that fills up or breaks in the middle: a clear failure, nothing left, then success.

EBI_DISK_ROUNDS sets how often each test tries each operation (default 1), EBI_DISK_SEED repeats a run.
"""

import gzip
import os
import random
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.images import export, headers, http, space
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings
from tests.kernel.disk import disk
from tests.unit.conftest import (
    MIB,
    NAMESPACE,
    PASSPHRASE,
    Store,
    clone,
    disk_hash,
    make_raw,
    manifest,
    secret,
    sha512,
)

ROUNDS = int(os.environ.get("EBI_DISK_ROUNDS", "1"))
SEED = int(os.environ.get("EBI_DISK_SEED", str(random.SystemRandom().randrange(1 << 32))))
SIZE = 4 * MIB  # of the image; all of it data
DISK = 92 * MIB
NAME = "ebi-test-disk"
OPERATIONS = [
    "download", "unpack", "upload", "clone", "encrypt", "encrypt qcow2", "decrypt", "reencrypt", "export",
]  # fmt: skip
# What is read to the end of a source begins there: in front of it are a header and tables, which are not.
SOURCES = {"golden": SIZE // 2, "luks": header.PAYLOAD_OFFSET, "qcow2": MIB}


OTHER = b"another one"


@dataclass
class Small:
    """A small ext4 with images on it, made from files elsewhere."""

    mountpoint: Path
    raw: Path
    packed: Path
    store: Store

    @property
    def filler(self) -> Path:
        return self.mountpoint / "filler"

    def fill(self, leave: int) -> None:
        """Somebody else takes all of the disk but about `leave` bytes."""
        with self.filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.free() - max(leave, 256 << 10))

    def fill_up(self) -> None:
        """Somebody else takes all of it."""
        self.fill(0)
        with suppress(OSError), self.filler.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                continue

    def free(self) -> int:
        found = os.statvfs(self.mountpoint)
        return found.f_bavail * found.f_frsize

    def run(self, operation: str) -> str:
        """Do it to its end; returns the SHA-512 of the disk that came of it."""
        if operation == "export":
            export.export(self.store.images, Settings(workers=1), "golden", self.mountpoint / "out")
            return sha512(self.mountpoint / "out")
        if operation == "upload":
            with self.raw.open("rb", buffering=0) as file:
                found = http.from_file(file)
                return disk_hash(self.store.images.upload(manifest("x", "upload", sha512(self.raw)), found).path)
        keys = {"secret": "other", "source_secret": "key", "source_secret_namespace": NAMESPACE}
        image = self.store.apply(
            {
                "download": manifest("x", "download", sha512(self.raw), url=self.raw.as_uri()),
                "unpack": manifest("x", "download", url=self.packed.as_uri()),
                "clone": clone("x", "golden"),
                "encrypt": clone("x", "golden", "encrypt"),
                "encrypt qcow2": clone("x", "qcow2", "encrypt"),
                "decrypt": clone("x", "luks", "decrypt"),
                "reencrypt": clone("x", "luks", "reencrypt", **keys),
            }[operation]
        )
        return disk_hash(image.path, OTHER if operation == "reencrypt" else PASSPHRASE)

    def source(self, operation: str) -> str:
        """The image that it reads, empty for none."""
        given = {"download": "", "unpack": "", "upload": "", "encrypt qcow2": "qcow2"}
        return given.get(operation, "luks" if operation in ("decrypt", "reencrypt") else "golden")

    def undo(self, operation: str) -> None:
        if operation == "export":
            (self.mountpoint / "out").unlink()
        else:
            self.store.images.delete("x")

    def left(self) -> set[str]:
        """What there is besides the sources and the records."""
        found = {str(path.relative_to(self.mountpoint)) for path in self.mountpoint.rglob("*") if path.is_file()}
        kept = {f"images/{name}/{file}" for name in SOURCES for file in ("image", "extents.json", "header.luks")}
        return {path for path in found - kept if not path.endswith("/record.json")}


def drawn(dice: random.Random) -> list[str]:
    """The operations to try, in any order."""
    return [operation for _ in range(ROUNDS) for operation in dice.sample(OPERATIONS, len(OPERATIONS))]


def small(home: Path, mountpoint: Path) -> Small:
    """The disk that is mounted at `mountpoint` with the images `SOURCES` on it."""
    raw, qcow2 = make_raw(home / "raw", SIZE, [(0, SIZE)]), home / "qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    packed = home / "packed"
    packed.write_bytes(gzip.compress(raw.read_bytes(), 0))
    secrets = DocumentSecrets([secret(), secret("other", OTHER)])
    store = Store(home, Images(mountpoint / "images", Settings(workers=1)), secrets)
    store.download(raw)
    store.download(qcow2, "qcow2")
    store.apply(clone("luks", "golden", "encrypt"))
    return Small(mountpoint, raw, packed, store)


def test_a_disk_that_fills_up_at_any_moment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(SEED)
    claim = space.claim
    with disk(home, NAME, DISK) as place:
        it = small(home, place.path)
        plain = sha512(it.raw)
        for operation in drawn(dice):
            leave = dice.randrange(SIZE - MIB)
            where = f"{operation} with {leave} bytes left, seed {SEED}"

            def taken(*arguments: object, leave: int = leave) -> None:
                """The disk is full a moment after it was found to have room."""
                claim(*arguments)  # type: ignore[arg-type]
                if not it.filler.exists():
                    it.fill(leave)

            monkeypatch.setattr(space, "claim", taken)
            fails(it, operation, where, Kind.EXHAUSTED)
            assert it.left() == {"filler"}, where
            it.filler.unlink()
            monkeypatch.setattr(space, "claim", claim)
            assert it.run(operation) == plain, where
            it.undo(operation)
            assert it.left() == set(), where


def test_a_disk_that_breaks_anywhere(home: Path) -> None:
    dice = random.Random(SEED)
    with disk(home, NAME, DISK) as place:
        it = small(home, place.path)
        plain = sha512(it.raw)
        for operation in drawn(dice):
            where = f"{operation}, seed {SEED}"
            source = it.source(operation)
            if not source:  # all that is free can't be written
                it.fill(0)
                place.fail(it.filler)
                it.filler.unlink()
            else:  # some sectors can't be read
                place.fail(it.store.images.get(source).path, dice, SOURCES[source])
                Path("/proc/sys/vm/drop_caches").write_text("1")
            fails(it, operation, where, Kind.INTERNAL)
            place.heal()
            it.store.images.recover()
            assert it.left() == set(), where
            assert it.run(operation) == plain, where
            it.undo(operation)


def test_a_passphrase_changes_on_a_disk_that_is_full_or_broken(home: Path) -> None:
    """What the disk can't take is a clear error, the old passphrase goes on, and the same call again changes it."""
    with disk(home, NAME, DISK) as place:
        it = small(home, place.path)
        plain, images, luks = sha512(it.raw), it.store.images, it.store.images.get("luks").path
        old, new = (it.store.secrets.get(name, NAMESPACE) for name in ("key", "other"))
        for breaks, kind in ((it.fill_up, Kind.EXHAUSTED), (lambda: place.fail(luks), Kind.INTERNAL)):
            breaks()
            Path("/proc/sys/vm/drop_caches").write_text("1")
            with pytest.raises(EbiError, match="backing image luks") as caught:
                headers.rekey(images, "luks", old, new, ("other", NAMESPACE))
            assert caught.value.kind is kind, caught.value
            place.heal()
            it.filler.unlink(missing_ok=True)
            assert disk_hash(luks) == plain
            assert images.get("luks").ready and it.left() == set()
        headers.rekey(images, "luks", old, new, ("other", NAMESPACE))
        assert disk_hash(luks, OTHER) == plain


def fails(it: Small, operation: str, where: str, kind: Kind) -> None:
    """The operation ends with a clear error of that kind."""
    with pytest.raises(EbiError) as caught:
        it.run(operation)
    assert caught.value.kind is kind, f"{where}: {caught.value}"
    words = r"no space left|needs \d+ MiB of disk" if kind is Kind.EXHAUSTED else "Input/output error"
    name = "backing image golden" if operation == "export" else "backing image x"
    assert re.search(words, caught.value.message) and name in caught.value.message, f"{where}: {caught.value}"
    if operation != "export":
        assert it.store.images.get("x").status.state == "failed", where
