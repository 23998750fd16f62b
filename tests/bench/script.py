"""Staging by hand: a shell script of the cryptsetup, dmsetup, losetup and mount commands for a volume's devices."""

import os
from dataclasses import dataclass
from pathlib import Path

from plugin.luks.header import PAYLOAD_OFFSET, Header
from tests.bench.ours import PASSPHRASE, run

IMAGE, BASE, STORE, TOP = (f"/dev/mapper/bench-{name}" for name in ("img", "base", "cow", "vol"))
_OPEN = "cryptsetup open --type luks2 --batch-mode --disable-keyring"
_LOOPS = """
image=$(losetup --find --show --read-only {image})
volume=$(losetup --find --show --direct-io=on {volume})
echo "$image $volume" >loops
{open} --readonly --key-file passphrase "$image" bench-img
dmsetup create bench-base --readonly base.table
"""
_FORMAT = """
cryptsetup luksFormat --type luks2 --batch-mode {header} --key-file passphrase --volume-key-file key "$volume"
{open} --volume-key-file key "$volume" bench-cow
dd if=/dev/zero of=/dev/mapper/bench-cow bs=1M count=1 conv=fsync
"""
_UNLOCK = """
{open} --key-file passphrase "$volume" bench-cow
"""
_MOUNT = """
dmsetup create bench-vol top.table
mount --types ext4 /dev/mapper/bench-vol staging
"""
_GROW = """
resize2fs /dev/mapper/bench-vol
"""
_UNSTAGE = """
umount staging
dmsetup remove bench-vol
cryptsetup close bench-cow
dmsetup remove bench-base
cryptsetup close bench-img
losetup --detach $(cat loops)
"""


@dataclass(frozen=True)
class Script:
    """The scripts for a volume in the file `volume` that starts from the encrypted `image`, whose header is `header`.

    What can be known beforehand lies in `work`: the tables, the passphrase, the key of a new volume.
    """

    work: Path
    image: Path
    volume: Path
    header: Header

    def prepare(self, base: str, top: str) -> None:
        """Lay down what the scripts read: the tables of what the volume sees of its image, and of the volume."""
        (self.work / "staging").mkdir()
        (self.work / "passphrase").write_text(PASSPHRASE)
        (self.work / "key").write_bytes(os.urandom(self.header.key_size // 8))
        (self.work / "base.table").write_text(base)
        (self.work / "top.table").write_text(top)

    def first_stage(self) -> None:
        """A volume that was never staged: its header made at the image's cost, the filesystem grown."""
        self._run(_LOOPS + _FORMAT + _MOUNT + _GROW)

    def stage(self) -> None:
        """A volume that was staged before."""
        self._run(_LOOPS + _UNLOCK + _MOUNT)

    def unstage(self) -> None:
        """The way back."""
        self._run(_UNSTAGE)

    def _run(self, text: str) -> None:
        assert self.header.pbkdf
        header = [*self.header.pbkdf.arguments(), "--cipher", self.header.cipher]
        header += ["--key-size", str(self.header.key_size), "--sector-size", str(self.header.sector_size)]
        header += ["--offset", str(PAYLOAD_OFFSET // 512)]
        filled = text.format(image=self.image, volume=self.volume, header=" ".join(header), open=_OPEN)
        run(["bash", "-euc", f"cd {self.work}\n{filled}"])
