"""Images and the kernel's dm_crypt agree byte for byte, both ways."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from plugin.host import blockdev, dm, loop
from plugin.images.secrets import DocumentSecrets
from plugin.images.store import Images
from plugin.luks import header, mapping
from plugin.luks.parameters import Pbkdf, SecretParameters
from plugin.settings import Settings
from tests.unit.conftest import KIB, MIB, PASSPHRASE, Store, clone, make_raw, secret, sha512

NAME = "ebi-test-image"


@contextmanager
def opened(path: Path, *, readonly: bool) -> Iterator[Path]:
    """The LUKS2 file as the kernel's dm_crypt shows it."""
    with loop.attached(path, readonly=readonly) as device:
        mapping.open_with_passphrase(device, NAME, PASSPHRASE, "it", readonly=readonly)
    try:
        yield dm.path(NAME)
    finally:
        mapping.close(NAME)


@pytest.fixture
def store(home: Path) -> Store:
    return Store(home, Images(home / "images", Settings(workers=1)))


@pytest.mark.parametrize(
    ("size", "cipher", "key_size"),
    [
        (9 * MIB, "aes-xts-plain64", "256"),
        (5 * MIB + 512, "aes-xts-plain64", "512"),
        (5 * MIB + 512, "aes-cbc-essiv:sha256", "128"),
    ],
)
def test_dm_crypt_reads_what_we_encrypt(store: Store, size: int, cipher: str, key_size: str) -> None:
    store.secrets = DocumentSecrets([secret(KEY_CIPHER=cipher, KEY_SIZE=key_size)])
    raw = make_raw(store.work / "raw", size, [(0, MIB), (3 * MIB, 300 * KIB), (size - 512, 512)])
    store.download(raw)
    store.apply(clone("dense", "golden", "encrypt", sparse="false"))
    sparse = store.apply(clone("sparse", "golden", "encrypt"))
    with opened(store.images.get("dense").path, readonly=True) as device:
        assert blockdev.size(device) == size
        assert device.read_bytes() == raw.read_bytes()
    with opened(sparse.path, readonly=True) as device, device.open("rb") as file, raw.open("rb") as wanted:
        assert sum(run.length for run in sparse.extents()) < size
        for run in sparse.extents():
            assert os.pread(file.fileno(), run.length, run.start) == os.pread(wanted.fileno(), run.length, run.start)


@pytest.mark.parametrize(
    ("sector", "cipher", "key_size"),
    [
        (512, "aes-xts-plain64", 512),
        (4096, "aes-xts-plain64", 512),
        (512, "aes-cbc-essiv:sha256", 192),
        (4096, "aes-cbc-essiv:sha256", 256),
    ],
)
def test_we_decrypt_what_dm_crypt_encrypted(store: Store, sector: int, cipher: str, key_size: int) -> None:
    raw, path = make_raw(store.work / "raw", 5 * MIB, [(0, 5 * MIB)]), store.work / "theirs"
    parameters = SecretParameters(PASSPHRASE, cipher, key_size, pbkdf=Pbkdf("pbkdf2", 1000))
    path.touch()
    os.truncate(path, header.PAYLOAD_OFFSET + 5 * MIB)
    header.create(path, parameters, header.new_key(parameters), sector_size=sector, owner="it")
    with opened(path, readonly=False) as device:
        device.write_bytes(raw.read_bytes())
        blockdev.flush(device)
    store.download(path)
    assert sha512(store.apply(clone("back", "golden", "decrypt")).path) == sha512(raw)
