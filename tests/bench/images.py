"""The suite `images`: file to file, no root and no device-mapper. Encrypting, decrypting, copying; sparse; memory."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import content, peers
from tests.bench.longhorn import least, loops, without_cipher
from tests.bench.ours import Store, run
from tests.bench.result import MIB, Plot, Results, Row, Values
from tests.bench.timing import Clock, Contender
from tests.bench.watch import disk_usage, watched

HOW = [
    "A time is that of whole processes: from the start of `ebi apply` to its end, key derivation, fsync of the file and"
    " of its record included. A peer's time includes the fsync of its file.",
    "Medians of runs by turns, in brackets the fastest and the slowest. The source is in the page cache, except in rows"
    " that say cold. Data is random, so that nothing compresses it; where qcow2 is compressed, half as random.",
    "aes-xts-plain64 with 512-bit keys on all sides. qemu-img writes LUKS1, its key derivation set to 10 ms;"
    " *its default* is 2 s.",
    "Key derivation: *default* is a Secret without CRYPTO_PBKDF_*: argon2i at our fixed cost, with no benchmark run."
    " *forced* is one with CRYPTO_PBKDF_FORCE_ITERATIONS=4 and CRYPTO_PBKDF_MEMORY=65536.",
    "*Longhorn's way, no cipher*: losetup, luksFormat, a passphrase tested, dd with 4096 bytes at a time into the loop"
    " device, and fsync. The whole goes through dm-crypt, and takes longer; the suite `longhorn` measures that.",
    "Memory is the proportional set size of all our processes at one moment, those of cryptsetup, which derive the"
    " keys, apart.",
]
_UNCIPHERED = "Longhorn's way, no cipher"
_SLACK = 0.5  # seconds that starting up and deriving keys may add to a copy
_MEMORY = 256  # MiB
_VIRTUAL, _DATA = 20 << 30, 256 * MIB
_MOST_DISK = 256 * 1.05 + 17  # MiB


@dataclass
class Suite:
    """What the sections share; `size` is that of the dense image, in bytes."""

    store: Store
    results: Results
    size: int
    clock: Clock

    @property
    def label(self) -> str:
        """The size as it stands in rows."""
        return _label(self.size)

    def ours(self, *clone: str) -> Contender:
        """Ours: `clone` (source, encryption, secret) and its removal."""
        command = self.store.clone("target", *clone)
        return Contender("ours", lambda: self.store.ebi(*command), lambda: self.store.delete("target"))

    def peer(self, name: str, job: Callable[..., None], source: Path, **options: object) -> Contender:
        """A peer that makes one file of `source`."""
        target = self.store.work / "peer"
        return Contender(name, lambda: job(source, target, **options), target.unlink)

    def row(self, what: str, found: dict[str, Values], peer: str, factor: float, slack: float = 0.0) -> None:
        """A row of times in which ours may be `factor` times the peer's, and `slack` seconds more."""
        target = f"at most {factor:g} x peer" + (f" + {slack:g} s" if slack else "")
        if factor < 1:
            target = f"at least {1 / factor:g} times as fast"
        limit = factor * found[peer].median + slack
        self.results.add(Row(what, "s", found["ours"], peer, found[peer], target, limit))

    @contextmanager
    def images(self, **files: Path) -> Iterator[dict[str, Path]]:
        """Bring `files` in as images, gone afterwards; yields their files there."""
        try:
            yield {name: self.store.golden(name, file) for name, file in files.items()}
        finally:
            for name in files:
                self.store.delete(name)

    def dense(self, size: int) -> Path:
        """A dense disk."""
        return content.dense(self.store.work / "disk.raw", size)


def crypt(suite: Suite) -> None:
    """Encrypting and decrypting a dense image, against cp and qemu-img."""
    with suite.images(golden=suite.dense(suite.size)) as files:
        _crypt(suite, files["golden"])
    with suite.images(golden=content.partitioned(suite.store.work / "disk.raw", suite.size)) as files:
        cp = suite.peer("cp", peers.copy, files["golden"])
        found = suite.clock.compare([suite.ours("golden", "encrypt", "default"), cp])
        what = f"encrypt {suite.label} dense with a partition table (512-byte sectors), default derivation"
        suite.row(what, found, "cp", 1.25, _SLACK)


def _crypt(suite: Suite, golden: Path) -> None:
    cp, qemu = suite.peer("cp", peers.copy, golden), suite.peer("qemu-img", peers.qemu_encrypt, golden)
    for derivation in ("default", "forced"):
        ours = suite.ours("golden", "encrypt", derivation)
        others = [cp, qemu] if derivation == "default" else [cp]
        found = suite.clock.compare([ours, *others])
        what = f"encrypt {suite.label} dense, {derivation} derivation"
        suite.row(what, found, "cp", 1.25, _SLACK)
        if qemu in others:
            suite.row(what, found, "qemu-img", 0.25)
    found = suite.clock.compare([suite.ours("golden", "encrypt", "default"), cp], cold=[golden])
    suite.row(f"encrypt {suite.label} dense, default derivation, cold", found, "cp", 1.25, _SLACK)

    small = content.dense(suite.store.work / "small.raw", MIB)
    setup = suite.clock.compare([suite.peer("qemu-img", peers.qemu_encrypt, small)])["qemu-img"]
    suite.results.remark(
        f"Of each encryption by qemu-img, {setup.median:.1f} s are its measuring of the key derivation."
    )
    small.unlink()
    _decrypt(suite, golden, cp)


def _decrypt(suite: Suite, golden: Path, cp: Contender) -> None:
    """qemu-img with next to no key derivation beside ours with either, and each with its own default."""
    theirs = {"qemu-img": 10, "qemu-img, its default": peers.QEMU_DERIVATION}
    foreign = {name: suite.store.work / f"foreign-{cost}.luks" for name, cost in theirs.items()}
    for name, cost in theirs.items():
        peers.qemu_encrypt(golden, foreign[name], milliseconds=cost)
    for derivation in ("default", "forced"):
        suite.store.ebi(*suite.store.clone("sealed", "golden", "encrypt", derivation))
        others = [name for name in theirs if derivation == "default" or theirs[name] == 10]
        sides = [suite.peer(name, peers.qemu_decrypt, foreign[name]) for name in others]
        found = suite.clock.compare([suite.ours("sealed", "decrypt", derivation), cp, *sides])
        what = f"decrypt {suite.label} dense, {derivation} derivation"
        suite.row(what, found, "cp", 1.25, _SLACK)
        for name in others:
            suite.row(what, found, name, 0.25)
        suite.store.delete("sealed")
    for file in foreign.values():
        file.unlink()


def clone(suite: Suite) -> None:
    """A clone as it is, against cp: copied, and shared where the filesystem can."""
    with suite.images(golden=suite.dense(suite.size)) as files:
        cp = suite.peer("cp", peers.copy, files["golden"], reflink=True)
        found = suite.clock.compare([suite.ours("golden", "ignore"), cp])
        suite.row(f"clone {suite.label} dense as it is", found, "cp", 1.1)
    with _reflinking(suite) as other:
        if other is None:
            suite.results.remark("Cloning by reflink is not measured: mounting an XFS for it needs root.")
            return
        with other.images(golden=other.dense(suite.size // 2)) as files:
            cp = other.peer("cp", peers.copy, files["golden"], reflink=True)
            found = suite.clock.compare([other.ours("golden", "ignore"), cp])
            ours, peer = found["ours"], found["cp"]
            row = Row(f"clone {_label(suite.size // 2)} by reflink", "s", ours, "cp --reflink", peer, "at once", _SLACK)
            suite.results.add(row)


@contextmanager
def _reflinking(suite: Suite) -> Iterator[Suite | None]:
    """The suite on an XFS of its own; None where none can be mounted."""
    disk, point = suite.store.work / "xfs", suite.store.work / "mounted"
    with disk.open("wb") as file:
        file.truncate(2 * suite.size + (1 << 30))
    point.mkdir()
    try:
        run(["mkfs.xfs", "-q", "-m", "reflink=1", disk])
        run(["mount", "-o", "loop", disk, point])
    except (OSError, RuntimeError):
        yield None
    else:
        try:
            yield Suite(Store(point), suite.results, suite.size, suite.clock)
        finally:
            run(["umount", point])
    finally:
        point.rmdir()
        disk.unlink()


def checksum(suite: Suite) -> None:
    """A SHA-512 that was asked for runs beside the copy."""
    source = suite.dense(suite.size)
    digest = subprocess.run(["sha512sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    store = suite.store
    manifest = store.download("target", source, digest)
    ours = Contender("ours", lambda: store.ebi("apply", "-f", manifest), lambda: store.delete("target"))
    cp, sha512 = suite.peer("cp", peers.copy, source), Contender("sha512sum", lambda: peers.sha512(source))
    found = suite.clock.compare([ours, cp, sha512])
    longer = max(("cp", "sha512sum"), key=lambda name: found[name].median)
    suite.row(f"copy in {suite.label} with its SHA-512, beside the longer of the two", found, longer, 1.1, _SLACK)
    pairs = zip(found["cp"].all, found["sha512sum"].all, strict=True)
    both = Values(tuple(one + other for one, other in pairs))
    what = f"copy in {suite.label} with its SHA-512, beside one after the other"
    suite.results.add(Row(what, "s", found["ours"], "cp, then sha512sum", both, "less", both.median))
    source.unlink()


def longhorn(suite: Suite) -> None:
    """Against what Longhorn's way takes without its cipher, which needs loop devices, but no device-mapper."""
    if not loops():
        suite.results.remark("Longhorn's way without its cipher is not measured: it needs root and loop devices.")
        return
    for share in (0, 75):
        disk = content.with_holes(suite.store.work / "disk.raw", suite.size, suite.size * (100 - share) // 100)
        with suite.images(golden=disk) as files:
            for derivation in ("forced", "default"):
                peer = suite.peer(_UNCIPHERED, without_cipher, files["golden"], derivation=derivation)
                found = suite.clock.compare([suite.ours("golden", "encrypt", derivation), peer])
                what = f"encrypt {suite.label}, " + (f"{share} % holes" if share else "dense")
                suite.row(f"{what}, {derivation} derivation", found, _UNCIPHERED, 1 / least(share))


def sparse(suite: Suite) -> None:
    """The cost follows the data: 20 GiB with 256 MiB in it, against 256 MiB, raw and qcow2."""
    work = suite.store.work
    with suite.images(dense=suite.dense(_DATA), sparse=content.with_holes(work / "holes.raw", _VIRTUAL, _DATA)):
        _sparse(suite, "raw", "dense", "sparse")
    thin = content.with_holes(work / "thin.raw", _VIRTUAL, _DATA, compressible=True)
    thick = content.dense(work / "thick.raw", _DATA, compressible=True)
    for compression in ("zlib", "zstd"):
        small = content.qcow2(thick, work / "small.qcow2", compression)
        large = content.qcow2(thin, work / "large.qcow2", compression)
        with suite.images(dense=small, sparse=large):
            _sparse(suite, f"qcow2 ({compression})", "dense", "sparse")
    thin.unlink()
    thick.unlink()


def _sparse(suite: Suite, form: str, small: str, large: str) -> None:
    store = suite.store
    dense = Contender("dense", suite.ours(small, "encrypt", "forced").run, lambda: store.delete("target"))
    found = suite.clock.compare([suite.ours(large, "encrypt", "forced"), dense])
    what = f"encrypt 20 GiB virtual with 256 MiB of data, {form}"
    row = Row(what, "s", found["ours"], "256 MiB dense", found["dense"], "at most 2 x peer", 2 * found["dense"].median)
    suite.results.add(row)
    peaks = watched(store.command(*store.clone("target", large, "encrypt", "forced")), [store.data, store.work])
    taken = disk_usage(store.data / "images" / "target") / MIB
    asked = "at most 256 MiB + 5 % + 17 MiB"
    suite.results.add(Row(f"disk taken: {what}", "MiB", Values((taken,)), target=asked, limit=_MOST_DISK))
    peak = Values((peaks.disk / MIB,))
    suite.results.add(Row(f"most disk on the way: {what}", "MiB", peak, target="the same", limit=_MOST_DISK))
    store.delete("target")


def memory(suite: Suite) -> None:
    """Memory beside the key derivation's, whatever the size."""
    store, work = suite.store, suite.store.work
    for size in (suite.size // 8, suite.size):
        raw = suite.dense(size)
        packed = content.qcow2(raw, work / "packed.qcow2", "zstd")
        with suite.images(golden=raw, packed=packed):
            jobs = [("encrypt", "golden", "target"), ("decrypt", "target", "back"), ("encrypt", "packed", "target")]
            for encryption, source, name in jobs:
                command = store.command(*store.clone(name, source, encryption, "default"))
                peaks = watched(command, [])
                form = " of qcow2" if source == "packed" else ""
                _memory_row(suite, f"memory: {encryption} {_label(size)}{form}", peaks.memory, peaks.derivation)
                if name == "back":
                    store.delete("back")
                    store.delete("target")
            store.delete("target")


def _memory_row(suite: Suite, what: str, ours: int, derivation: int) -> None:
    row = Row(
        what, "MiB", Values((ours / MIB,)), "the derivation's own", Values((derivation / MIB,)), "at most 256 MiB",
        _MEMORY,
    )  # fmt: skip
    suite.results.add(row)


def together(suite: Suite) -> None:
    """Two operations at once: no slower than one after the other, and neither starves."""
    store, half = suite.store, suite.size // 2
    with suite.images(golden=suite.dense(half)):
        commands = [store.clone(name, "golden", "encrypt", "forced") for name in ("one", "two")]
        apart: list[float] = []
        last: list[float] = []
        unfair: list[float] = []

        def one_by_one() -> None:
            for command in commands:
                store.ebi(*command)

        def at_once() -> None:
            ends[:] = _at_once([store.command(*command) for command in commands])

        def clean() -> None:
            for name in ("one", "two"):
                store.delete(name)

        ends: list[float] = []
        for _ in range(suite.clock.rounds):
            apart.append(suite.clock.time(one_by_one, clean))
            last.append(suite.clock.time(at_once, clean))
            unfair.append(max(ends) / min(ends))
    after, both = Values(tuple(apart)), Values(tuple(last))
    what = f"encrypt two of {_label(half)} at once"
    limit = 1.1 * after.median
    suite.results.add(Row(what, "s", both, "one after the other", after, "at most 1.1 x peer", limit))
    worst = Values(tuple(unfair))
    asked = "at most 1.25"
    suite.results.add(Row(f"{what}: the slower's time over the faster's", "", worst, target=asked, limit=1.25))


def _at_once(commands: list[list[str | Path]]) -> list[float]:
    """Seconds from the common start to the end of each."""
    start = time.perf_counter()
    running = {subprocess.Popen(command, stdout=subprocess.DEVNULL).pid for command in commands}
    ends = []
    while running:
        pid, status = os.wait()
        if pid in running:
            running.remove(pid)
            ends.append(time.perf_counter() - start)
            assert status == 0, "an operation beside another failed"
    return ends


def plots(suite: Suite) -> None:
    """Throughput against size, and against the share of holes."""
    by_size: dict[str, list[tuple[float, float]]] = {}
    for size in (suite.size // 32, suite.size // 8, suite.size // 2):
        _throughput(suite, suite.dense(size), size, size / MIB, by_size)
    axis = "size of the dense image, MiB"
    suite.results.plots.append(Plot("size", "Encrypting a dense image", axis, "MiB/s, end to end", by_size, "x"))
    by_holes: dict[str, list[tuple[float, float]]] = {}
    size = suite.size // 4
    for share in (0, 25, 50, 75, 95):
        disk = content.with_holes(suite.store.work / "disk.raw", size, size * (100 - share) // 100)
        _throughput(suite, disk, size, share, by_holes)
    title = f"Encrypting an image of {_label(size)} with holes"
    suite.results.plots.append(Plot("holes", title, "share of holes, %", "MiB/s of the whole disk", by_holes, "y"))


def _throughput(suite: Suite, disk: Path, size: int, x: float, lines: dict[str, list[tuple[float, float]]]) -> None:
    with suite.images(golden=disk) as files:
        golden = files["golden"]
        contenders = [
            Contender(
                "ebi apply", suite.ours("golden", "encrypt", "default").run, lambda: suite.store.delete("target")
            ),
            suite.peer("cp with fsync (no encryption)", peers.copy, golden),
            suite.peer("qemu-img convert -O luks", peers.qemu_encrypt, golden),
        ]
        for name, seconds in suite.clock.compare(contenders, exactly=2).items():
            lines.setdefault(name, []).append((x, size / MIB / seconds.median))


def _label(size: int) -> str:
    return f"{size >> 30} GiB" if size % (1 << 30) == 0 else f"{size / MIB:g} MiB"


SECTIONS: dict[str, Callable[[Suite], None]] = {
    section.__name__: section for section in (crypt, longhorn, clone, checksum, sparse, memory, together, plots)
}
