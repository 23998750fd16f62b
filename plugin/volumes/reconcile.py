"""After a restart: what a killed process left half made is taken away, or brought to its end.

Nothing that is in use is touched.
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial

from plugin.errors import EbiError, Kind
from plugin.host import dm, udev
from plugin.host.lock import locked
from plugin.volumes import imagemap, names
from plugin.volumes.record import RECORD, Records

log = logging.getLogger(__name__)


def recover(records: Records) -> None:
    """Resume what a cut-short resize left suspended; remove devices that carry nothing, and files of no volume."""
    for mapper in list(dm.every(udev.PREFIX)):
        if mapper.suspended:
            log.warning("resuming the device %s", mapper.name)
            _try(dm.resume, mapper.name)
    for prefix in (names.BASE, names.STORE):  # the top of a volume for raw use may be staged
        for mapper in list(dm.every(prefix)):
            if not mapper.holders:
                log.warning("removing the device %s: nothing stands on it", mapper.name)
                _try(dm.remove, mapper.name)
    imagemap.release_idle()
    if not records.root.is_dir():
        return
    for directory in records.root.iterdir():
        if names.is_volume_id(directory.name) and not (directory / RECORD).exists():
            _try(partial(_remove_partial, records), directory.name)


def _remove_partial(records: Records, volume: str) -> None:
    directory = records.directory(volume)
    with locked(directory, f"volume {volume}"):
        if not (directory / RECORD).exists() and dm.find(names.top(volume)) is None:
            log.warning("removing %s: its volume was never finished, or never quite deleted", directory)
            shutil.rmtree(directory)


def _try(action: Callable[[str], None], name: str) -> None:
    try:
        action(name)
    except EbiError as error:
        # Busy is somebody's present work.
        log.log(logging.DEBUG if error.kind is Kind.BUSY else logging.WARNING, "%s", error)
