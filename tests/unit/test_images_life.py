"""An image's life: made once, made again after a failure or a kill, used, deleted."""

import errno
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from plugin import events
from plugin.errors import EbiError, Kind, unavailable
from plugin.host.files import Extent
from plugin.host.lock import is_locked, locked
from plugin.images import engine, operations
from plugin.images.disk import Disk
from plugin.images.image import BackingImage, State
from plugin.images.progress import Progress
from plugin.images.store import Images
from plugin.images.sums import Sum
from plugin.images.target import Target, TargetSpec
from plugin.settings import Settings
from tests.unit.conftest import MIB, Store, clone, make_raw, manifest, sha512


@pytest.fixture
def golden(store: Store) -> Store:
    store.download(make_raw(store.work / "raw", 8 * MIB, [(0, 3 * MIB), (6 * MIB, MIB)]))
    return store


def interrupted(store: Store, name: str) -> BackingImage:
    """Make the image's record and files look as a kill in the middle leaves them."""
    image = store.images.get(name)
    record = (image.directory / "record.json").read_text()
    (image.directory / "record.json").write_text(record.replace('"ready"', '"in-progress"'))
    image.path.rename(image.partial)
    os.truncate(image.partial, MIB)
    return image


def test_the_object_tells_what_kubernetes_users_expect(golden: Store) -> None:
    image = golden.apply(clone("e", "golden", "encrypt"))
    value = image.to_object()
    assert (value["apiVersion"], value["kind"]) == ("longhorn.io/v1beta2", "BackingImage")
    assert value["metadata"]["name"] == "e" and value["metadata"]["creationTimestamp"].endswith("Z")
    status = value["status"]
    assert (status["state"], status["progress"], status["message"]) == ("ready", 100, "")
    assert (status["size"], status["virtualSize"], status["encrypted"]) == (24 * MIB, 8 * MIB, True)
    assert 20 * MIB <= status["realSize"] <= 21 * MIB
    assert status["path"] == str(image.path) and Path(status["path"]).exists()
    assert golden.images.get("e") == image and golden.images.get("e").to_object() == value


def test_applying_the_same_again_changes_nothing(golden: Store) -> None:
    first = golden.apply(clone("e", "golden", "encrypt"))
    before = first.path.stat()
    again = golden.apply(clone("e", "golden", "encrypt"))
    assert (again, again.path.stat().st_mtime_ns) == (first, before.st_mtime_ns)


def test_a_clone_outlives_its_source(golden: Store) -> None:
    golden.apply(clone("copy", "golden"))
    golden.images.delete("golden")
    assert golden.apply(clone("copy", "golden")).ready
    assert sha512(golden.images.get("copy").path) == sha512(golden.work / "raw")


@pytest.mark.parametrize("encryption", ["ignore", "encrypt"])
def test_what_was_interrupted_is_failed_and_done_again(golden: Store, encryption: str) -> None:
    golden.apply(clone("x", "golden", encryption))
    image = interrupted(golden, "x")
    seen = golden.images.get("x")
    assert (seen.status.state, "interrupted" in seen.status.message) == (State.FAILED, True)
    assert [one.status.state for one in golden.images.list()] == ["ready", "failed"]
    assert golden.apply(clone("x", "golden", encryption)).ready
    assert not image.partial.exists()


def test_recovery_cleans_what_a_kill_left(golden: Store) -> None:
    golden.apply(clone("x", "golden"))
    image = interrupted(golden, "x")
    root = image.directory.parent
    (root / "halfway").mkdir()
    (root / "halfway" / "image.partial").write_bytes(b"x")
    leftover = golden.images.get("golden").directory / "record.json.1.partial"
    leftover.write_bytes(b"x")
    golden.images.recover()
    assert not (root / "halfway").exists() and not leftover.exists()
    assert [entry.name for entry in image.directory.iterdir()] == ["record.json"]
    assert golden.images.get("x").status.state == "failed"
    assert golden.images.get("golden").ready


def test_recovery_leaves_alone_what_is_worked_on(golden: Store) -> None:
    golden.apply(clone("x", "golden"))
    image = interrupted(golden, "x")
    with locked(image.directory, "it"):
        golden.images.recover()
        assert image.partial.exists()
        assert golden.images.get("x").status.state == "in-progress"
        with pytest.raises(EbiError, match="another operation on backing image x") as caught:
            golden.apply(clone("x", "golden"))
        assert caught.value.kind is Kind.BUSY
        with pytest.raises(EbiError, match="another operation"):
            golden.images.delete("x")


def test_an_image_with_users_is_not_deleted(golden: Store) -> None:
    golden.images.users = lambda name: ["b", "a"] if name == "golden" else []
    with pytest.raises(EbiError, match="cannot delete backing image golden since there are volumes using it: a, b"):
        golden.images.delete("golden")
    assert golden.images.get("golden").ready


def test_a_volume_that_is_made_while_its_image_is_deleted_keeps_it(golden: Store) -> None:
    """It holds the image until its record is there; whoever deletes looks at the records again once nobody does."""
    image = golden.images.get("golden")
    alone: list[bool] = []

    def users(_: str) -> list[str]:
        alone.append(is_locked(image.directory))
        return ["vol"] if len(alone) > 1 else []

    golden.images.users = users
    with pytest.raises(EbiError, match="since there are volumes using it: vol") as caught:
        golden.images.delete("golden")
    assert caught.value.kind is Kind.PRECONDITION and alone == [False, True]
    assert golden.images.get("golden") == image and image.path.exists()


def test_a_held_image_is_not_deleted_and_may_be_held_twice(golden: Store) -> None:
    with golden.images.held("golden") as one, golden.images.held("golden") as other:
        assert one == other and one.ready
        with pytest.raises(EbiError) as caught:
            golden.images.delete("golden")
        assert caught.value.kind is Kind.BUSY
    golden.images.delete("golden")


def test_deleting_leaves_nothing_and_absence_is_said(golden: Store) -> None:
    directory = golden.images.get("golden").directory
    golden.images.delete("golden")
    assert not directory.exists() and golden.images.list() == []
    for attempt in (golden.images.get, golden.images.delete, golden.images.raw):
        with pytest.raises(EbiError, match="backing image golden not found") as caught:
            attempt("golden")
        assert caught.value.kind is Kind.NOT_FOUND


def test_names_are_never_paths(golden: Store) -> None:
    for name in ("../golden", "/etc", "golden/", ""):
        with pytest.raises(EbiError, match="invalid name"):
            golden.images.get(name)


def test_a_damaged_record_is_shown_and_does_not_hide_the_others(golden: Store) -> None:
    golden.apply(clone("x", "golden"))
    (golden.images.get("x").directory / "record.json").write_text('{"metadata": []}')
    found = {image.name: image.status.state for image in golden.images.list()}
    assert found == {"golden": "ready", "x": "unknown"}
    assert golden.apply(clone("x", "golden")).ready


def test_the_raw_file_of_a_raw_image_is_its_own(golden: Store) -> None:
    assert golden.images.raw("golden") == golden.images.get("golden").path


def test_progress_and_events_tell_of_the_work(golden: Store) -> None:
    heard: list[Progress] = []
    seen: list[events.Event] = []
    end = events.subscribe(seen.append)
    try:
        golden.images.apply(clone("e", "golden", "encrypt"), golden.secrets, heard.append)
        with pytest.raises(EbiError):
            golden.apply(manifest("x", "download", url="file:///nothing"))
    finally:
        end()
    assert [heard[0].state, heard[-1].state] == [State.STARTING, State.READY]
    assert heard[-1].done == heard[-1].total == 4 * MIB and heard[-1].percent == 100
    operations = [(event.name, event.size, event.ok) for event in seen if isinstance(event, events.ImageOperation)]
    assert operations == [("encrypt", 4 * MIB, True), ("download", 0, False)]


def test_what_the_listener_raises_cancels_the_work(golden: Store) -> None:
    def stop(progress: Progress) -> None:
        if progress.state is State.IN_PROGRESS:
            raise unavailable("enough")

    with pytest.raises(EbiError, match="enough"):
        golden.images.apply(clone("e", "golden", "encrypt"), golden.secrets, stop)
    failed = golden.images.get("e")
    assert failed.status.state == "failed" and not failed.partial.exists()


def test_two_may_clone_one_source_at_once(golden: Store) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            golden.apply(clone(name, "golden", "encrypt"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and golden.images.get("a").ready and golden.images.get("b").ready


def test_a_full_disk_is_said_before_anything_is_copied(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(golden.work)
    full = os.statvfs_result((found.f_bsize, found.f_frsize, found.f_blocks, 10, 10, *found[5:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: full)
    with pytest.raises(EbiError, match="backing image e needs 20 MiB of disk, and 0 MiB are free") as caught:
        golden.apply(clone("e", "golden", "encrypt"))
    assert caught.value.kind is Kind.EXHAUSTED


def test_a_filesystem_that_fills_up_meanwhile_is_an_error_of_its_own(tmp_path: Path) -> None:
    source = os.open(make_raw(tmp_path / "raw", MIB, [(0, MIB)]), os.O_RDONLY)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(EbiError, match="no space left") as caught:
            engine.copy(Disk(source, MIB), TargetSpec(full, -1, 0, None, sparse=True), [Extent(0, MIB)], workers=1)
    finally:
        os.close(source)
        os.close(full)
    assert caught.value.kind is Kind.EXHAUSTED


def test_a_filesystem_may_be_unable_to_reserve_space(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "reserve", lambda *_: False)
    golden.apply(clone("e", "golden", "encrypt"))
    golden.apply(clone("d", "e", "decrypt"))
    assert sha512(golden.images.get("d").path) == sha512(golden.work / "raw")


def test_where_a_lock_is_one_descriptor_s_it_is_written_by_that_one(
    golden: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMB gives the file's lock to the descriptor that took it, and EACCES to a second one."""
    path, write = golden.work / "out", os.pwrite
    fd, direct = os.open(path, os.O_RDWR | os.O_CREAT), os.open(path, os.O_WRONLY)
    tried: list[int] = []

    def pwrite(to: int, data: memoryview, at: int) -> int:
        tried.append(to)
        if to == direct:
            raise OSError(errno.EACCES, "Permission denied")
        return write(to, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = os.urandom(2 * MIB)
    target = Target(TargetSpec(fd, direct, 0, None, sparse=True))
    try:
        for at in (0, MIB):
            target.write(memoryview(bytearray(content[at : at + MIB])), at)
    finally:
        os.close(fd)
        os.close(direct)
    assert tried == [direct, fd, fd] and path.read_bytes() == content


def test_space_is_reserved_before_the_work_and_what_is_zeros_given_back(
    golden: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.apply(clone("dense", "golden", "encrypt", sparse="false"))
    reserved, copy = 0, engine.copy

    def watched(source: Disk, target: TargetSpec, *rest: Any, **named: Any) -> list[Sum]:
        nonlocal reserved
        reserved = os.fstat(target.fd).st_blocks * 512
        return copy(source, target, *rest, **named)

    monkeypatch.setattr(engine, "copy", watched)
    made = golden.apply(clone("d", "dense", "decrypt"))
    assert reserved == 8 * MIB
    assert 4 * MIB <= made.path.stat().st_blocks * 512 < 5 * MIB  # a block of extents more, perhaps


def test_workers_take_no_module_from_where_the_caller_is(golden: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    place = golden.work / "place"
    place.mkdir()
    for name in ("json", "socket", "plugin"):
        (place / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(place)
    assert golden.apply(clone("e", "golden", "encrypt")).ready


def test_workers_are_waited_for_also_where_their_parent_ignores_its_children(
    golden: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, started = subprocess.Popen, []

    def ignoring(command: list[str], **named: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(["env", "--ignore-signal=CHLD", *command], **named))  # what a program is run with stays so
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", ignoring)
    with golden.images.get("golden").path.open("rb") as file:
        engine.copy(Disk(file.fileno(), 8 * MIB), None, [Extent(0, 8 * MIB)], workers=2)
    monkeypatch.undo()
    assert [process.returncode for process in started] == [0]


def test_more_pieces_than_the_socket_holds(tmp_path: Path) -> None:
    runs = [Extent(start, 4096) for start in range(0, 2048 * MIB, 128 << 10)]  # 1024 of them make a piece
    with (tmp_path / "from").open("w+b") as file, (tmp_path / "to").open("w+b") as out:
        for run in runs:
            os.pwrite(file.fileno(), run.start.to_bytes(8, "big") * 512, run.start)
        for fd in (file.fileno(), out.fileno()):
            os.truncate(fd, 2048 * MIB)
        target = TargetSpec(out.fileno(), -1, 0, None, sparse=False)
        sums = engine.copy(Disk(file.fileno(), 2048 * MIB), target, runs, workers=8)
        assert [item.extent for item in sums] == runs
        for run in runs[:: len(runs) // 100]:
            assert os.pread(out.fileno(), 4096, run.start) == run.start.to_bytes(8, "big") * 512


def test_a_file_cut_short_while_it_is_read_is_an_error(golden: Store) -> None:
    image = golden.images.get("golden")
    os.truncate(image.path, 7 * MIB - 512)
    with image.path.open("rb") as file, (golden.work / "out").open("w+b") as out:
        target = TargetSpec(out.fileno(), -1, 0, None, sparse=True)
        with pytest.raises(EbiError, match="ends at byte"):
            engine.copy(Disk(file.fileno(), 8 * MIB), target, [Extent(6 * MIB, MIB)])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


@pytest.mark.parametrize("which", ["leader", "fork"])
def test_a_worker_that_dies_is_an_error_and_its_fellows_end(
    golden: Store, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    seen: set[int] = set()
    take = engine.Team.take

    def sabotaged(team: engine.Team) -> tuple[int, list[Sum]]:
        if not seen:
            leader = team._leader.pid
            while not (forks := children(leader)):
                time.sleep(0.001)
            seen.update({leader, *forks})
            os.kill(leader if which == "leader" else forks[0], signal.SIGKILL)
        while True:  # others may have done their pieces
            take(team)

    monkeypatch.setattr(engine.Team, "take", sabotaged)
    with pytest.raises(EbiError, match="a worker process was killed by signal 9"):
        golden.apply(clone("e", "golden", "encrypt"))
    for pid in seen:  # its files are closed a moment before its end
        while alive(pid):
            time.sleep(0.001)
    assert golden.images.get("e").status.state == "failed"


@pytest.mark.parametrize("failure", [None, KeyError("a key")])
def test_workers_that_are_never_told_to_begin_end_with_the_block(failure: Exception | None) -> None:
    with suppress(KeyError), engine.Team() as team:
        leader = team._leader.pid
        if failure:
            raise failure
    assert not alive(leader)


def test_stores_in_several_processes_see_each_other(golden: Store) -> None:
    other = Images(golden.work / "data" / "images", Settings())
    golden.apply(clone("x", "golden"))
    assert other.get("x") == golden.images.get("x")
    other.delete("x")
    with pytest.raises(EbiError, match="not found"):
        golden.images.get("x")
