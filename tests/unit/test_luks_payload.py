"""The payload cipher against published vectors, and the choice of the sector size."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.luks import payload
from plugin.luks.payload import Cipher
from plugin.luks.sectors import HEAD, sector_size

CIPHERS = [
    ("aes-xts-plain64", 32),
    ("aes-xts-plain64", 64),
    ("aes-cbc-plain64", 32),
    *[("aes-cbc-essiv:sha256", size) for size in (16, 24, 32)],
]
# IEEE Std 1619-2007, Annex B: vectors 4 (keys of 128 bits) and 10 (256 bits) start thus; data units of 512 bytes.
KEY_4 = bytes.fromhex("27182818284590452353602874713526 31415926535897932384626433832795")
KEY_10 = bytes.fromhex(
    "2718281828459045235360287471352662497757247093699959574966967627"
    "3141592653589793238462643383279502884197169399375105820974944592"
)


def test_ieee_vectors() -> None:
    plain = bytes(range(256)) * 2
    for key, unit, start in (
        (KEY_4, 0, "27a7479befa1d476489f308cd4cfa6e2"),
        (KEY_10, 0xFF, "1c3b3a102f770386e4836c99e370cf9b"),
    ):
        buffer = bytearray(plain)
        Cipher("aes-xts-plain64", key, 512).encrypt(buffer, 512 * unit)
        assert buffer[:16].hex() == start


def test_essiv_is_the_number_ciphered_under_the_hash_of_the_key() -> None:
    key = os.urandom(32)
    hashed, number = hashlib.sha256(key).hexdigest(), (3).to_bytes(16, "little")
    iv = _openssl("-aes-256-ecb", hashed, "", number)
    plain = os.urandom(512)
    buffer = bytearray(plain)
    Cipher("aes-cbc-essiv:sha256", key, 512).encrypt(buffer, 3 * 512)
    assert bytes(buffer) == _openssl("-aes-256-cbc", key.hex(), iv.hex(), plain)


def _openssl(cipher: str, key: str, iv: str, data: bytes) -> bytes:
    argv = ["openssl", "enc", cipher, "-nopad", "-K", key, *(["-iv", iv] if iv else [])]
    return subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def test_numbers_written_in_place_or_by_a_call_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    key, plain = os.urandom(64), os.urandom(64 << 10)
    found, asked = bytearray(plain), bytearray(plain)
    Cipher("aes-xts-plain64", key, 512).encrypt(found, 1 << 41)
    monkeypatch.setattr(payload._Context, "_number", lambda _: None)  # an OpenSSL without the place
    Cipher("aes-xts-plain64", key, 512).encrypt(asked, 1 << 41)
    assert found == asked != plain


@pytest.mark.parametrize(("name", "key_bytes"), CIPHERS)
@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_decrypt_undoes_encrypt_anywhere(name: str, key_bytes: int, size: int) -> None:
    cipher, plain = Cipher(name, os.urandom(key_bytes), size), os.urandom(16 * size)
    buffer = bytearray(plain)
    cipher.encrypt(memoryview(buffer)[: 8 * size], 1 << 40)
    cipher.encrypt(memoryview(buffer)[8 * size :], (1 << 40) + 8 * size)
    assert buffer != plain
    cipher.decrypt(buffer, 1 << 40)
    assert buffer == plain


def test_equal_plaintexts_differ_from_sector_to_sector() -> None:
    buffer = bytearray(1024)
    Cipher("aes-xts-plain64", os.urandom(32), 512).encrypt(buffer, 0)
    assert buffer[:512] != buffer[512:]


def test_only_whole_sectors() -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        Cipher("aes-xts-plain64", os.urandom(32), 4096).encrypt(bytearray(512), 0)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("serpent-xts-plain64", 64),
        ("twofish-xts-plain64", 64),
        ("aes-xts-plain", 64),
        ("aes-xts-plain64be", 64),
        ("aes-cbc-essiv:sha512", 32),
        ("xchacha12,aes-adiantum-plain64", 32),
        ("nonsense", 32),
        ("aes-xts-plain64", 48),
        ("aes-cbc-essiv:sha256", 64),
    ],
)
def test_an_unknown_cipher_is_refused_by_name(name: str, size: int) -> None:
    with pytest.raises(EbiError, match=name) as caught:
        Cipher(name, os.urandom(size), 512)
    assert caught.value.kind is Kind.UNSUPPORTED


def test_equal_halves_are_no_key() -> None:
    with pytest.raises(EbiError, match="halves"):
        Cipher("aes-xts-plain64", bytes(32), 512)


def made(tmp_path: Path, size: int, *command: str) -> bytes:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, size)
    subprocess.run([*command, path], check=True, capture_output=True)
    with path.open("rb") as file:
        return file.read(HEAD)


@pytest.mark.parametrize(
    ("expected", "command"),
    [
        (4096, ("mke2fs", "-qFt", "ext4", "-b", "4096")),
        (512, ("mke2fs", "-qFt", "ext4", "-b", "1024")),
        (512, ("mke2fs", "-qFt", "ext2", "-b", "2048")),
        (512, ("mkfs.xfs", "-q")),
        (4096, ("mkfs.xfs", "-q", "-s", "size=4096")),
    ],
)
def test_the_sector_size_follows_the_filesystem(tmp_path: Path, expected: int, command: tuple[str, ...]) -> None:
    size = 320 << 20
    assert sector_size(made(tmp_path, size, *command), size) == expected


def test_the_sector_size_follows_tables_and_sizes() -> None:
    blank = bytes(HEAD)
    assert sector_size(blank, 1 << 20) == 4096
    assert sector_size(blank, (1 << 20) + 512) == 512
    assert sector_size(bytes(510) + b"\x55\xaa", 1 << 20) == 512
    assert sector_size(bytes(512) + b"EFI PART", 1 << 20) == 512
    assert sector_size(b"", 0) == 4096
