"""The records of volumes, without any device."""

from dataclasses import replace
from pathlib import Path

import pytest

from plugin import events
from plugin.errors import EbiError, Kind
from plugin.host.lock import locked
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes
from plugin.volumes.record import RECORD, Volume

MIB = 1 << 20


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    settings = Settings(data_dir=tmp_path, device_template=f"{tmp_path}/devices/{{volume}}")
    return Volumes(tmp_path / "volumes", Images(tmp_path / "images", settings), settings)


def kind(call: "pytest.ExceptionInfo[EbiError]") -> Kind:
    return call.value.kind


class TestCreate:
    def test_reserves_the_capacity_and_the_header_on_top(self, volumes: Volumes) -> None:
        volume = volumes.create("pvc-1", 5 * MIB, {"encrypted": "true"})
        assert volume.capacity == 5 * MIB
        assert volume.path.stat().st_size == 21 * MIB
        assert volume.path.stat().st_blocks * 512 >= 21 * MIB
        assert not volume.formatted

    def test_reserving_is_a_step_that_is_timed(self, volumes: Volumes) -> None:
        seen: list[events.Event] = []
        end = events.subscribe(seen.append)
        try:
            volumes.create("pvc-1", 5 * MIB, {})
            volumes.expand("pvc-1", 6 * MIB)
        finally:
            end()
        assert [(event.name, event.ok) for event in seen if isinstance(event, events.Step)] == [("reserve", True)] * 2

    def test_parameters_without_effect_are_told_when_it_is_made(
        self, volumes: Volumes, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        given = {"staleReplicaTimeout": "30", "numberOfReplicas": "3", "fromBackup": "", "dataLocality": ""}
        for _ in range(2):
            volumes.create("pvc-1", MIB, given)
        assert caplog.messages == [
            "volume pvc-1: these parameters have no effect here: numberOfReplicas, staleReplicaTimeout"
        ]

    def test_is_found_again_with_all_it_was_made_with(self, volumes: Volumes) -> None:
        volume = volumes.create("A name", 5 * MIB, {"fsType": "xfs", "mkfsParams": "-K"}, block=True)
        assert volumes.get(volume.id) == volume
        assert volumes.list() == [volume]
        assert volume.to_object()["spec"]["parameters"] == {"fsType": "xfs", "mkfsParams": "-K"}

    def test_again_is_the_same_one_and_otherwise_refused(self, volumes: Volumes) -> None:
        volume = volumes.create("pvc-1", 5 * MIB, {})
        assert volumes.create("pvc-1", 4 * MIB, {}) == volume
        for capacity, limit, given in ((6 * MIB, 0, {}), (MIB, 4 * MIB, {}), (5 * MIB, 0, {"encrypted": "true"})):
            with pytest.raises(EbiError) as refused:
                volumes.create("pvc-1", capacity, given, limit=limit)
            assert kind(refused) is Kind.EXISTS

    def test_sizes_are_rounded_up_but_not_over_the_limit(self, volumes: Volumes) -> None:
        assert volumes.create("pvc-1", 5 * MIB + 1, {}).capacity == 5 * MIB + 4096
        with pytest.raises(EbiError) as refused:
            volumes.create("pvc-2", 5 * MIB + 1, {}, limit=5 * MIB + 2)
        assert kind(refused) is Kind.OUT_OF_RANGE
        assert [volume.id for volume in volumes.list()] == ["pvc-1"]

    def test_small_xfs_is_refused(self, volumes: Volumes) -> None:
        with pytest.raises(EbiError, match="too few for xfs") as refused:
            volumes.create("pvc-1", 100 * MIB, {"fsType": "xfs"})
        assert kind(refused) is Kind.OUT_OF_RANGE
        with pytest.raises(EbiError, match="too few for xfs"):
            volumes.create("pvc-1", 100 * MIB, {"fsType": "ext4"}, fs_type="xfs")

    def test_absent_image_is_not_found(self, volumes: Volumes) -> None:
        with pytest.raises(EbiError) as refused:
            volumes.create("pvc-1", 5 * MIB, {"backingImage": "absent"})
        assert kind(refused) is Kind.NOT_FOUND
        assert volumes.list() == []


class TestExpand:
    def test_makes_room_and_never_shrinks(self, volumes: Volumes) -> None:
        volume = volumes.create("pvc-1", 5 * MIB, {"encrypted": "true"})
        assert volumes.expand("pvc-1", 9 * MIB) == 9 * MIB
        assert volumes.expand("pvc-1", 9 * MIB) == 9 * MIB
        assert volumes.expand("pvc-1", 2 * MIB) == 9 * MIB
        assert volume.path.stat().st_size == 25 * MIB
        assert volumes.get("pvc-1").capacity == 9 * MIB

    def test_of_an_absent_one_is_not_found(self, volumes: Volumes) -> None:
        with pytest.raises(EbiError) as refused:
            volumes.expand("absent", MIB)
        assert kind(refused) is Kind.NOT_FOUND


class TestDelete:
    def test_leaves_nothing_and_may_come_again(self, volumes: Volumes, tmp_path: Path) -> None:
        volumes.create("pvc-1", 5 * MIB, {"encrypted": "true"})
        volumes.delete("pvc-1")
        volumes.delete("pvc-1")
        assert list((tmp_path / "volumes").iterdir()) == []

    def test_of_what_is_no_id_touches_nothing(self, volumes: Volumes, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        for text in ("../other", "/etc", "..", ""):
            volumes.delete(text)
        assert (tmp_path / "other").is_dir()

    def test_during_another_operation_is_busy(self, volumes: Volumes) -> None:
        volume = volumes.create("pvc-1", 5 * MIB, {})
        with locked(volume.directory, "volume pvc-1"), pytest.raises(EbiError) as refused:
            volumes.delete("pvc-1")
        assert kind(refused) is Kind.BUSY
        assert volumes.get("pvc-1") == volume


class TestNames:
    @pytest.mark.parametrize("text", ["../other", "/etc/passwd", "", "a/b"])
    def test_a_path_is_no_volume(self, volumes: Volumes, text: str) -> None:
        with pytest.raises(EbiError) as refused:
            volumes.get(text)
        assert kind(refused) is Kind.NOT_FOUND


def test_a_store_is_larger_than_the_volume_by_its_metadata(tmp_path: Path) -> None:
    volume = Volume("v", "v", 1 << 30, True, "", 64 << 10, image="parrot", covered=1 << 28, directory=tmp_path)
    payload = volume.file_size - (16 << 20)
    assert payload == (1 << 30) + (1 + 4096 // 4096 + 1) * (64 << 10)


def test_a_volume_of_old_is_covered_whole_and_grows_behind(tmp_path: Path) -> None:
    volume = Volume("v", "v", 1 << 30, True, "", 64 << 10, image="parrot", covered=1 << 28, directory=tmp_path / "v")
    kept = volume.to_json()
    assert Volume.from_json(kept, volume.directory) == volume
    del kept["covered"]
    old = Volume.from_json(kept, volume.directory)
    assert old.covered == old.capacity
    assert replace(old, capacity=2 << 30).file_size == old.file_size + (1 << 30)


def test_a_record_that_cannot_be_read_is_not_called_damaged(volumes: Volumes) -> None:
    """Whoever reads that it is damaged may delete the volume; what the disk can't give now it may give later."""
    record = volumes.create("pvc-1", 5 * MIB, {}).path.with_name(RECORD)
    record.unlink()
    record.mkdir()
    with pytest.raises(EbiError, match=r"reading the record of volume pvc-1 failed: .*Is a directory") as refused:
        volumes.get("pvc-1")
    assert kind(refused) is Kind.INTERNAL
    assert "damaged" not in str(refused.value) and "delete" not in str(refused.value)
