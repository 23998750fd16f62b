"""Whatever derives a key waits for its share of the memory, by what the header says that it costs."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from plugin import events
from plugin.host import budget
from plugin.luks import header, keyslots, metadata
from plugin.luks.parameters import Pbkdf, SecretParameters
from tests.unit.conftest import PASSPHRASE
from tests.unit.test_budget import LONG, waiting

COST = Pbkdf("argon2id", 4, 2048, 1)
DEAR = Pbkdf("argon2i", 4, 8192, 1)


@pytest.fixture
def shared() -> Iterator[budget.Budget]:
    """This process's budget, of 10 MiB."""
    found = budget.shared()
    before, found.limit = found.limit, 10 << 20
    yield found
    found.limit = before


@pytest.fixture
def path(tmp_path: Path, parameters: SecretParameters) -> Path:
    """A LUKS2 file with two keyslots, of which the second is the dear one."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 17 << 20)
    key = header.new_key(parameters)
    header.create(path, parameters, key, sector_size=4096, owner="it", cost=COST)
    keyslots.change(path, PASSPHRASE, replace(parameters, passphrase=b"other", pbkdf=DEAR), "it", keep_old=True)
    return path


def create(path: Path, parameters: SecretParameters) -> None:
    header.create(path, parameters, header.new_key(parameters), sector_size=4096, owner="it", cost=DEAR, step="a_step")


def volume_key(path: Path, parameters: SecretParameters) -> None:
    header.volume_key(path, PASSPHRASE, "it")


def open_test(path: Path, parameters: SecretParameters) -> None:
    header.test_passphrase(path, b"other", "it", step="a_step")


def change(path: Path, parameters: SecretParameters) -> None:
    keyslots.change(path, PASSPHRASE, replace(parameters, passphrase=b"third"), "it")


@pytest.mark.parametrize("action", [create, volume_key, open_test, change])
def test_waits_while_others_hold_the_memory(
    shared: budget.Budget, path: Path, parameters: SecretParameters, action: Callable[[Path, SecretParameters], None]
) -> None:
    told: list[str] = []
    stop = events.subscribe(lambda event: told.append(event.name) if isinstance(event, events.Step) else None)
    thread = threading.Thread(target=action, args=(path, parameters))
    try:
        with shared.hold(3 << 20):  # 7 MiB are free, and the dear keyslot wants 8
            told.clear()
            before = path.stat().st_mtime_ns
            thread.start()
            waiting(shared, 1)
            assert (told, path.stat().st_mtime_ns) == ([], before)
        thread.join(LONG)
    finally:
        stop()
    assert not thread.is_alive()
    assert told[0] == "unlock_wait", "the wait is no part of the step"
    assert shared._held == 0


def test_a_cheap_one_need_not_wait(shared: budget.Budget, tmp_path: Path, parameters: SecretParameters) -> None:
    path = tmp_path / "cheap"
    path.touch()
    os.truncate(path, 17 << 20)
    with shared.hold(10 << 20):  # pbkdf2 takes none
        header.create(path, parameters, header.new_key(parameters), sector_size=4096, owner="it")
        header.test_passphrase(path, PASSPHRASE, "it")


def test_what_is_no_luks_device_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8192))
    assert metadata.costs(path) == []
