"""The command line, as a user and a script see it."""

import json
import os
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from plugin.cli import main, parser
from plugin.errors import EbiError
from plugin.host.files import private_directory
from tests.unit import conftest
from tests.unit.csi_node import running

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
MIB = 1 << 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "ebi"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "golden.raw"
    with path.open("wb") as file:
        file.write(b"golden" * 10_000)
        file.truncate(4 * MIB)
    return path


def written(document: dict[str, Any], folder: Path) -> str:
    path = folder / f"{document['metadata']['name']}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def download(folder: Path, name: str, raw: Path) -> str:
    return written(conftest.manifest(name, "download", url=raw.as_uri()), folder)


def clone(folder: Path, name: str, source: str, encryption: str) -> str:
    return written(conftest.clone(name, source, encryption), folder)


def secret(folder: Path) -> str:
    return written(conftest.secret(), folder)


def ebi(data: Path, *arguments: str) -> int:
    return main(["--data-dir", str(data), *arguments])


def get(data: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capsys.readouterr()
    assert ebi(data, "get", *arguments, "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_apply_makes_images_in_the_order_that_they_need(
    data: Path, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [secret(tmp_path), clone(tmp_path, "locked", "golden", "encrypt"), download(tmp_path, "golden", raw)]
    assert ebi(data, "apply", *(part for file in files for part in ("-f", file))) == 0
    assert capsys.readouterr().out.splitlines() == ["backingimage/golden ready", "backingimage/locked ready, encrypted"]
    assert data.stat().st_mode & 0o777 == 0o700


def test_applying_again_changes_nothing(
    data: Path, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ebi(data, "apply", "-f", download(tmp_path, "golden", raw)) == 0
    before = get(data, capsys, "backingimages", "golden")
    assert ebi(data, "apply", "-f", download(tmp_path, "golden", raw)) == 0
    assert get(data, capsys, "backingimages", "golden") == before


def test_json_is_the_kubernetes_object(
    data: Path, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ebi(data, "apply", "-f", download(tmp_path, "golden", raw))
    one = get(data, capsys, "backingimages", "golden")
    assert one["kind"] == "BackingImage"
    status = one["status"]
    assert isinstance(status, dict)
    assert {"state", "progress", "message", "size", "virtualSize", "realSize", "checksum", "encrypted", "path"} <= set(
        status
    )
    assert (status["state"], status["virtualSize"], status["encrypted"]) == ("ready", 4 * MIB, False)
    assert Path(str(status["path"])).read_bytes() == raw.read_bytes()
    several = get(data, capsys, "backingimages")
    assert several["kind"] == "List" and several["items"] == [one]
    assert get(data, capsys, "volumes") == {"apiVersion": "v1", "kind": "List", "items": []}


def test_a_failed_image_is_told_with_its_reason_and_a_hint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ebi(data, "apply", "-f", clone(tmp_path, "locked", "absent", "encrypt"), "-f", secret(tmp_path)) == 1
    said = capsys.readouterr()
    assert "absent" in said.err and "hint:" in said.err and not said.out


def test_one_failure_does_not_keep_the_others(
    data: Path, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [clone(tmp_path, "broken", "absent", "ignore"), download(tmp_path, "golden", raw)]
    assert ebi(data, "apply", "-f", files[0], "-f", files[1]) == 1
    assert "backingimage/golden ready" in capsys.readouterr().out


def test_deleting(data: Path, tmp_path: Path, raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ebi(data, "apply", "-f", download(tmp_path, "golden", raw))
    assert ebi(data, "delete", "backingimage", "golden") == 0
    assert ebi(data, "delete", "backingimage", "golden") == 3
    assert "golden" in capsys.readouterr().err
    assert ebi(data, "get", "backingimages", "golden") == 3
    assert not [file for file in data.rglob("*") if file.is_file()]


def test_the_seeds_storage_class_is_valid_as_it_stands(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ebi(data, "apply", "-f", str(EXAMPLES / "5-storageclass.yaml")) == 0
    assert "storageclass/longhorn-crypto-global valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: Pod\n", "'Pod'"),
        ("- 1\n", "not an object"),
        ("kind: Secret\nstringData:\n  CRYPTO_KEY_VALUE: [open-sesame\n", "line"),
    ],
)
def test_bad_manifests_name_the_file(
    data: Path, tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert ebi(data, "apply", "-f", str(file)) == 1
    said = capsys.readouterr().err
    assert str(file) in said and words in said and "open-sesame" not in said


def test_a_data_directory_that_others_can_enter_is_refused(data: Path, raw: Path, tmp_path: Path) -> None:
    data.mkdir(mode=0o755)
    data.chmod(0o755)
    assert ebi(data, "apply", "-f", download(tmp_path, "golden", raw)) == 1


def test_settings_come_from_the_environment_and_flags_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EBI_DATA_DIR", str(tmp_path / "one"))
    monkeypatch.setenv("EBI_WORKERS", "many")
    assert main(["get", "backingimages"]) == 2
    assert "EBI_WORKERS" in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("apply", "get", "delete", "serve", "volume", "EBI_DATA_DIR"))


def described(parser: ArgumentParser) -> Iterator[tuple[str, str, str | None]]:
    """Each argument of the command and of its own commands: of which command, its name, its help."""
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the commands below it
            for command in action.choices.values():
                yield from described(command)
        else:
            yield parser.prog, action.dest, action.help


def test_help_says_something_of_every_argument() -> None:
    found = list(described(parser()))
    assert ("ebi volume attach", "fs_type") in [each[:2] for each in found]
    assert [each for each in found if not each[2]] == []


def test_a_volume_command_without_a_server_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"unix://{tmp_path}/csi.sock"
    assert main(["volume", "delete", "--endpoint", endpoint, "pvc-1"]) == 9
    assert "ebi serve" in capsys.readouterr().err


def test_creating_a_volume_tells_what_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((EXAMPLES / "5-storageclass.yaml").read_text())
    parameters = {"numberOfReplicas": "3", "staleReplicaTimeout": "2880", "fromBackup": ""}
    file = written({**document, "parameters": parameters}, tmp_path)
    with running() as node:
        create = ["volume", "create", "--endpoint", node.settings.endpoint, "-s", "1Mi", "-f"]
        assert main([*create, file, "pvc-1"]) == 0
        said = capsys.readouterr()
        assert said.out == "pvc-1\n"
        assert "ebi: no effect here: numberOfReplicas, staleReplicaTimeout\n" in said.err
        file = written({**document, "parameters": {**parameters, "fromBackup": "nfs://backups"}}, tmp_path)
        assert main([*create, file, "pvc-2"]) == 2
        assert "fromBackup" in capsys.readouterr().err


def test_the_filesystem_of_a_storage_class_is_the_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = yaml.safe_load((EXAMPLES / "5-storageclass.yaml").read_text())
    file = written({**document, "parameters": {"csi.storage.k8s.io/fstype": "btrfs", "fsType": "ext4"}}, tmp_path)
    with running() as node:
        assert main(["volume", "create", "--endpoint", node.settings.endpoint, "-s", "200Mi", "-f", file, "pvc-1"]) == 0
        made = get(node.settings.data_dir, capsys, "volume", "pvc-1")
    assert made["spec"]["parameters"] == {"fsType": "btrfs"}  # type: ignore[index]


@pytest.mark.parametrize(
    "command",
    [
        ["--data-dir", "DATA", "image", "header", "show", "x"],
        ["image", "--data-dir", "DATA", "header", "show", "x"],
        ["image", "header", "show", "--data-dir", "DATA", "x"],
        ["image", "header", "show", "x", "--data-dir", "DATA"],
    ],
)
def test_flags_of_every_command_may_stand_anywhere(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EBI_DATA_DIR", str(tmp_path / "nowhere"))
    assert main([str(tmp_path / "ebi") if word == "DATA" else word for word in command]) == 3
    assert (tmp_path / "ebi").exists() and not (tmp_path / "nowhere").exists()
    assert main([*command, "--log-level", "loud"]) == 2
    assert "invalid log level 'loud'" in capsys.readouterr().err


class TestWithoutRoot:
    """What only root may do is told in a line, and what to do about it."""

    @pytest.fixture
    def closed(self, data: Path) -> Iterator[Path]:
        """A data directory that the one who runs the commands can't enter, who is not root."""
        data.mkdir(mode=0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield data
        finally:
            os.seteuid(user)
            data.chmod(0o700)

    @pytest.mark.parametrize(
        "command",
        [
            ["get", "backingimages"],
            ["get", "volume", "pvc-1"],
            ["delete", "backingimage", "x"],
            ["image", "verify", "x"],
            ["apply", "-f", str(EXAMPLES / "5-storageclass.yaml")],
            ["doctor", "--fix"],
            ["serve"],
            ["volume", "attach", "pvc-1", "/mnt", "--endpoint", "unix://DATA/run/csi.sock"],
        ],
    )
    def test_a_command(self, closed: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert ebi(closed, *(word.replace("DATA", str(closed)) for word in command)) == 5
        first, hint = capsys.readouterr().err.splitlines()
        assert str(closed) in first and first.endswith("Permission denied") and "run this as root" in hint

    def test_one_through_the_socket(self, closed: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert ebi(closed, "volume", "delete", "pvc-1", "--endpoint", f"unix://{closed}/csi.sock") == 9
        assert "hint: run this as root" in capsys.readouterr().err

    def test_one_on_the_directory_of_root(self, closed: Path) -> None:
        with pytest.raises(EbiError, match=r"/etc is not private: owner 0.*run this as root"):
            private_directory(Path("/etc"))
