"""Files that somebody has tampered with: an error each time, or right bytes; never a hang, never anything else.

EBI_FUZZ_EXAMPLES sets how many files of each kind are tried (default 25).
"""

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugin.errors import EbiError, Kind
from plugin.images import qcow2
from plugin.images.disk import Source
from plugin.images.formats import Format, opened
from plugin.luks import backup, header, keyslots, metadata
from plugin.luks.parameters import Pbkdf, SecretParameters
from tests.unit.conftest import KIB, MIB, make_raw

EXAMPLES = int(os.environ.get("EBI_FUZZ_EXAMPLES", "25"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MOST = 64 * MIB  # bytes of a disk that are read

Mutation = Callable[[bytearray], None]


class Whole:
    """A file as it was before; hypothesis would show all of its bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __repr__(self) -> str:
        return "whole"


def replaced(offset: int, value: bytes) -> Mutation:
    def mutate(data: bytearray) -> None:
        if 0 <= offset <= len(data) - len(value):
            data[offset : offset + len(value)] = value

    return mutate


def cut(length: int) -> Mutation:
    def mutate(data: bytearray) -> None:
        del data[length:]

    return mutate


def numbers(bits: int, size: int) -> st.SearchStrategy[int]:
    """Numbers of so many bits: any, near the edges, near places in a file of `size` bytes, and with flags on them."""
    top = (1 << bits) - 1
    near = st.builds(
        lambda base, off: (base + off) & top, st.sampled_from([0, 512, size, top, top >> 1]), st.integers(-2, 2)
    )
    place = st.integers(0, 2 * size // 512).map(lambda sector: sector * 512 & top)
    flags = st.builds(lambda value, bit: value ^ 1 << bit, st.one_of(place, near), st.integers(0, bits - 1))
    return st.one_of(st.integers(0, top), near, place, flags)


class TestQcow2:
    """Headers, tables and data of qcow2 files."""

    FIELDS = ((0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4),
              (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1))  # fmt: skip
    KINDS: ClassVar = {
        "v2": ["-o", "compat=0.10,cluster_size=512"],
        "v3": ["-o", "cluster_size=4096"],
        "subclusters": ["-o", "extended_l2=on,cluster_size=16k"],
        "zlib": ["-c", "-o", "cluster_size=4096"],
        "zstd": ["-c", "-o", "cluster_size=64k,compression_type=zstd"],
    }

    @pytest.fixture(scope="class", params=KINDS)
    @classmethod
    def whole(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
        work = tmp_path_factory.mktemp("fuzz")
        raw = make_raw(work / "raw", MIB + 512, [(0, 20 * KIB), (300 * KIB, 5 * KIB), (MIB, 512)])
        with raw.open("r+b") as file:
            file.seek(600 * KIB)
            file.write(b"text that compresses" * 5000)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *cls.KINDS[request.param]]
        subprocess.run([*command, raw, work / "qcow2"], check=True, capture_output=True)
        return Whole((work / "qcow2").read_bytes())

    @staticmethod
    def entries(data: bytes) -> list[int]:
        """Where the entries of the tables are: those of the first level, those of the second that are not zero."""
        bits, count, first = (
            struct.unpack_from(kind, data, at)[0] for kind, at in ((">I", 20), (">I", 36), (">Q", 40))
        )
        found = [first + 8 * number for number in range(count)]
        for at in list(found):
            table = struct.unpack_from(">Q", data, at)[0] & 0x00FF_FFFF_FFFF_FE00
            if table:
                found += [at for at in range(table, table + (1 << bits), 8) if data[at : at + 8] != bytes(8)]
        return found

    def mutations(self, data: bytes) -> st.SearchStrategy[list[Mutation]]:
        number = st.sampled_from(self.FIELDS).flatmap(
            lambda where: numbers(8 * where[1], len(data)).map(
                lambda value: replaced(where[0], value.to_bytes(where[1], "big"))
            )
        )
        entry = st.builds(
            lambda at, value: replaced(at, value.to_bytes(8, "big")),
            st.sampled_from(self.entries(data)),
            numbers(64, len(data)),
        )
        flip = st.builds(
            lambda at, bit: replaced(at, bytes([data[at] ^ 1 << bit])),
            st.sampled_from(self.entries(data)).flatmap(lambda at: st.integers(at, at + 7)),
            st.integers(0, 7),
        )
        anywhere = st.builds(
            lambda at, value: replaced(at, bytes([value])), st.integers(0, len(data) - 1), st.integers(0, 255)
        )
        end = st.integers(0, len(data)).map(cut)
        return st.lists(st.one_of(number, entry, entry, flip, flip, anywhere, end), min_size=1, max_size=4)

    @fuzz
    @given(data=st.data())
    def test_an_error_or_what_qemu_reads(self, whole: Whole, tmp_path: Path, data: st.DataObject) -> None:
        copy = bytearray(whole.data)
        for mutate in data.draw(self.mutations(whole.data)):
            mutate(copy)
        path = tmp_path / "broken"
        path.write_bytes(copy)
        content = self.content(path, len(copy))
        if content is None or data.draw(st.integers(0, 3)):  # qemu-img is slow to start
            return
        command = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, tmp_path / "theirs"]
        if subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0:
            assert content == (tmp_path / "theirs").read_bytes()

    @staticmethod
    def content(path: Path, size: int) -> bytes | None:
        """The disk, None where it is refused, too large to be compared, or not all there."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(qcow2, "os", _Within(size))
            try:
                with opened(path, Format.QCOW2) as source:
                    return read(source)
            except EbiError as error:
                assert error.kind in (Kind.INVALID, Kind.UNSUPPORTED), error
                return None


class _Within:
    """`os` for a reader of a file of `size` bytes: it must not want to read anywhere else, nor very often."""

    def __init__(self, size: int) -> None:
        self._size, self._left = size, 200_000

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._check(length, offset)
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._check(sum(len(buffer) for buffer in buffers), offset)
        return os.preadv(fd, buffers, offset)

    def _check(self, length: int, offset: int) -> None:
        self._left -= 1
        assert 0 <= offset <= self._size and (offset + length <= self._size or offset == 0)
        assert length <= 32 * MIB and self._left


def read(source: Source) -> bytes | None:
    """All of a disk; of a larger one some of its data."""
    assert source.size > 0 and source.size % 512 == 0
    at, runs = 0, []
    for run in source.extents():
        assert at <= run.start < run.end <= source.size
        at = run.end
        if len(runs) < 100:
            runs.append(run)
    if source.size > MOST:
        for run in runs:
            source.read(memoryview(bytearray(min(run.length, 64 * KIB))), run.start)
        return None
    data = bytearray(source.size)
    source.read(memoryview(data), 0)
    return bytes(data)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=5),
    st.integers(),
    numbers(64, 16 * MIB).map(str),
    st.sampled_from(["dynamic", "crypt", "luks2", "pbkdf2", "-1", "1e9", "٣", "9" * 5000, 10**400]),
)
JSON = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=2), st.dictionaries(st.sampled_from(["0", "1", "x", ""]), PLAIN, max_size=2)
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON document: the dict or list, and the key or index."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)


class TestLuks2:
    """Binary headers and their JSON, with checksums that are right."""

    FIELDS = ((0, 6), (6, 2), (8, 8), (16, 8), (24, 48), (72, 32), (104, 64), (168, 40), (208, 48), (256, 8))
    PARAMETERS = SecretParameters(b"fuzz", pbkdf=Pbkdf("pbkdf2", 1000))

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory) -> Whole:
        path = tmp_path_factory.mktemp("fuzz") / "luks"
        path.touch()
        os.truncate(path, 16 * MIB + 64 * KIB)
        header.create(path, cls.PARAMETERS, bytes(32), sector_size=512, owner="it")
        with path.open("rb") as file:
            return Whole(file.read(32 * KIB))

    @staticmethod
    def put(path: Path, copies: list[int], binary: bytes, area: bytes) -> None:
        """Write the header at each of `copies`, its checksum made right."""
        for at in copies:
            own = bytearray(binary)
            if at:
                own[:6] = binary[:6].replace(b"LUKS", b"SKUL")
                own[256:264] = (at if own[256:264] == bytes(8) else int.from_bytes(own[256:264], "big")).to_bytes(
                    8, "big"
                )
            own[448:512] = bytes(64)
            own[448:480] = hashlib.sha256(own + area).digest()
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), own + area, at)

    FIELD = st.sampled_from(FIELDS).flatmap(
        lambda where: st.one_of(
            st.binary(min_size=where[1], max_size=where[1]),
            numbers(8 * where[1], 16384).map(lambda number: number.to_bytes(where[1], "big")),
        ).map(lambda value: replaced(where[0], value))
    )
    NONSENSE = st.one_of(st.binary(max_size=100), st.sampled_from([b"[", b'{"a":']).map(lambda part: part * 2400))

    @fuzz
    @given(
        fields=st.lists(FIELD, max_size=2),
        changes=st.lists(st.tuples(st.integers(0, 1 << 30), st.one_of(st.none(), JSON, JSON)), max_size=3),
        area=st.one_of(st.none(), st.none(), st.none(), st.none(), NONSENSE),
        copies=st.sampled_from([[0, 16384], [0, 16384], [0], [16384]]),
        end=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 16 * MIB + 64 * KIB)),
    )
    def test_an_error_or_a_header_that_makes_sense(
        self,
        whole: Whole,
        tmp_path: Path,
        fields: list[Mutation],
        changes: list[tuple[int, Any]],
        area: bytes | None,
        copies: list[int],
        end: int | None,
    ) -> None:
        binary, document = bytearray(whole.data[:4096]), json.loads(whole.data[4096:16384].split(b"\0", 1)[0])
        for mutate in fields:
            mutate(binary)
        for number, value in changes:
            found = list(places(document)) or [(document, "x")]
            inside, key = found[number % len(found)]
            if value is None and isinstance(inside, dict):
                inside.pop(key, None)
            else:
                inside[key] = value
        text = json.dumps(document).encode() if area is None else area
        path = tmp_path / "broken"
        path.write_bytes(whole.data)
        os.truncate(path, 16 * MIB + 64 * KIB)
        self.put(path, copies, bytes(binary), text[:12288].ljust(12288, b"\0"))
        if end is not None:
            os.truncate(path, end)
        for use in (self.reads, self.opens, self.lists, self.backs_up):
            try:
                use(path)
            except EbiError as error:
                assert error.kind in (Kind.INVALID, Kind.UNSUPPORTED), error

    @staticmethod
    def reads(path: Path) -> None:
        found = metadata.read(path)
        assert found.payload_offset >= 0 and found.sector_size in (512, 1024, 2048, 4096) and found.key_size >= 0
        assert metadata.damaged(path) in ([], ["primary"], ["secondary"])

    @staticmethod
    def opens(path: Path) -> None:
        for key in (None, bytes(32)):
            with opened(path, Format.LUKS, key) as source:
                assert source.size > 0
                if key:
                    read(source)

    @staticmethod
    def lists(path: Path) -> None:
        for slot in keyslots.listed(metadata.read(path)):
            assert slot.number >= 0
        metadata.costs(path)

    @staticmethod
    def backs_up(path: Path) -> None:
        saved = path.with_name("saved")
        saved.unlink(missing_ok=True)
        backup.save(path, saved, "it")
        backup.restore(saved, path, "it", metadata.read(path))
