"""cryptsetup itself is the judge: it decrypts what we encrypt, and we decrypt what it encrypts.

Its reencryption works on plain files, in its own code, with no device-mapper.
"""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.images.formats import Format
from plugin.images.http import from_file
from plugin.images.secrets import DocumentSecrets
from plugin.luks import header
from plugin.luks.parameters import SecretParameters
from tests.unit.conftest import KIB, MIB, PASSPHRASE, Store, clone, make_raw, manifest, secret

REENCRYPT = ("cryptsetup", "reencrypt", "-q", "--disable-locks", "--force-offline-reencrypt", "--key-file", "-")
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
ENCRYPT = ("--encrypt", "--type", "luks2", "--reduce-device-size", "32M", *CHEAP)

XTS, ESSIV = "aes-xts-plain64", "aes-cbc-essiv:sha256"


def reencrypt(path: Path, *options: str | Path) -> None:
    """Run it on a file; its temporary header goes to the working directory."""
    subprocess.run([*REENCRYPT, *options, path], input=PASSPHRASE, check=True, cwd=path.parent)


@pytest.mark.parametrize(
    ("size", "cipher", "key_size"),
    [
        *[(size, XTS, key_size) for size in (5 * MIB, 3 * MIB + 512) for key_size in ("256", "512")],
        (2 * MIB + 4096, ESSIV, "256"),
        (2 * MIB + 512, ESSIV, "192"),
    ],
)
def test_cryptsetup_decrypts_what_we_encrypt(store: Store, size: int, cipher: str, key_size: str) -> None:
    store.secrets = DocumentSecrets([secret(KEY_CIPHER=cipher, KEY_SIZE=key_size)])
    raw = make_raw(store.work / "raw", size, [(0, MIB), (MIB + 256 * KIB, 300 * KIB), (size - 512, 512)])
    store.download(raw)
    encrypted = store.apply(clone("e", "golden", "encrypt", sparse="false"))
    assert header.read(encrypted.path).sector_size == (512 if size % 4096 else 4096)
    theirs = store.work / "theirs"
    shutil.copy(encrypted.path, theirs)
    reencrypt(theirs, "--decrypt", "--header", store.work / "h")
    assert theirs.read_bytes()[:size] == raw.read_bytes()


@pytest.mark.parametrize(
    ("sector", "name", "key_size"),
    [
        *[(sector, XTS, key_size) for sector in ("512", "4096") for key_size in ("256", "512")],
        ("512", ESSIV, "128"),
        ("4096", "aes-cbc-plain64", "256"),
    ],
)
def test_we_decrypt_what_cryptsetup_encrypts(store: Store, sector: str, name: str, key_size: str) -> None:
    size = 5 * MIB
    raw = make_raw(store.work / "raw", size, [(0, MIB), (2 * MIB, 300 * KIB)])
    theirs = store.work / "theirs"
    shutil.copy(raw, theirs)
    os.truncate(theirs, size + 32 * MIB)  # the header goes in front, the rest is work space
    cipher = ("--cipher", name, "--key-size", key_size, "--sector-size", sector)
    reencrypt(theirs, *ENCRYPT, *cipher)
    kept = store.download(theirs)
    assert kept.encrypted and kept.status.format is Format.LUKS
    back = store.apply(clone("d", "golden", "decrypt")).path
    assert back.read_bytes()[:size] == raw.read_bytes()


@pytest.mark.parametrize("way", ["download", "upload"])
def test_an_image_under_a_cipher_that_nothing_can_do_is_refused_by_name(
    store: Store, tmp_path: Path, parameters: SecretParameters, way: str
) -> None:
    theirs = make_raw(tmp_path / "theirs", 17 * MIB, [])
    parameters = replace(parameters, cipher="aes-xts-plain")
    header.create(theirs, parameters, header.new_key(parameters), sector_size=512, owner="it")
    with pytest.raises(EbiError, match="the cipher aes-xts-plain for backing image golden") as caught:
        if way == "download":
            store.download(theirs)
        else:
            with theirs.open("rb", buffering=0) as file:
                store.images.upload(manifest("golden", "upload"), from_file(file))
    assert caught.value.kind is Kind.UNSUPPORTED
    image = store.images.get("golden")
    assert image.status.state == "failed" and "aes-xts-plain " in image.status.message and not image.path.exists()


def test_a_luks_device_that_cryptsetup_left_half_done_is_refused(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "half"
    with path.open("wb") as file:
        file.truncate(48 * MIB)
    reencrypt(path, *ENCRYPT, "--init-only")
    with pytest.raises(EbiError, match="requires online-reencrypt"):
        store.download(path)


@pytest.mark.parametrize(
    ("kind", "hash_"), [("argon2i", "sha256"), ("argon2id", "sha512"), ("pbkdf2", "sha1"), ("pbkdf2", "blake2b-512")]
)
def test_the_header_has_the_derivation_and_the_hash_that_the_secret_asks_for(
    store: Store, kind: str, hash_: str
) -> None:
    iterations = "1000" if kind == "pbkdf2" else "4"
    store.secrets = DocumentSecrets(
        [secret(PBKDF=kind, PBKDF_FORCE_ITERATIONS=iterations, PBKDF_MEMORY="32", KEY_HASH=hash_)]
    )
    store.download(make_raw(store.work / "raw", MIB, [(0, MIB)]))
    found = header.read(store.apply(clone("e", "golden", "encrypt")).path)
    assert found.pbkdf and (found.pbkdf.type, str(found.pbkdf.iterations)) == (kind, iterations)
    assert found.pbkdf.memory_kib == (0 if kind == "pbkdf2" else 32)
    assert found.json["keyslots"]["0"]["af"]["hash"] == hash_
    assert store.apply(clone("d", "e", "decrypt")).path.read_bytes() == (store.work / "raw").read_bytes()
