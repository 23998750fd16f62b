"""Downloads from a server on loopback that is honest, slow, breaks off, or lies."""

import gc
import gzip
import logging
import os
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plugin.errors import EbiError, Kind
from plugin.images import guard
from plugin.images.image import BackingImage
from plugin.images.store import Images
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, Store, make_raw, manifest, sha512
from tests.unit.loopback import Answer, Server, serving

SIZE = 8 * MIB + 512
QUICK = Settings(download_retry_seconds=0.001, download_idle_seconds=0.2)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def raw(tmp_path: Path, server: Server) -> Path:
    path = make_raw(tmp_path / "raw", SIZE, [(0, 100 * KIB), (3 * MIB, MIB), (8 * MIB, 512)])
    server.content = path.read_bytes()
    return path


def download(store: Store, server: Server, path: str = "/file", checksum: str = "") -> BackingImage:
    return store.apply(manifest("golden", "download", checksum, url=server.url + path))


def with_settings(tmp_path: Path, settings: Settings) -> Store:
    return Store(tmp_path, Images(tmp_path / "images", settings))


@pytest.mark.parametrize("answer", [Answer(), Answer(chunked=True), Answer(until_closed=True), Answer(ranges=False)])
def test_the_file_arrives_byte_for_byte_and_sparse(store: Store, server: Server, raw: Path, answer: Answer) -> None:
    server.answers = [answer]
    image = download(store, server, checksum=sha512(raw))
    assert image.path.read_bytes() == raw.read_bytes()
    assert image.path.stat().st_blocks * 512 < 2 * MIB
    assert image.status.checksum == sha512(raw)


def test_a_checksum_is_case_sensitive_hex_and_must_fit(store: Store, server: Server, raw: Path) -> None:
    wrong = sha512(raw)[:-1] + ("0" if sha512(raw)[-1] != "0" else "1")
    with pytest.raises(EbiError, match=f"the checksum of backing image golden is {sha512(raw)}, and {wrong}") as caught:
        download(store, server, checksum=wrong)
    assert caught.value.kind is Kind.INVALID
    failed = store.images.get("golden")
    assert failed.status.state == "failed" and not failed.partial.exists()
    assert download(store, server, checksum=sha512(raw)).ready  # the manifest of a failed one may be corrected


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_connection_that_breaks_is_made_again_and_goes_on(
    store: Store, server: Server, raw: Path, *, chunked: bool, seed: int
) -> None:
    dice = random.Random(seed)
    server.answers = [Answer(cut=dice.randrange(3 * MIB), chunked=chunked) for _ in range(4)]
    image = download(store, server, checksum=sha512(raw))
    assert image.path.read_bytes() == raw.read_bytes()
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for _, headers in server.asked]
    assert len(starts) == 5 and starts == sorted(starts) and starts[-1] > 0
    assert all(headers["If-Range"] == '"1"' for _, headers in server.asked[1:])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Answer(cut=MIB + 7), Answer(ranges=False)),
        (Answer(cut=3 * MIB), Answer(status=206, headers={"Content-Range": f"bytes 5-{SIZE - 1}/{SIZE}"})),
        (Answer(cut=3 * MIB), Answer(status=206, headers={"Content-Range": f"bytes {3 * MIB}-{SIZE}/{SIZE + 1}"})),
        (Answer(cut=3 * MIB), Answer(status=206, headers={"Content-Range": "nonsense"})),
        (Answer(cut=3 * MIB), Answer(status=206, headers={"Content-Type": "multipart/byteranges"})),
        (Answer(cut=3 * MIB), Answer(headers={"ETag": '"2"'})),
        (Answer(cut=3 * MIB), Answer(status=416)),
        (Answer(cut=3 * MIB), Answer(more=b"x" * 1000)),
        (Answer(cut=3 * MIB, headers={"ETag": 'W/"1"', "Last-Modified": ""}), Answer()),
        (Answer(cut=3 * MIB, headers={"ETag": "", "Last-Modified": "Sat, 01 Jan 2122 00:00:00 GMT"}), Answer()),
    ],
    ids=(
        "200-instead", "other-part", "other-size", "no-range", "multipart", "other-version", "416", "more-than-told",
        "weak-tag", "fresh-date",
    ),
)  # fmt: skip
def test_what_is_no_continuation_begins_again(
    store: Store, server: Server, raw: Path, first: Answer, second: Answer
) -> None:
    server.answers = [first, second]
    assert download(store, server, checksum=sha512(raw)).path.read_bytes() == raw.read_bytes()


def test_a_date_serves_where_the_tag_is_weak(store: Store, server: Server, raw: Path) -> None:
    server.tag = 'W/"1"'
    server.answers = [Answer(cut=3 * MIB)]
    assert download(store, server, checksum=sha512(raw)).path.read_bytes() == raw.read_bytes()
    assert server.asked[1][1]["If-Range"] == server.modified and server.asked[1][1]["Range"] == f"bytes={3 * MIB}-"


def test_a_file_that_changes_meanwhile_is_never_mixed(store: Store, server: Server, raw: Path) -> None:
    other = os.urandom(5 * MIB)

    class Changing(list[Answer]):
        def pop(self, _: Any = -1) -> Answer:
            answer = super().pop(0)
            if not self:  # the last of them finds another file
                server.content, server.tag = other, '"2"'
            return answer

    server.answers = Changing([Answer(cut=3 * MIB), Answer(cut=MIB), Answer()])
    image = download(store, server)
    assert image.path.read_bytes() == other and image.virtual_size == len(other)


def test_a_size_that_is_told_too_large_is_a_broken_download(store: Store, server: Server, raw: Path) -> None:
    server.rest = Answer(headers={"Content-Length": str(SIZE + 512)}, ranges=False)
    with pytest.raises(EbiError, match=r"the download of .*/file (failed|broke off)") as caught:
        download(store, server)
    assert caught.value.kind is Kind.UNAVAILABLE


def test_a_size_that_is_told_too_small_is_found_by_the_checksum(store: Store, server: Server, raw: Path) -> None:
    server.rest = Answer(headers={"Content-Length": str(SIZE - 512)})
    with pytest.raises(EbiError, match="the checksum of backing image golden is"):
        download(store, server, checksum=sha512(raw))


# urllib3 leaves the socket of an answer with two lengths to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 30, "5, 6"])
def test_a_length_that_is_none_is_not_believed(store: Store, server: Server, raw: Path, length: str) -> None:
    server.rest = Answer(headers={"Content-Length": length})
    try:
        assert download(store, server, checksum=sha512(raw)).path.read_bytes() == raw.read_bytes()
    except EbiError as error:
        assert error.kind is Kind.UNAVAILABLE
    gc.collect()


def test_a_size_that_no_disk_has_is_refused_at_once(store: Store, server: Server, raw: Path) -> None:
    server.rest = Answer(headers={"Content-Length": str(1 << 58)})
    with pytest.raises(EbiError, match=r"backing image golden needs .* MiB of disk, and") as caught:
        download(store, server)
    assert caught.value.kind is Kind.EXHAUSTED
    assert len(server.asked) == 1


def test_what_comes_without_a_size_is_checked_as_it_grows(
    store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = os.urandom(4 * MIB)
    server.rest = Answer(chunked=True)
    found = os.statvfs(store.work)
    blocks = 18 * MIB // found.f_frsize
    little = os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, blocks, blocks, *found[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: little)
    with pytest.raises(EbiError, match="golden needs 10 MiB of disk, and 18 MiB are free") as caught:
        download(store, server)
    assert caught.value.kind is Kind.EXHAUSTED
    assert [entry.name for entry in store.images.get("golden").directory.iterdir()] == ["record.json"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(store: Store, server: Server, raw: Path, status: int) -> None:
    server.answers = [Answer(status=status, headers={"Retry-After": "0"})] * 3
    assert download(store, server, checksum=sha512(raw)).ready and len(server.asked) == 4


def test_a_server_that_asks_for_patience_is_given_it(
    store: Store, server: Server, raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.answers = [Answer(status=503, headers={"Retry-After": "1"}), Answer(cut=100)]
    with caplog.at_level(logging.WARNING, "plugin.images.http"):
        assert download(store, server, "/file?token=hidden", sha512(raw)).ready
    told = [record.getMessage() for record in caplog.records]
    assert [text.rpartition("; ")[2] for text in told] == ["trying again in 1.0 s", "trying again in 0.0 s"]
    assert "the server answered 503 for" in told[0] and "hidden" not in caplog.text


def test_enough_is_enough(tmp_path: Path, server: Server, raw: Path) -> None:
    server.rest = Answer(cut=1000)
    store = with_settings(tmp_path, replace(QUICK, download_retries=2))
    with pytest.raises(EbiError, match=r"the download of http://127\.0\.0\.1:\d+/a (failed|broke off)") as caught:
        download(store, server, "/a?token=hidden#there")
    assert caught.value.kind is Kind.UNAVAILABLE and len(server.asked) == 3
    assert "hidden" not in str(caught.value) + str(store.images.get("golden").status)


def test_whoever_gets_further_each_time_is_not_given_up(tmp_path: Path, server: Server, raw: Path) -> None:
    server.rest = Answer(cut=2 * MIB)
    store = with_settings(tmp_path, replace(QUICK, download_retries=1))
    assert download(store, server, checksum=sha512(raw)).ready and len(server.asked) == 5


def test_silence_ends_an_attempt(tmp_path: Path, server: Server, raw: Path) -> None:
    server.answers = [Answer(cut=MIB, stall=True), Answer(cut=2 * MIB, stall=True)]
    store = with_settings(tmp_path, QUICK)
    assert download(store, server, checksum=sha512(raw)).path.read_bytes() == raw.read_bytes()
    assert [headers.get("Range") for _, headers in server.asked] == [None, f"bytes={MIB}-", f"bytes={3 * MIB}-"]


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "in-trouble"])
def test_deleting_ends_a_download_that_waits(tmp_path: Path, server: Server, raw: Path, *, silent: bool) -> None:
    server.rest = Answer(cut=MIB, stall=True) if silent else Answer(status=503, headers={"Retry-After": "30"})
    store = with_settings(tmp_path, Settings())
    caught: list[EbiError] = []

    def make() -> None:
        try:
            download(store, server)
        except EbiError as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    while not server.asked:
        thread.join(0.01)
    store.images.delete("golden")
    thread.join(30)
    assert not thread.is_alive() and caught[0].kind is Kind.CANCELLED
    assert not (tmp_path / "images" / "golden").exists()


@pytest.mark.parametrize("where", ["/other", "other", "//{host}/other", "{url}/other?x=y", "?page=2"])
def test_redirects_are_followed(store: Store, server: Server, raw: Path, where: str) -> None:
    where = where.format(url=server.url, host=server.url.partition("//")[2])
    server.answers = [Answer(status=status, headers={"Location": where}) for status in (301, 302, 303, 307, 308)]
    assert download(store, server, checksum=sha512(raw)).ready and len(server.asked) == 6


@pytest.mark.parametrize(
    ("where", "words", "kind"),
    [
        ("/file", "/file redirects more than 10 times", Kind.UNAVAILABLE),
        ("file:///etc/hostname?hidden", "redirects to file:///etc/hostname$", Kind.INVALID),
        ("ftp://user:hidden@host/x", "redirects to ftp://host/x$", Kind.INVALID),
        ("gopher://host/hidden@x", "redirects to gopher:", Kind.INVALID),
        ("http://[::1/hidden", "redirects to something that is no URL", Kind.INVALID),
        ("http://a:99999/?hidden", "http://a:99999/ is no URL", Kind.INVALID),
        (f"http://{'a' * 70}.example/?hidden", "is no URL", Kind.INVALID),
    ],
)
def test_redirects_to_nowhere_are_said(
    store: Store, server: Server, raw: Path, where: str, words: str, kind: Kind
) -> None:
    server.rest = Answer(status=302, headers={"Location": where})
    with pytest.raises(EbiError) as caught:
        download(store, server, "/file?hidden=hidden")
    assert caught.value.kind is kind
    assert caught.match(words.removesuffix("$")) and "hidden=" not in str(caught.value)
    assert "user" not in str(caught.value) and "?" not in caught.value.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, Kind.NOT_FOUND), (410, Kind.NOT_FOUND), (403, Kind.INVALID), (400, Kind.INVALID), (501, Kind.UNAVAILABLE)],
)
def test_a_refusal_is_said_at_once(store: Store, server: Server, raw: Path, status: int, kind: Kind) -> None:
    server.rest = Answer(status=status)
    with pytest.raises(EbiError, match=f"the server answered {status} for") as caught:
        download(store, server)
    assert caught.value.kind is kind and len(server.asked) == 1
    failed = store.images.get("golden")
    assert failed.status.state == "failed" and caught.value.message in failed.status.message


def test_a_content_encoding_is_not_undone(store: Store, server: Server, raw: Path) -> None:
    server.rest = Answer(headers={"Content-Encoding": "gzip"})
    assert download(store, server, checksum=sha512(raw)).path.read_bytes() == raw.read_bytes()


def test_nobody_listening_is_said(store: Store) -> None:
    with pytest.raises(EbiError, match=r"the download of http://127\.0\.0\.1:1/x failed: .*refused") as caught:
        store.apply(manifest("golden", "download", url="http://127.0.0.1:1/x"))
    assert caught.value.kind is Kind.UNAVAILABLE


@pytest.mark.parametrize("size", [0, 100, 513])
def test_a_disk_is_whole_sectors(store: Store, server: Server, size: int) -> None:
    server.content = bytes(size)
    with pytest.raises(EbiError, match=f"has {size} bytes"):
        download(store, server)


class TestTheGuard:
    """Where the settings say so, nothing of this machine can be read."""

    @pytest.fixture
    def guarded(self, tmp_path: Path) -> Store:
        return with_settings(tmp_path, replace(QUICK, allow_loopback=False, download_retries=0))

    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "localhost", "[::1]", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]",
                 "169.254.169.254", "[fe80::1]", "[::]", "2130706433", "LOCALHOST.", "a.localhost"],
    )  # fmt: skip
    def test_names_of_this_machine_are_refused(self, guarded: Store, server: Server, host: str) -> None:
        server.content = bytes(MIB)
        with pytest.raises(EbiError, match="of the download URL of backing image golden is this machine") as caught:
            guarded.apply(manifest("golden", "download", url=f"http://{host}:{server.server_address[1]}/file"))
        assert caught.value.kind is Kind.INVALID
        assert server.connections == 0
        assert not (guarded.work / "images" / "golden").exists()

    def test_a_redirect_is_no_way_around_it(
        self, guarded: Store, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "is_this_machine", lambda address, *_: address == "127.0.0.2")
        server.rest = Answer(status=302, headers={"Location": server.url.replace("127.0.0.1", "127.0.0.2") + "/x"})
        with pytest.raises(EbiError, match=r"the host 127\.0\.0\.2 of the download URL is this machine"):
            download(guarded, server)
        assert [path for path, _ in server.asked] == ["/file"]

    def test_nor_is_a_name_that_becomes_another_address(
        self, guarded: Store, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked_up: list[str] = []

        def answer(host: str, port: int | None, *_: object, flags: int = 0, **__: object) -> list[tuple[object, ...]]:
            if flags & socket.AI_NUMERICHOST:
                raise socket.gaierror
            looked_up.append(host)
            address = "192.0.2.1" if len(looked_up) == 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", answer)
        url = f"http://rebound.example:{server.server_address[1]}/file"
        with pytest.raises(EbiError, match=r"the host rebound\.example of the download URL is this machine"):
            guarded.apply(manifest("golden", "download", url=url))
        assert len(looked_up) == 2 and server.asked == []

    def test_an_address_of_this_machine_is_known_by_the_kernel_s_choice(self) -> None:
        assert guard.is_this_machine("192.0.2.7", "192.0.2.7") and not guard.is_this_machine("192.0.2.7", "192.0.2.8")

    def test_files_are_off_limits_too(self, tmp_path: Path, raw: Path) -> None:
        store = with_settings(tmp_path, Settings(allow_files=False))
        with pytest.raises(EbiError, match="names a file of this machine"):
            store.download(raw)
        assert not (tmp_path / "images" / "golden").exists()


def test_gzip_in_a_content_encoding_is_unpacked_by_its_mark(store: Store, server: Server, raw: Path) -> None:
    server.content = gzip.compress(raw.read_bytes())
    server.rest = Answer(headers={"Content-Encoding": "gzip"})
    assert download(store, server).path.read_bytes() == raw.read_bytes()
