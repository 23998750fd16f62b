"""`ebi doctor` on a data directory that has seen better days; what is wrong with devices is in tests/kernel."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from plugin.cli import main
from plugin.errors import EbiError, Kind
from plugin.host import requirements
from plugin.host.lock import locked
from plugin.images.image import BackingImage
from plugin.luks import header, keyslots
from plugin.luks.parameters import SecretParameters
from plugin.settings import Settings
from plugin.volumes import Volumes
from tests.unit.conftest import KIB, MIB, PASSPHRASE, Store, clone, make_raw


@dataclass
class Doctor:
    """The command, on the data directory of `store`."""

    store: Store
    capsys: pytest.CaptureFixture[str]

    def __post_init__(self) -> None:
        settings = Settings(data_dir=self.data)
        self.volumes = Volumes(self.data / "volumes", self.store.images, settings)

    @property
    def data(self) -> Path:
        return self.store.work / "data"

    def __call__(self, *arguments: str) -> tuple[int, dict[tuple[str, str], str]]:
        """Its exit status, and the state of each finding by kind and subject."""
        self.capsys.readouterr()
        status = main(["--data-dir", str(self.data), "doctor", "-o", "json", *arguments])
        items = json.loads(self.capsys.readouterr().out)["items"]
        assert all(item["message"] and item["hint"] for item in items)
        return status, {(item["kind"], item["subject"]): item["state"] for item in items}


@pytest.fixture
def doctor(store: Store, capsys: pytest.CaptureFixture[str]) -> Doctor:
    (store.work / "data").mkdir(mode=0o700)
    return Doctor(store, capsys)


@pytest.fixture
def image(doctor: Doctor) -> BackingImage:
    """An encrypted image with a hole."""
    raw = make_raw(doctor.store.work / "raw", MIB, [(0, 128 * KIB), (512 * KIB, 128 * KIB)])
    doctor.store.download(raw)
    return doctor.store.apply(clone("locked", "golden", "encrypt"))


def test_a_tool_that_only_some_filesystems_need_is_a_note(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "OPTIONAL", {"sh": "dash", "mkfs.none": "none-progs"})
    assert doctor("--fix") == (0, {("tool-missing", "tool mkfs.none"): "note"})


def test_a_healthy_node_is_told_so(doctor: Doctor, image: BackingImage) -> None:
    doctor.volumes.create("vol", MIB, {"backingImage": "golden"})
    assert doctor() == (0, {})
    assert main(["--data-dir", str(doctor.data), "doctor"]) == 0
    assert doctor.capsys.readouterr().out == "nothing is wrong\n"


def test_partial_files_go(doctor: Doctor, image: BackingImage) -> None:
    volume = doctor.volumes.create("vol", MIB, {})
    (volume.directory / "record.json.17.partial").touch()
    (doctor.data / "volumes" / "half").mkdir()
    (doctor.data / "volumes" / "half" / "volume.img").write_bytes(bytes(4096))
    (image.directory / "image.partial").touch()
    (doctor.data / "images" / "half").mkdir()
    wrong = {
        ("partial", "volume half"),
        ("partial", "volume vol"),
        ("partial", "backing image half"),
        ("partial", "backing image locked"),
    }
    assert doctor() == (1, dict.fromkeys(wrong, "wrong"))
    assert doctor("--fix") == (0, dict.fromkeys(wrong, "repaired"))
    assert doctor() == (0, {})
    assert doctor.volumes.get("vol") == volume
    assert image.path.exists()


def test_what_somebody_works_on_is_left_alone(doctor: Doctor) -> None:
    half = doctor.data / "volumes" / "half"
    with locked(half, "volume half"):
        assert doctor("--fix") == (0, {})
        assert half.exists()


def test_a_lost_extent_map_is_made_anew(doctor: Doctor, image: BackingImage) -> None:
    before = image.extents()
    image.map_path.write_text("{")
    assert doctor() == (1, {("map-missing", "backing image locked"): "wrong"})
    assert doctor("--fix") == (0, {("map-missing", "backing image locked"): "repaired"})
    assert json.loads(image.map_path.read_text())["data"]
    assert image.extents() == before


def test_a_header_backup_follows_its_header(doctor: Doctor, image: BackingImage, parameters: SecretParameters) -> None:
    image.header_path.unlink()
    assert doctor("--fix") == (0, {("backup-old", "backing image locked"): "repaired"})
    keyslots.change(image.path, PASSPHRASE, SecretParameters(b"new", pbkdf=parameters.pbkdf), "it")
    assert doctor() == (1, {("backup-old", "backing image locked"): "wrong"})
    assert doctor("--fix")[0] == 0
    header.test_passphrase(image.header_path, b"new", "it")
    with pytest.raises(EbiError):
        header.test_passphrase(image.header_path, PASSPHRASE, "it")


def test_a_damaged_header_is_not_backed_up(doctor: Doctor, image: BackingImage) -> None:
    before = image.header_path.read_bytes()
    with image.path.open("r+b") as file:
        file.write(bytes(64 * KIB))
    assert doctor("--fix") == (1, {("header-damaged", "backing image locked"): "wrong"})
    assert image.header_path.read_bytes() == before
    assert main(["--data-dir", str(doctor.data), "image", "header", "restore", "locked"]) == 0
    assert doctor() == (0, {})


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff\x00"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"capacity"', '"size"')),
        lambda path: path.write_text(path.read_text().replace('"bad"', '"good"')),
    ],
)
def test_a_damaged_record_does_not_take_the_others_down(doctor: Doctor, image: BackingImage, damage: Damage) -> None:
    good = doctor.volumes.create("fine", MIB, {})
    bad = doctor.volumes.create("bad", MIB, {"encrypted": "true"})
    damage(bad.directory / "record.json")
    damage_image = image.directory / "record.json"
    damage_image.write_text("{")
    assert doctor.volumes.list() == [good]
    with pytest.raises(EbiError, match="the record of volume bad is damaged") as refused:
        doctor.volumes.get("bad")
    assert refused.value.kind is Kind.INTERNAL
    doctor.volumes.recover()
    doctor.store.images.recover()
    wrong = {("record-damaged", "volume bad"): "wrong", ("record-damaged", "backing image locked"): "wrong"}
    assert doctor("--fix") == (1, wrong)
    # Nobody knows which image it starts from.
    assert main(["--data-dir", str(doctor.data), "delete", "backingimage", "golden"]) == Kind.PRECONDITION.value
    doctor.volumes.delete("bad")
    assert not bad.directory.exists()


def test_missing_files_are_told(doctor: Doctor, image: BackingImage) -> None:
    volumes = [doctor.volumes.create(name, MIB, {}) for name in ("gone", "short")]
    doctor.volumes.create("orphan", MIB, {"backingImage": "locked", "encrypted": "true"})
    volumes[0].path.unlink()
    with volumes[1].path.open("r+b") as file:
        file.truncate(4096)
    shutil.rmtree(image.directory)
    golden = doctor.store.images.get("golden")
    golden.path.unlink()
    wrong = {
        ("file-missing", "volume gone"),
        ("file-missing", "volume short"),
        ("image-missing", "volume orphan"),
        ("file-missing", "backing image golden"),
    }
    assert doctor("--fix") == (1, dict.fromkeys(wrong, "wrong"))


def test_an_inline_volume_without_its_pod_goes(doctor: Doctor) -> None:
    pod = doctor.data / "pod"
    pod.mkdir()
    doctor.volumes.create("inline", MIB, {}, target=str(pod / "target"))
    assert doctor() == (0, {})
    pod.rmdir()
    assert doctor() == (1, {("forgotten", "inline volume inline"): "wrong"})
    assert doctor("--fix") == (0, {("forgotten", "inline volume inline"): "repaired"})
    assert doctor.volumes.list() == []


def test_a_failed_image_is_told(doctor: Doctor) -> None:
    with pytest.raises(EbiError):
        doctor.store.download(make_raw(doctor.store.work / "raw", MIB, []), checksum="0" * 128)
    assert doctor() == (1, {("failed", "backing image golden"): "wrong"})
