"""Changing an image's passphrase, and backups of its header."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import run
from plugin.images import headers
from plugin.images.image import BackingImage
from plugin.images.secrets import DocumentSecrets
from plugin.luks import header, keyslots
from tests.unit.conftest import KIB, MIB, NAMESPACE, PASSPHRASE, Store, clone, make_raw, opens, secret, sha512

NEW = b"quite another\n"


@pytest.fixture(scope="module")
def first(first_store: Store) -> Store:
    first_store.secrets = DocumentSecrets([secret(), secret("new", NEW, PBKDF_FORCE_ITERATIONS="1500")])
    first_store.download(make_raw(first_store.work / "raw", MIB, [(0, MIB)]))
    first_store.apply(clone("e", "golden", "encrypt"))
    return first_store


@pytest.fixture
def locked(first: Store, tmp_path: Path) -> Store:
    return first.copied(tmp_path)


def data(store: Store, name: str) -> Mapping[str, bytes]:
    return store.secrets.get(name, NAMESPACE)


def rekey(store: Store, *, keep_old: bool = False, users: tuple[str, ...] = ()) -> BackingImage:
    old, new = data(store, "key"), data(store, "new")
    return headers.rekey(store.images, "e", old, new, (NAMESPACE, "new"), keep_old=keep_old, users=users)


def test_only_the_new_passphrase_opens_and_the_content_is_the_same(locked: Store) -> None:
    image = rekey(locked)
    assert (opens(image.path, PASSPHRASE), opens(image.path, NEW)) == (False, True)
    assert [slot.pbkdf.iterations for slot in keyslots.listed(header.read(image.path))] == [1500]
    assert (image.spec.secret, image.spec.parameters["secret"]) == ("new", "new")
    assert locked.images.get("e") == image
    back = locked.apply(clone("d", "e", "decrypt", secret="new"))
    assert sha512(back.path) == sha512(locked.work / "raw")


def test_the_backup_does_not_open_with_the_old_passphrase_either(locked: Store) -> None:
    image = rekey(locked)
    assert (opens(image.header_path, PASSPHRASE), opens(image.header_path, NEW)) == (False, True)


def test_the_old_one_may_stay_until_a_second_call(locked: Store) -> None:
    image = rekey(locked, keep_old=True, users=("pvc-1",))
    assert (opens(image.path, PASSPHRASE), opens(image.path, NEW)) == (True, True)
    rekey(locked)
    assert (opens(image.path, PASSPHRASE), opens(image.path, NEW)) == (False, True)


def test_volumes_keep_the_old_passphrase_in(locked: Store) -> None:
    with pytest.raises(EbiError, match="since there are volumes using it: pvc-1") as caught:
        rekey(locked, users=("pvc-1",))
    assert caught.value.kind is Kind.PRECONDITION
    assert opens(locked.images.get("e").path, PASSPHRASE)


@pytest.mark.parametrize("step", range(6))
def test_interrupted_anywhere_one_of_both_opens_and_the_next_call_finishes(
    locked: Store, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The call dies before its `step`th command; the commands are cryptsetup's, each a whole or no change."""
    calls = 0

    def dying(argv: list[str], **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls > step:
            raise KeyboardInterrupt
        return run.run(argv, **more)  # type: ignore[arg-type]

    for module in (keyslots, header):
        monkeypatch.setattr(module, "run", dying)
    try:
        rekey(locked)
    except KeyboardInterrupt:
        assert step < 4
    monkeypatch.undo()
    path = locked.images.get("e").path
    assert opens(path, PASSPHRASE) or opens(path, NEW)
    rekey(locked)
    assert (opens(path, PASSPHRASE), opens(path, NEW)) == (False, True)
    assert len(keyslots.listed(header.read(path))) == 1


def test_another_cost_for_the_same_passphrase(locked: Store) -> None:
    locked.secrets = DocumentSecrets([secret(), secret("new", PASSPHRASE, PBKDF_FORCE_ITERATIONS="2000")])
    image = rekey(locked)
    assert [slot.pbkdf.iterations for slot in keyslots.listed(header.read(image.path))] == [2000]
    assert opens(image.path, PASSPHRASE)


def test_neither_opens(locked: Store) -> None:
    locked.secrets = DocumentSecrets([secret(passphrase=b"wrong"), secret("new", NEW)])
    with pytest.raises(EbiError, match="the passphrase does not open backing image e"):
        rekey(locked)
    assert opens(locked.images.get("e").path, PASSPHRASE)
    assert locked.images.get("e").spec.secret == "key"


def test_a_manifest_still_may_not_change_the_secret(locked: Store) -> None:
    rekey(locked)
    with pytest.raises(EbiError, match="changing secret for BackingImage e is not supported"):
        locked.apply(clone("e", "golden", "encrypt"))
    assert locked.apply(clone("e", "golden", "encrypt", secret="new")).spec.secret == "new"


def test_what_is_not_encrypted_has_no_header(locked: Store) -> None:
    for call in (headers.show, headers.restore):
        with pytest.raises(EbiError, match="backing image golden is not encrypted") as caught:
            call(locked.images, "golden")
        assert caught.value.kind is Kind.INVALID


def test_no_secret_on_a_command_line(locked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watched(argv: list[str], **more: object) -> object:
        seen.extend(argv)
        return run.run(argv, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(keyslots, "run", watched)
    rekey(locked)
    assert "luksAddKey" in seen and "luksKillSlot" in seen
    assert not any(NEW.decode().strip() in word or "correct" in word for word in seen)


def test_the_backup_beside_the_image_is_private_and_small(locked: Store) -> None:
    found = locked.images.get("e").header_path.stat()
    assert (found.st_mode & 0o777, found.st_size) == (0o600, 16 * MIB)
    assert found.st_blocks * 512 < 512 * KIB


def destroy(path: Path, *places: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    for place in places:
        os.pwrite(fd, os.urandom(512), place)
    os.close(fd)


def test_a_damaged_primary_is_survived_and_named(locked: Store) -> None:
    path = locked.images.get("e").path
    destroy(path, 4096)
    assert headers.show(locked.images, "e")["damaged"] == ["primary"]
    assert opens(path, PASSPHRASE)


def test_a_write_that_ends_short_is_gone_on_with(locked: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    image, pwrite = locked.images.get("e"), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, memoryview(data)[: 100 * KIB], offset))
    headers.save_backup(locked.images, "e", locked.work / "saved")
    assert (locked.work / "saved").read_bytes() == image.header_path.read_bytes()


def test_a_header_comes_back_from_the_backup_beside(locked: Store) -> None:
    path = locked.images.get("e").path
    before = headers.show(locked.images, "e")
    destroy(path, *range(0, 512 * KIB, 4096))
    with pytest.raises(EbiError):
        headers.show(locked.images, "e")
    headers.restore(locked.images, "e")
    assert headers.show(locked.images, "e") == before and before["damaged"] == []
    assert sha512(locked.apply(clone("d", "e", "decrypt")).path) == sha512(locked.work / "raw")


def test_a_header_comes_back_from_a_file_with_the_passphrases_it_had(locked: Store) -> None:
    file = locked.work / "saved"
    headers.save_backup(locked.images, "e", file)
    assert file.stat().st_mode & 0o777 == 0o600
    image = rekey(locked)
    headers.restore(locked.images, "e", file)
    for path in (image.path, image.header_path):
        assert (opens(path, PASSPHRASE), opens(path, NEW)) == (True, False)


def test_cryptsetup_takes_the_backup(locked: Store) -> None:
    image = locked.images.get("e")
    destroy(image.path, *range(0, 512 * KIB, 4096))
    argv = ["cryptsetup", "luksHeaderRestore", "--batch-mode", "--disable-locks", str(image.path)]
    run.run([*argv, "--header-backup-file", str(image.header_path)])
    assert opens(image.path, PASSPHRASE)


def test_the_header_of_another_device_is_refused(locked: Store) -> None:
    locked.apply(clone("other", "golden", "encrypt"))
    headers.save_backup(locked.images, "other", locked.work / "other")
    image = locked.images.get("e")
    for damage in ((), range(0, 512 * KIB, 4096)):
        destroy(image.path, *damage)
        with pytest.raises(EbiError, match="is the header of another device: its UUID is"):
            headers.restore(locked.images, "e", locked.work / "other")
    (locked.work / "short").write_bytes(image.header_path.read_bytes()[: 4 * KIB])
    with pytest.raises(EbiError, match="damaged"):
        headers.restore(locked.images, "e", locked.work / "short")
