"""Devices that another system attaches: those that are refused for what is on them. A file stands for the device."""

import subprocess
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.luks import header
from plugin.luks.parameters import SecretParameters
from plugin.volumes import attached
from plugin.volumes.assemble import Keys
from tests.unit.conftest import MIB, make_raw


@pytest.mark.parametrize(
    ("content", "encrypted", "kind"),
    [
        ("ext4", "true", Kind.INVALID),
        ("crypto_LUKS", "false", Kind.INVALID),
        ("nothing that is known", "true", Kind.PRECONDITION),  # it may be a device that has failed
    ],
)
def test_what_is_not_what_the_volume_is_said_to_be(
    tmp_path: Path, parameters: SecretParameters, content: str, encrypted: str, kind: Kind
) -> None:
    device = make_raw(tmp_path / "device", 32 * MIB, [])
    if content == "ext4":
        subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    elif content == "crypto_LUKS":
        header.create(device, parameters, header.new_key(parameters), sector_size=512, owner="it")
    before = device.read_bytes()
    volume = attached.Attached("pvc-1", device, attached.parse({"encrypted": encrypted}), attached.Marks(tmp_path))
    sort = "encrypted" if encrypted == "true" else "plain"
    with pytest.raises(
        EbiError, match=f"unsupported disk encryption format {content} on .* of {sort} volume pvc-1"
    ) as got:
        volume.stack(Keys({}, volume.owner), block=False)
    assert got.value.kind is kind and got.value.hint
    assert device.read_bytes() == before
