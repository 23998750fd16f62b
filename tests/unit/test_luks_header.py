"""Headers: what cryptsetup writes is read here, and damage is seen."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.luks import header, metadata
from plugin.luks.parameters import Pbkdf, SecretParameters
from tests.unit.conftest import PASSPHRASE

OWNER = "backing image parrot"


@pytest.fixture
def key(parameters: SecretParameters) -> bytes:
    return header.new_key(parameters)


@pytest.fixture
def encrypted(tmp_path: Path, parameters: SecretParameters, key: bytes) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 8192)
    header.create(path, parameters, key, sector_size=4096, owner=OWNER)
    return path


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def test_reads_what_cryptsetup_wrote(encrypted: Path) -> None:
    found = header.read(encrypted)
    uuid = subprocess.run(["cryptsetup", "luksUUID", encrypted], check=True, capture_output=True, text=True).stdout
    assert found.uuid == uuid.strip()
    assert (found.payload_offset, found.payload_size, found.sector_size) == (16 << 20, None, 4096)
    assert (found.cipher, found.key_size, found.iv_tweak) == ("aes-xts-plain64", 256, 0)
    assert found.pbkdf == Pbkdf("pbkdf2", 1000)


def test_the_payload_is_not_touched(tmp_path: Path, parameters: SecretParameters, key: bytes) -> None:
    path, payload = tmp_path / "image", os.urandom(8192)
    with path.open("wb") as file:
        file.seek(16 << 20)
        file.write(payload)
    header.create(path, parameters, key, sector_size=512, owner=OWNER)
    assert path.read_bytes()[16 << 20 :] == payload
    assert header.read(path).sector_size == 512


def test_a_given_cost_wins_and_no_benchmark_runs(tmp_path: Path, parameters: SecretParameters, key: bytes) -> None:
    path, cost = tmp_path / "image", Pbkdf("argon2id", 5, 1024, 2)
    path.touch()
    os.truncate(path, 17 << 20)
    header.create(path, parameters, key, sector_size=4096, owner=OWNER, cost=cost)
    assert header.read(path).pbkdf == cost


def test_the_volume_key_comes_back(encrypted: Path, key: bytes) -> None:
    assert header.volume_key(encrypted, PASSPHRASE, OWNER) == key
    header.test_passphrase(encrypted, PASSPHRASE, OWNER)


@pytest.mark.parametrize("passphrase", [b"wrong", PASSPHRASE.strip(), PASSPHRASE + b"\n"])
def test_another_passphrase_opens_nothing(encrypted: Path, passphrase: bytes) -> None:
    for attempt in (header.volume_key, header.test_passphrase):
        with pytest.raises(EbiError, match="the passphrase does not open backing image parrot") as caught:
            attempt(encrypted, passphrase, OWNER)
        assert caught.value.kind is Kind.INVALID
        assert passphrase.strip().decode() not in str(caught.value)


def test_the_second_copy_serves_where_the_first_is_damaged(encrypted: Path) -> None:
    before = header.read(encrypted)
    damage(encrypted, 5000)
    assert header.read(encrypted) == before


def test_the_second_copy_serves_where_the_first_cannot_be_read(
    encrypted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pread, good = header.read(encrypted), os.pread, 16384

    def failing(fd: int, size: int, offset: int) -> bytes:
        if offset < good:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert header.read(encrypted) == before
    assert metadata.damaged(encrypted) == ["primary"]
    good = 1 << 40
    with pytest.raises(OSError, match="Input/output error"):
        header.read(encrypted)


@pytest.mark.parametrize("offset", [6, 9, 100, 300, 460, 4100, 16383])
def test_a_header_damaged_in_both_copies_is_refused(encrypted: Path, offset: int) -> None:
    damage(encrypted, offset)
    damage(encrypted, 16384 + offset)
    with pytest.raises(EbiError, match="is damaged"):
        header.read(encrypted)


def test_anything_else_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (b"", b"L", bytes(1 << 20), os.urandom(1 << 20)):
        path.write_bytes(content)
        assert not header.is_luks(path)
        with pytest.raises(EbiError, match="has no LUKS2 header"):
            header.read(path)


def test_luks1_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"LUKS\xba\xbe\x00\x01" + bytes(4096))
    assert header.is_luks(path)
    with pytest.raises(EbiError, match="LUKS1"):
        header.read(path)


def test_what_cryptsetup_does_not_take_is_an_error_with_its_words(encrypted: Path, key: bytes) -> None:
    with pytest.raises(EbiError, match="cannot make a LUKS2 header for backing image parrot") as caught:
        header.create(encrypted, SecretParameters(b"x", hash="crc1"), key, sector_size=4096, owner=OWNER)
    assert "crc1" in str(caught.value)
