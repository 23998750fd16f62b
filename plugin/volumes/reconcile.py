"""What is wrong with the volumes of a node, found anew from the disk and the kernel, and put right.

At the start, and when a device of ours vanishes, what can safely be repaired unasked is; `ebi doctor` tells the rest.
Nothing that is in use is touched.
"""

import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from plugin import events, findings
from plugin.errors import EbiError
from plugin.findings import Finding
from plugin.host import dm
from plugin.host.lock import is_locked, locked
from plugin.luks import metadata
from plugin.volumes import devices, names
from plugin.volumes.node import Node
from plugin.volumes.record import RECORD, Volume

log = logging.getLogger(__name__)


def examine(node: Node) -> Iterator[Finding]:
    """Everything that is wrong with devices, mounts and volumes."""
    yield from devices.examine(node)
    root = node.records.root
    for directory in sorted(root.iterdir()) if root.is_dir() else ():
        if names.is_volume_id(directory.name) and directory.is_dir() and not is_locked(directory):
            yield from _of_directory(node, directory)


def recover(node: Node) -> None:
    """Repair what a killed process has left, as far as that is safe; what is left to a person is told in the log."""
    found = list(examine(node))
    findings.repair(finding for finding in found if finding.safe)
    for finding in found:
        if finding.wrong and not finding.safe:
            log.warning("%s: %s (%s)", finding.subject, finding.message, finding.hint)


@contextmanager
def watching(node: Node) -> Iterator[None]:
    """Recover whenever a device of ours vanishes without our doing, for as long as the block runs."""
    lost, ended = threading.Event(), threading.Event()

    def work() -> None:
        while True:
            lost.wait()
            lost.clear()
            if ended.is_set():
                return
            try:
                recover(node)
            except (EbiError, OSError) as error:
                log.warning("cannot look after the lost device: %s", error)

    def hear(event: events.Event) -> None:
        if isinstance(event, events.DeviceEvent) and event.lost:
            lost.set()

    thread = threading.Thread(target=work, name="reconcile", daemon=True)
    thread.start()
    unsubscribe = events.subscribe(hear)
    try:
        yield
    finally:
        unsubscribe()
        ended.set()
        lost.set()
        thread.join()


def _of_directory(node: Node, directory: Path) -> Iterator[Finding]:
    volume, subject = directory.name, f"volume {directory.name}"
    if not (directory / RECORD).exists():
        text = f"{directory} is of a volume that was never finished, or never quite deleted"
        if dm.find(names.top(volume)) is None:
            remove = partial(_remove_partial, node, volume)
            yield Finding("partial", subject, text, "ebi doctor --fix removes it", remove, safe=True)
        return
    if any(directory.glob("*.partial")):
        remove = partial(_remove_partial_files, node, volume)
        text = f"{directory} holds files that were never finished"
        yield Finding("partial", subject, text, "ebi doctor --fix removes them", remove, safe=True)
    try:
        record = node.records.get(volume)
    except EbiError as error:
        yield Finding("record-damaged", subject, error.message, error.hint)
        return
    yield from _of_volume(node, record, subject)


def _of_volume(node: Node, record: Volume, subject: str) -> Iterator[Finding]:
    size = record.path.stat().st_size if record.path.exists() else None
    if size is None or size < record.file_size:
        what = "is missing" if size is None else f"has {size} bytes, not {record.file_size}"
        yield Finding("file-missing", subject, f"its file {record.path} {what}", "delete the volume")
    elif record.encrypted and record.formatted and (damaged := metadata.damaged(record.path)):
        copies = " and the ".join(damaged)
        hint = "delete it" if len(damaged) > 1 else f"unstage it, then: cryptsetup repair {record.path}"
        yield Finding("header-damaged", subject, f"the {copies} copy of its LUKS2 header is damaged", hint)
    try:
        node.image(record)
    except EbiError as error:
        yield Finding("image-missing", subject, error.message, error.hint or "make the image again")


def _remove_partial(node: Node, volume: str) -> None:
    directory = node.records.directory(volume)
    with locked(directory, f"volume {volume}"):
        if not (directory / RECORD).exists() and dm.find(names.top(volume)) is None:
            shutil.rmtree(directory)


def _remove_partial_files(node: Node, volume: str) -> None:
    with node.operation(volume):
        for file in node.records.directory(volume).glob("*.partial"):
            file.unlink()
