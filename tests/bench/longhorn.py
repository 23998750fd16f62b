"""The suite `longhorn`: against Longhorn's way to encrypt an image, which needs root, loop devices and dm-crypt.

Its way, from what is known of it: a loop device over the target file, luksFormat, open, then a copy through the mapper
by one thread with a buffer of 4096 bytes, holes written out as zeros, and no fsync at the end.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugin.luks.header import PAYLOAD_OFFSET
from tests.bench import content
from tests.bench.ours import FORCED, PASSPHRASE, Store, run
from tests.bench.result import MIB, Plot, Results, Row, Values
from tests.bench.timing import Clock, Contender, synced

HOW = [
    "Both sides in one run, on one kernel and disk. Longhorn's way is a script of ours that goes the way of its backing"
    " image manager: losetup, luksFormat, open, a copy through the mapper (dd with 4096 bytes at a time), close.",
    "It does not fsync; rows say where that was added. Ours always does, its key derivation and start-up included.",
    "Derivation *default*: Longhorn lets cryptsetup run its benchmark, which aims at 2 s for it; ours has a fixed"
    " cost. *forced*: both sides with CRYPTO_PBKDF_FORCE_ITERATIONS=4 and CRYPTO_PBKDF_MEMORY=65536.",
    "Where the processor is emulated, the cipher in user space and the start of Python take many times as long as on a"
    " real one (docs/decisions/091).",
    "aes-xts-plain64 with 512-bit keys on both sides. Source in the page cache; medians, in brackets the extremes.",
]
_MAPPER = "ebi-bench-longhorn"


@dataclass
class Suite:
    """What the parts share; `size` is that of the image, in bytes."""

    store: Store
    results: Results
    size: int
    clock: Clock

    def longhorn(self, source: Path, derivation: str, *, fsync: bool) -> Contender:
        """Longhorn's way."""
        target = self.store.work / "longhorn"
        return Contender("Longhorn", lambda: _encrypt(source, target, derivation, fsync=fsync), target.unlink)

    def ours(self, derivation: str) -> Contender:
        """Ours."""
        command = self.store.clone("target", "golden", "encrypt", derivation)
        return Contender("ours", lambda: self.store.ebi(*command), lambda: self.store.delete("target"))


def measure(suite: Suite) -> None:
    """Dense and with holes, with either derivation."""
    lines: dict[str, list[tuple[float, float]]] = {"ebi apply": [], "Longhorn's way": []}
    label = f"{suite.size / MIB:g} MiB"
    dense = 0.0
    for share in (0, 25, 75):
        disk = content.with_holes(suite.store.work / "disk.raw", suite.size, suite.size * (100 - share) // 100)
        golden = suite.store.golden("golden", disk)
        what = f"encrypt {label}, " + (f"{share} % holes" if share else "dense")
        forced = _compared(suite, golden, "forced", fsync=False)
        _row(suite, f"{what}, forced derivation, no fsync there", forced, least(share))
        ours, theirs = forced["ours"].median, forced["Longhorn"].median
        lines["ebi apply"].append((share, suite.size / MIB / ours))
        lines["Longhorn's way"].append((share, suite.size / MIB / theirs))
        if not share:
            dense = ours
            _row(suite, f"{what}, forced derivation, fsync there", _compared(suite, golden, "forced", fsync=True), 3)
            _row(suite, f"{what}, default derivation", _compared(suite, golden, "default", fsync=False), 3)
        else:
            limit = Values((dense,))
            suite.results.add(
                Row(f"{what} against dense", "s", forced["ours"], "ours dense", limit, "less", limit.median)
            )
        suite.store.delete("golden")
    title = f"Encrypting an image of {label} with holes"
    suite.results.plots.append(Plot("longhorn", title, "share of holes, %", "MiB/s of the whole disk", lines, "y"))


def _compared(suite: Suite, golden: Path, derivation: str, *, fsync: bool) -> dict[str, Values]:
    sides = [suite.ours(derivation), suite.longhorn(golden, derivation, fsync=fsync)]
    return suite.clock.compare(sides, exactly=suite.clock.rounds)  # the other side takes its time


def least(share: int) -> float:
    """How many times as fast we shall be: 3 where all is data, and more by the share of holes."""
    return 3 / (1 - share / 100)


def _row(suite: Suite, what: str, found: dict[str, Values], least: float) -> None:
    limit = found["Longhorn"].median / least
    target = f"at least {least:g} times as fast"
    suite.results.add(Row(what, "s", found["ours"], "Longhorn's way", found["Longhorn"], target, limit))


def _encrypt(source: Path, target: Path, derivation: str, *, fsync: bool) -> None:
    with _formatted(source, target, derivation) as device:
        run(["cryptsetup", "luksOpen", device, _MAPPER, "-d", "-"], stdin=PASSPHRASE.encode())
        try:
            end = ["conv=fsync"] if fsync else []
            run(["dd", f"if={source}", f"of=/dev/mapper/{_MAPPER}", "bs=4096", "status=none", *end])
        finally:
            run(["cryptsetup", "luksClose", _MAPPER])
    if fsync:
        synced(target)


def without_cipher(source: Path, target: Path, derivation: str) -> None:
    """What is left of its way where there is no dm-crypt: all but the cipher, so that it takes less than the whole."""
    with _formatted(source, target, derivation) as device:
        run(["cryptsetup", "open", "--test-passphrase", device, "-d", "-"], stdin=PASSPHRASE.encode())
        run(["dd", f"if={source}", f"of={device}", "bs=4096", f"seek={PAYLOAD_OFFSET // 4096}", "status=none"])
    synced(target)


@contextmanager
def _formatted(source: Path, target: Path, derivation: str) -> Iterator[str]:
    """A loop device over `target`, with a LUKS2 header and room for `source`."""
    with target.open("wb") as file:
        file.truncate(source.stat().st_size + PAYLOAD_OFFSET)
    device = _output(["losetup", "--find", "--show", target])
    cost = []
    if derivation == "forced":
        cost = ["--pbkdf-force-iterations", FORCED["CRYPTO_PBKDF_FORCE_ITERATIONS"]]
        cost += ["--pbkdf-memory", FORCED["CRYPTO_PBKDF_MEMORY"]]
    cipher = ["--type", "luks2", "--cipher", "aes-xts-plain64", "--hash", "sha256", "--key-size", "512"]
    try:
        format_it = ["cryptsetup", "-q", "luksFormat", *cipher, "--pbkdf", "argon2i", *cost, device, "-d", "-"]
        run(format_it, stdin=PASSPHRASE.encode())
        yield device
    finally:
        run(["losetup", "-d", device])


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def loops() -> bool:
    """Whether this machine lets us have loop devices."""
    return os.geteuid() == 0 and Path("/dev/loop-control").exists()


def possible() -> bool:
    """Whether this machine has what Longhorn's way needs."""
    return loops() and Path("/dev/mapper/control").exists()
