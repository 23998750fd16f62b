"""An image operation killed at a random moment: the source is as it was, the target absent, failed or complete.

EBI_KILL_ROUNDS sets how many kills in all (default 200), EBI_KILL_SEED repeats a run.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
import zstandard

from plugin import cli
from plugin.errors import EbiError, Kind
from plugin.images.image import BackingImage
from plugin.images.store import Images
from plugin.luks import header
from plugin.settings import Settings
from tests.demo import golden
from tests.killing import wait_for_session
from tests.unit.conftest import disk_hash

MIB = 1 << 20
SIZE = 24 * MIB
ROUNDS = int(os.environ.get("EBI_KILL_ROUNDS", "200"))
SEED = int(os.environ.get("EBI_KILL_SEED", str(random.SystemRandom().randrange(1 << 32))))
SPACE = {"namespace": "longhorn-system"}
OPERATIONS = ("download", "unpack", "upload", "clone", "encrypt", "encrypt qcow2", "decrypt", "reencrypt")
# By what comes out: the options; the encrypted image is the source.
EXPORTS: dict[str, tuple[str, ...]] = {
    "export": (), "export dense": ("--dense",), "export raw": ("--decrypt",),
    "export qcow2": ("--decrypt", "--format", "qcow2"),
}  # fmt: skip
EACH = ROUNDS // (len(OPERATIONS) + len(EXPORTS) + 1)  # rekey is the other one


class Store:
    """A data directory with sources in it, and the commands of the operations to kill."""

    def __init__(self, work: Path) -> None:
        self.work, self.data = work, work / "ebi"
        self.images = Images(self.data / "images", Settings())
        self.secret, self.other = self.write_secret("key"), self.write_secret("other")
        raw, qcow2, packed = work / "golden.raw", work / "golden.qcow2", work / "golden.packed"
        with raw.open("wb") as file:  # random data with holes, so that neither compresses nor deduplicates
            file.truncate(SIZE)
            for start in range(0, SIZE, 8 * MIB):
                file.seek(start)
                file.write(os.urandom(5 * MIB))
        golden.make_qcow2(raw, qcow2)
        packed.write_bytes(zstandard.compress(raw.read_bytes(), 1))
        self.plain = golden.sha512(raw)
        self.ebi("apply", "-f", self.image("raw", "download", url=raw.as_uri()))
        self.ebi("apply", "-f", self.image("qcow2", "download", url=qcow2.as_uri()))
        self.ebi("apply", "-f", self.secret, "-f", self.clone("luks", "raw", "encrypt"))
        self.sources = {name: golden.sha512(self.get(name).path) for name in ("raw", "qcow2", "luks")}
        manifests = {
            "download": self.image("target", "download", url=raw.as_uri(), checksum=self.plain),
            "unpack": self.image("target", "download", url=packed.as_uri(), checksum=golden.sha512(packed)),
            "clone": self.clone("target", "raw", "ignore"),
            "encrypt": self.clone("target", "raw", "encrypt"),
            "encrypt qcow2": self.clone("target", "qcow2", "encrypt"),
            "decrypt": self.clone("target", "luks", "decrypt"),
            "reencrypt": self.clone("target", "luks", "reencrypt"),
        }
        secrets = ("-f", self.secret, "-f", self.other)
        self.commands: dict[str, tuple[str | Path, ...]] = {
            name: ("apply", *secrets, "-f", manifest) for name, manifest in manifests.items()
        }
        self.commands["upload"] = ("image", "upload", "target", raw, "--checksum", self.plain)

    def write(self, document: dict[str, object]) -> Path:
        """The document as a file."""
        path = self.work / f"{os.urandom(4).hex()}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def write_secret(self, name: str) -> Path:
        """A Secret whose passphrase is its name, and its key derivation cheap."""
        data = {"CRYPTO_KEY_VALUE": name, "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
        return self.write(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, **SPACE}, "stringData": data}
        )

    def image(self, name: str, source: str, checksum: str = "", **parameters: str) -> Path:
        """A BackingImage manifest."""
        spec = {"sourceType": source, "sourceParameters": parameters, "checksum": checksum}
        head = {"apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "metadata": {"name": name, **SPACE}}
        return self.write({**head, "spec": spec})

    def clone(self, name: str, source: str, encryption: str) -> Path:
        """A clone's manifest."""
        keys = {} if encryption == "ignore" else {"secret": "key", "secret-namespace": SPACE["namespace"]}
        if encryption == "reencrypt":
            keys |= {"secret": "other", "source-secret": "key", "source-secret-namespace": SPACE["namespace"]}
        return self.image(name, "clone", **{"backing-image": source, "encryption": encryption, **keys})

    def command(self, *arguments: str | Path) -> list[str]:
        """`ebi` on this data directory, as a process."""
        return [sys.executable, "-m", "plugin.cli", *self.arguments(*arguments)]

    def arguments(self, *arguments: str | Path) -> list[str]:
        """Those of `ebi` on this data directory."""
        return ["--data-dir", str(self.data), *(str(argument) for argument in arguments)]

    def ebi(self, *arguments: str | Path) -> None:
        """`ebi` in this process, which must end well."""
        assert cli.main(self.arguments(*arguments)) == 0, arguments

    def get(self, name: str) -> BackingImage:
        """The image."""
        return self.images.get(name)

    def find(self, name: str) -> BackingImage | None:
        """The image, None where there is no such image."""
        try:
            return self.images.get(name)
        except EbiError as error:
            assert error.kind is Kind.NOT_FOUND
            return None

    def opens(self, name: str, passphrase: str) -> bool:
        """Whether the passphrase opens the image."""
        try:
            header.test_passphrase(self.get(name).path, passphrase.encode(), name)
            return True
        except EbiError as error:
            assert error.kind is Kind.INVALID
            return False


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("kill"))


class Killer:
    """Starts a command over and over, and kills it at a random moment of the time that it takes."""

    def __init__(self, store: Store, name: str, *arguments: str | Path) -> None:
        self._dice = random.Random(f"{SEED} {name}")
        self._command = store.command(*arguments)
        self._start = seconds(store.command("get", "backingimages"))
        self._usual = seconds(self._command)
        self.killed = 0

    def attempt(self, command: list[str] | None = None) -> None:
        """Start it, or another one of its kind, and SIGKILL its main process, if that comes before its end."""
        # While Python starts there is nothing to see.
        moment = self._dice.uniform(min(0.7 * self._start, self._usual / 2), self._usual)
        quiet = subprocess.DEVNULL
        start = time.monotonic()
        process = subprocess.Popen(command or self._command, stdout=quiet, stderr=quiet, start_new_session=True)
        try:
            process.wait(moment)
            assert process.returncode == 0
            self._usual = time.monotonic() - start  # the machine has other things to do at times
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            wait_for_session(process.pid)  # workers die with their parent
            self.killed += 1


def seconds(command: list[str]) -> float:
    """How long the command takes, which must end well."""
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def payload_hash(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(header.PAYLOAD_OFFSET)
        return hashlib.file_digest(file, "sha512").hexdigest()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_any_moment_is_followed_by_success(store: Store, operation: str) -> None:
    command = store.commands[operation]
    killer = Killer(store, operation, *command)
    store.ebi("delete", "backingimage", "target")
    for number in range(EACH):
        where = f"round {number} of {operation}, seed {SEED}"
        killer.attempt()
        image = store.find("target")
        if image is None or not image.ready:
            assert image is None or image.status.state in ("failed", "pending", "starting"), f"{where}: {image}"
            store.ebi(*command)
            image = store.get("target")
        assert image.ready, where
        kept = {"record.json", "extents.json", image.path.name} | ({"header.luks"} if image.encrypted else set())
        assert {file.name for file in image.directory.iterdir()} == kept, where
        if not image.encrypted:
            assert golden.sha512(image.path) == store.plain, where
        elif number % 5 == 0:
            store.ebi("image", "verify", "target")
            out, secret = store.work / "out", store.other if operation == "reencrypt" else store.secret
            store.ebi("image", "export", "target", out, "--decrypt", "-f", secret)
            assert golden.sha512(out) == store.plain, where
            out.unlink()
        store.ebi("delete", "backingimage", "target")
        assert not image.directory.exists(), where
    assert killer.killed > EACH // 8, "most rounds ended before their kill"


@pytest.mark.parametrize("name", EXPORTS)
def test_a_killed_export_leaves_no_file_or_a_whole_one(store: Store, name: str) -> None:
    directory = store.work / name
    directory.mkdir()
    out = directory / "out"
    command = ("image", "export", "luks", out, *EXPORTS[name], *(("-f", store.secret) if EXPORTS[name] else ()))
    killer = Killer(store, name, *command)
    out.unlink()
    for number in range(EACH):
        where = f"round {number} of {name}, seed {SEED}"
        killer.attempt()
        if not out.exists():
            store.ebi(*command)
        assert list(directory.iterdir()) == [out], where
        assert disk_hash(out, b"key") == store.plain, where
        out.unlink()
    assert killer.killed > EACH // 8, "most rounds ended before their kill"


def test_a_passphrase_that_is_being_changed_opens_as_the_old_or_the_new(store: Store) -> None:
    store.ebi("apply", "-f", store.clone("target", "luks", "ignore"))
    files, old, new = {"key": store.secret, "other": store.other}, "key", "other"
    before = payload_hash(store.get("target").path)

    def rekey() -> tuple[str | Path, ...]:
        return ("image", "rekey", "target", "-f", files[old], "--new", files[new])

    killer = Killer(store, "rekey", *rekey())
    for number in range(EACH):
        where = f"round {number} of rekey, seed {SEED}"
        old, new = new, old
        killer.attempt(store.command(*rekey()))
        assert store.opens("target", old) or store.opens("target", new), where
        store.images.recover()
        image = store.get("target")
        assert image.ready, where
        store.ebi(*rekey())
        assert store.opens("target", new) and not store.opens("target", old), where
        assert payload_hash(image.path) == before, where
        kept = {"record.json", "extents.json", "header.luks", "image"}
        assert {file.name for file in image.directory.iterdir()} == kept, where
    assert killer.killed > EACH // 8, "most rounds ended before their kill"
    store.ebi("image", "header", "restore", "target")  # what is kept beside it opens it too
    assert store.opens("target", new) and not store.opens("target", old)
    store.ebi("delete", "backingimage", "target")


def test_the_sources_are_as_they_were(store: Store) -> None:
    assert {name: golden.sha512(store.get(name).path) for name in store.sources} == store.sources
