"""Mappers that bear a name like ours and are not: LVM names its own as its user likes."""

from pathlib import Path

import pytest

from plugin.host import dm
from plugin.images.store import Images
from plugin.settings import Settings
from plugin.volumes import Volumes, imagemap


@pytest.mark.parametrize(("uuid", "ours"), [("EBI-img", True), ("CRYPT-LUKS2-0", True), ("LVM-0", False), ("", False)])
def test_another_s_mapper_is_neither_found_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uuid: str, ours: bool
) -> None:
    found = dm.Mapper("ebi-img-x", "dm-0", "253:0", uuid, False, 0, frozenset(), frozenset())
    removed: list[str] = []
    monkeypatch.setattr(dm, "every", lambda prefix="": [found] if found.name.startswith(prefix) else [])
    monkeypatch.setattr(dm, "find", lambda name: found if name == found.name else None)
    monkeypatch.setattr(dm, "remove", removed.append)
    settings = Settings(data_dir=tmp_path)
    volumes = Volumes(tmp_path / "volumes", Images(tmp_path / "images", settings), settings)
    assert [finding.kind for finding in volumes.examine() if "ebi-img-x" in finding.subject] == ["image-idle"] * ours
    imagemap.release_idle()
    assert removed == ["ebi-img-x"] * ours
