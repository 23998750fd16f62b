"""The key of a volume: changed, and destroyed, with a kill at every step. Headers are files: no device is needed."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from plugin.cli import main
from plugin.errors import EbiError, Kind
from plugin.luks import header
from plugin.luks.parameters import SecretParameters
from plugin.settings import Settings
from plugin.volumes import Volume, Volumes
from plugin.volumes.record import Records
from tests.killing import killed_at
from tests.unit.conftest import MIB, PASSPHRASE, Store, clone, make_raw, opens, secret

NEW = b"another passphrase"


def data(passphrase: bytes) -> Mapping[str, bytes]:
    """The data of a Secret with a cheap key derivation."""
    return {key: value.encode() for key, value in secret(passphrase=passphrase)["stringData"].items()}


@pytest.fixture
def volumes(store: Store) -> Volumes:
    (store.work / "data").mkdir(mode=0o700)
    return Volumes(store.work / "data" / "volumes", store.images, Settings(data_dir=store.work / "data"))


def formatted(volumes: Volumes, parameters: SecretParameters, **given: str) -> Volume:
    """An encrypted volume as its first stage leaves it, without anything in it."""
    volume = volumes.create("vol", MIB, {"encrypted": "true", **given})
    header.create(volume.path, parameters, header.new_key(parameters), sector_size=4096, owner="it")
    return Records(volume.directory.parent).save(volume, formatted=True)


class TestRekey:
    def test_by_command_the_new_secret_opens_and_the_old_does_not(
        self, store: Store, volumes: Volumes, parameters: SecretParameters, capsys: pytest.CaptureFixture[str]
    ) -> None:
        volume = formatted(volumes, parameters)
        key = header.volume_key(volume.path, PASSPHRASE, "it")
        files = []
        for name, passphrase in (("old", PASSPHRASE), ("new", NEW)):
            files.append(store.work / name)
            files[-1].write_text(yaml.safe_dump(secret(passphrase=passphrase)))
        command = ["--data-dir", str(store.work / "data"), "volume", "rekey", "vol", "--secret", str(files[0])]
        for _ in range(2):  # again is fine
            assert main([*command, "--new-secret", str(files[1])]) == 0
        assert capsys.readouterr().out == 2 * "volume/vol rekeyed\n"
        assert header.volume_key(volume.path, NEW, "it") == key
        assert not opens(volume.path, PASSPHRASE)
        assert main([*command, "--new-secret", str(files[0])]) == Kind.INVALID.value, "neither of them opens it"

    def test_killed_anywhere_one_of_both_opens_and_the_next_call_finishes(
        self, volumes: Volumes, parameters: SecretParameters
    ) -> None:
        volume = formatted(volumes, parameters)
        key = header.volume_key(volume.path, PASSPHRASE, "it")
        blank = volume.path.read_bytes()[: 16 * MIB]
        for number in itertools.count():
            with volume.path.open("r+b") as file:
                file.write(blank)
            killed = killed_at(number, lambda: volumes.rekey("vol", data(PASSPHRASE), data(NEW)))
            assert opens(volume.path, PASSPHRASE) or opens(volume.path, NEW)
            volumes.rekey("vol", data(PASSPHRASE), data(NEW))
            assert header.volume_key(volume.path, NEW, "it") == key
            assert not opens(volume.path, PASSPHRASE)
            if not killed:
                break
        assert number >= 4

    def test_a_passphrase_that_would_not_open_the_image_is_refused(
        self, store: Store, volumes: Volumes, parameters: SecretParameters
    ) -> None:
        store.download(make_raw(store.work / "raw", MIB, [(0, 4096)]))
        store.apply(clone("locked", "golden", "encrypt"))
        volume = formatted(volumes, parameters, backingImage="locked")
        with pytest.raises(EbiError, match="does not open backing image locked") as refused:
            volumes.rekey("vol", data(PASSPHRASE), data(NEW))
        assert refused.value.kind is Kind.PRECONDITION
        assert "ebi image rekey locked --keep-old" in refused.value.hint
        assert opens(volume.path, PASSPHRASE)

    def test_image_and_volumes_change_their_secret_in_turn(
        self, store: Store, volumes: Volumes, parameters: SecretParameters
    ) -> None:
        store.download(make_raw(store.work / "raw", MIB, [(0, 4096)]))
        image = store.apply(clone("locked", "golden", "encrypt"))
        volume = formatted(volumes, parameters, backingImage="locked")
        files = []
        for name, passphrase in (("old", PASSPHRASE), ("new", NEW)):
            files.append(str(store.work / name))
            Path(files[-1]).write_text(yaml.safe_dump(secret(passphrase=passphrase)))
        ebi = ["--data-dir", str(store.work / "data")]
        change = [*ebi, "image", "rekey", "locked", "--old", files[0], "--new", files[1]]
        assert main([*change, "--keep-old"]) == 0
        assert main(change) == Kind.PRECONDITION.value, "the volume would be locked out"
        assert main([*ebi, "volume", "rekey", "vol", "--secret", files[0], "--new-secret", files[1]]) == 0
        assert main(change) == 0
        for path in (image.path, volume.path):
            assert opens(path, NEW)
            assert not opens(path, PASSPHRASE)

    def test_what_has_no_passphrase_is_refused(self, volumes: Volumes) -> None:
        volumes.create("plain", MIB, {})
        volumes.create("new", MIB, {"encrypted": "true"})
        for name, kind in (("plain", Kind.INVALID), ("new", Kind.PRECONDITION), ("absent", Kind.NOT_FOUND)):
            with pytest.raises(EbiError) as refused:
                volumes.rekey(name, data(PASSPHRASE), data(NEW))
            assert refused.value.kind is kind


class TestDelete:
    def test_killed_anywhere_no_key_outlives_the_record(self, volumes: Volumes, parameters: SecretParameters) -> None:
        content = formatted(volumes, parameters).path.read_bytes()
        volumes.delete("vol")
        for number in itertools.count():
            volume = volumes.create("vol", MIB, {"encrypted": "true"})
            volume.path.write_bytes(content)
            kept = volume.path.with_name("kept")
            kept.hardlink_to(volume.path)
            kept.rename(volumes_root(volume).parent / "kept")
            killed = killed_at(number, lambda: volumes.delete("vol"))
            file = volumes_root(volume).parent / "kept"
            if volumes.list():  # the record is there: so is the volume, or its key is gone
                assert opens(file, PASSPHRASE) or not header.is_luks(file)
            else:
                assert not opens(file, PASSPHRASE)
            volumes.delete("vol")
            volumes.recover()
            assert not any(volumes_root(volume).iterdir())
            assert not any(file.read_bytes()[: 16 * MIB])
            if not killed:
                break
        assert number > 6


class TestCreate:
    def test_killed_anywhere_the_next_call_makes_it(self, volumes: Volumes) -> None:
        for number in itertools.count():
            killed = killed_at(number, lambda: volumes.create("vol", MIB, {}))
            volumes.recover()
            assert [volume.path.stat().st_size for volume in volumes.list()] in ([], [MIB])
            volume = volumes.create("vol", MIB, {})
            assert sorted(entry.name for entry in volume.directory.iterdir()) == ["record.json", "volume.img"]
            volumes.delete("vol")
            if not killed:
                break
        assert number > 4

    def test_killed_anywhere_in_growing_the_next_call_grows_it(self, volumes: Volumes) -> None:
        for number in itertools.count():
            volumes.create("vol", MIB, {})
            killed = killed_at(number, lambda: volumes.expand("vol", 2 * MIB))
            volumes.recover()
            assert volumes.get("vol").path.stat().st_size >= volumes.get("vol").capacity
            assert volumes.expand("vol", 2 * MIB) == 2 * MIB
            assert volumes.get("vol").path.stat().st_size == volumes.get("vol").capacity == 2 * MIB
            volumes.delete("vol")
            if not killed:
                break
        assert number > 3


def volumes_root(volume: Volume) -> Path:
    return volume.directory.parent
