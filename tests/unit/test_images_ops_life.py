"""Cancelling, queueing, claims on disk space, and the events in an image's record."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugin import events
from plugin.errors import EbiError, Kind
from plugin.host.lock import locked
from plugin.images import engine, export, health, integrity, operations, progress, slots, space
from plugin.images.http import Download
from plugin.images.image import BackingImage, State
from plugin.images.progress import Progress
from plugin.images.sums import Sum
from plugin.settings import Settings
from tests.unit.conftest import MIB, Store, clone, make_raw, manifest


@pytest.fixture
def golden(store: Store) -> Store:
    store.download(make_raw(store.work / "raw", 8 * MIB, [(0, 4 * MIB)]))
    return store


def test_deleting_stops_whoever_makes_it(golden: Store) -> None:
    caught: list[EbiError] = []
    started = threading.Event()

    def endless() -> Download:
        def pieces():  # type: ignore[no-untyped-def]
            while True:
                started.set()
                time.sleep(0.02)
                yield os.urandom(4096)

        return Download(None, pieces())

    def make() -> None:
        try:
            golden.images.upload(manifest("x", "upload"), endless())
        except EbiError as error:
            caught.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    assert started.wait(30)
    directory = golden.images.get("x").directory
    golden.images.delete("x")
    thread.join(30)
    assert not thread.is_alive() and not directory.exists()
    assert caught[0].kind is Kind.CANCELLED and "backing image x was cancelled" in caught[0].message
    with pytest.raises(EbiError, match="not found"):
        golden.images.get("x")


def test_a_third_operation_waits_for_its_turn(golden: Store) -> None:
    root = golden.images.get("golden").directory.parent
    heard: list[Progress] = []
    with slots.slot(root, lambda: None):
        with slots.slot(root, lambda: None):
            thread = threading.Thread(
                target=golden.images.apply, args=(clone("e", "golden", "encrypt"), golden.secrets, heard.append)
            )
            thread.start()
            until = time.monotonic() + 30
            while not heard and time.monotonic() < until:
                time.sleep(0.02)
            waiting = golden.images.get("e").status
            assert (waiting.state, "waits" in waiting.message) == (State.PENDING, True)
        thread.join(60)
    assert golden.images.get("e").ready and golden.images.get("e").status.message == ""


@pytest.mark.parametrize("name", ["export", "verify"])
def test_so_does_one_that_makes_no_image_and_the_image_can_be_used_meanwhile(golden: Store, name: str) -> None:
    work: dict[str, Callable[[], object]] = {
        "export": lambda: export.export(
            golden.images, Settings(), "golden", golden.work / "out", progress=heard.append
        ),
        "verify": lambda: integrity.verify(golden.images, Settings(), "golden", heard.append),
    }
    heard: list[Progress] = []
    with slots.slot(golden.images.root, lambda: None):
        with slots.slot(golden.images.root, lambda: None):
            thread = threading.Thread(target=work[name])
            thread.start()
            time.sleep(1)
            with golden.images.ready("golden"):
                assert {told.state for told in heard} == {State.PENDING}
        thread.join(60)
    assert not thread.is_alive()
    begun = next(told for told in heard if told.state is State.IN_PROGRESS)
    assert begun.seconds < 1, "the wait is no part of its speed"


def test_one_that_waits_can_be_deleted(golden: Store) -> None:
    root = golden.images.get("golden").directory.parent
    caught: list[EbiError] = []

    def make() -> None:
        try:
            golden.apply(clone("e", "golden"))
        except EbiError as error:
            caught.append(error)

    with slots.slot(root, lambda: None), slots.slot(root, lambda: None):
        thread = threading.Thread(target=make)
        thread.start()
        until = time.monotonic() + 30
        while not (root / "e" / "record.json").exists() and time.monotonic() < until:
            time.sleep(0.02)
        golden.images.delete("e")
        thread.join(30)
    assert caught[0].kind is Kind.CANCELLED and not (root / "e").exists()


def test_a_killed_process_holds_no_slot_and_none_is_left(tmp_path: Path) -> None:
    child = "import os, sys; from pathlib import Path; from plugin.images.slots import slot\n"
    child += "with slot(Path(sys.argv[1]), lambda: None): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", child, tmp_path], check=False).returncode == -9
    waited: list[int] = []
    with slots.slot(tmp_path, lambda: waited.append(1)), slots.slot(tmp_path, lambda: waited.append(2)):
        assert waited == []
        assert len([*tmp_path.iterdir()]) == 2
    assert [*tmp_path.iterdir()] == []


def test_what_others_have_claimed_is_not_free(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.apply(clone("other", "golden"))
    found = os.statvfs(golden.work)
    blocks = 100 * MIB // found.f_frsize
    little = os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, blocks, blocks, *found[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: little)
    other = golden.images.get("other").directory
    (other / space.CLAIM).write_text(f"{90 * MIB} image.partial")
    golden.apply(clone("x", "golden", "encrypt"))  # a claim that nobody holds any more
    golden.images.delete("x")
    with locked(other, "it"):
        (other / "image.partial").write_bytes(os.urandom(2 * MIB))
        with pytest.raises(EbiError, match="x needs 20 MiB of disk, and 12 MiB are free beside the 88 MiB") as caught:
            golden.apply(clone("x", "golden", "encrypt"))
    assert caught.value.kind is Kind.EXHAUSTED
    assert not (golden.images.get("golden").directory / space.CLAIM).exists()


class TestUnpacking:
    """A qcow2 image's disk, laid out beside it for its volumes while the image stays ready."""

    @pytest.fixture
    def packed(self, golden: Store) -> BackingImage:
        raw, qcow2 = golden.images.get("golden").path, golden.work / "qcow2"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
        return golden.download(qcow2, "packed")

    @pytest.fixture
    def meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
        """What is done when it has begun, before a byte is written."""
        todo: list[Callable[[], None]] = []
        copy = engine.copy

        def watched(*given: Any, **named: Any) -> list[Sum]:
            while todo:
                todo.pop()()
            return copy(*given, **named)

        monkeypatch.setattr(engine, "copy", watched)
        return todo

    def test_space_is_claimed_and_what_others_claimed_is_not_free(
        self,
        golden: Store,
        packed: BackingImage,
        meanwhile: list[Callable[[], None]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        found = os.statvfs(golden.work)
        blocks = 39 * MIB // found.f_frsize
        little = os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, blocks, blocks, *found[5:]))
        monkeypatch.setattr(os, "fstatvfs", lambda _: little)
        monkeypatch.setattr(operations, "reserve", lambda *_: False)
        other = golden.images.get("golden").directory
        (other / space.CLAIM).write_text(f"{30 * MIB} image.partial")
        (other / "image.partial").touch()
        with locked(other, "it"), pytest.raises(EbiError, match=r"packed needs .* beside the 30 MiB") as caught:
            golden.images.raw("packed")
        assert caught.value.kind is Kind.EXHAUSTED

        def encrypt() -> None:
            with pytest.raises(EbiError, match="beside the 4 MiB that other operations will take"):
                golden.apply(clone("x", "golden", "encrypt"))

        meanwhile.append(encrypt)
        golden.images.raw("packed")
        assert not meanwhile and [entry.name for entry in packed.disk.parent.iterdir()] == ["disk"]

    def test_it_is_told_of(
        self,
        golden: Store,
        packed: BackingImage,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
        monkeypatch.setattr(progress, "_TELL_EVERY", 0.0)
        caplog.set_level("INFO")
        heard: list[events.Event] = []
        unsubscribe = events.subscribe(heard.append)
        golden.images.raw("packed")
        unsubscribe()
        operation = heard[-1]
        assert isinstance(operation, events.ImageOperation)
        assert (operation.name, operation.size, operation.ok) == ("unpack", 4 * MIB, True)
        assert "unpacking backing image packed: 99 %, " in caplog.text
        assert golden.images.get("packed") == packed

    def test_a_failure_names_the_image_and_leaves_nothing(
        self, golden: Store, packed: BackingImage, meanwhile: list[Callable[[], None]]
    ) -> None:
        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        meanwhile.append(full)
        with pytest.raises(
            EbiError, match="the unpacking of backing image packed failed: No space left on device"
        ) as got:
            golden.images.raw("packed")
        assert got.value.kind is Kind.EXHAUSTED
        assert [*packed.disk.parent.iterdir()] == []
        assert golden.images.raw("packed").exists()

    def test_the_doctor_finds_nothing_wrong_with_it(
        self, golden: Store, packed: BackingImage, meanwhile: list[Callable[[], None]]
    ) -> None:
        def look() -> None:
            assert packed.disk.with_suffix(".partial").exists()
            assert [*health.examine(golden.images)] == []

        meanwhile.append(look)
        golden.images.raw("packed")
        packed.disk.with_suffix(".partial").touch()
        assert [found.kind for found in health.examine(golden.images)] == ["partial"]


def test_events_tell_an_image_s_story(golden: Store) -> None:
    document = manifest("x", "download", url=(golden.work / "late").as_uri())
    with pytest.raises(EbiError):
        golden.apply(document)
    make_raw(golden.work / "late", MIB, [(0, MIB)])
    image = golden.apply(document)
    told = [(event.type, event.message.partition(":")[0]) for event in image.status.events]
    normal = [("Normal", "starting"), ("Normal", "in-progress"), ("Normal", "ready")]
    assert told == [normal[0], ("Warning", "failed"), *normal]
    value = golden.images.get("x").to_object()["status"]["events"]
    assert len(value) == 5 and set(value[0]) == {"time", "type", "message"}
    assert golden.images.get("x") == image


def test_only_the_last_events_stay(golden: Store) -> None:
    image = golden.images.get("golden")
    for number in range(30):
        image = image.noted(str(number))
    assert [event.message for event in image.status.events] == [str(number) for number in range(10, 30)]


def test_speed_and_time_left_are_told() -> None:
    progress = Progress(State.IN_PROGRESS, 100 * MIB, 400 * MIB, 2.0)
    assert progress.text == "50 MiB/s, 6 s left"
    assert Progress(State.IN_PROGRESS, 100 * MIB, 0, 2.0).text == "50 MiB/s"
