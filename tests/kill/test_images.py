"""An image operation killed at a random moment: the source is as it was, the target absent, failed or complete.

EBI_KILL_ROUNDS sets how many kills in all (default 200), EBI_KILL_SEED repeats a run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.demo import golden

MIB = 1 << 20
ROUNDS = int(os.environ.get("EBI_KILL_ROUNDS", "200"))
SEED = int(os.environ.get("EBI_KILL_SEED", str(random.SystemRandom().randrange(1 << 32))))
SECRET = {"CRYPTO_KEY_VALUE": "kill", "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": "1000"}
SPACE = {"namespace": "longhorn-system"}


class Store:
    """A data directory with sources in it, and operations to kill."""

    def __init__(self, work: Path) -> None:
        self.work, self.data = work, work / "ebi"
        self.secret = self.write(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key", **SPACE}, "stringData": SECRET}
        )
        raw, qcow2 = work / "golden.raw", work / "golden.qcow2"
        with raw.open("wb") as file:  # random data with holes, so that neither compresses nor deduplicates
            file.truncate(64 * MIB)
            for start in range(0, 64, 8):
                file.seek(start * MIB)
                file.write(os.urandom(4 * MIB))
        golden.make_qcow2(raw, qcow2)
        self.plain = golden.sha512(raw)
        self.ebi("apply", "-f", self.image("raw", "download", url=raw.as_uri()))
        self.ebi("apply", "-f", self.image("qcow2", "download", url=qcow2.as_uri()))
        self.ebi("apply", "-f", self.secret, "-f", self.clone("luks", "raw", "encrypt"))
        self.sources = {name: golden.sha512(self.path(name)) for name in ("raw", "qcow2", "luks")}
        self.operations = {
            "download": self.image("target", "download", url=raw.as_uri(), checksum=self.plain),
            "clone": self.clone("target", "raw", "ignore"),
            "encrypt": self.clone("target", "raw", "encrypt"),
            "encrypt qcow2": self.clone("target", "qcow2", "encrypt"),
            "decrypt": self.clone("target", "luks", "decrypt"),
        }

    def write(self, document: dict[str, object]) -> Path:
        """The document as a file."""
        path = self.work / f"{os.urandom(4).hex()}.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    def image(self, name: str, source: str, checksum: str = "", **parameters: str) -> Path:
        """A BackingImage manifest."""
        spec = {"sourceType": source, "sourceParameters": parameters, "checksum": checksum}
        head = {"apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "metadata": {"name": name, **SPACE}}
        return self.write({**head, "spec": spec})

    def clone(self, name: str, source: str, encryption: str) -> Path:
        """A clone's manifest."""
        keys = {} if encryption == "ignore" else {"secret": "key", "secret-namespace": SPACE["namespace"]}
        return self.image(name, "clone", **{"backing-image": source, "encryption": encryption, **keys})

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """`ebi` on this data directory."""
        return [sys.executable, "-m", "plugin.cli", "--data-dir", self.data, *arguments]

    def ebi(self, *arguments: str | Path) -> str:
        """Run `ebi` to its end, which must be a good one."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    def status(self, name: str) -> dict[str, object] | None:
        """The image's status, or None where there is no such image."""
        items = json.loads(self.ebi("get", "backingimages", "-o", "json"))["items"]
        return next((item["status"] for item in items if item["metadata"]["name"] == name), None)

    def path(self, name: str) -> Path:
        """The image's file."""
        status = self.status(name)
        assert status is not None
        return Path(str(status["path"]))

    def apply(self, operation: str) -> list[str | Path]:
        """The command of one operation."""
        return self.command("apply", "-f", self.secret, "-f", self.operations[operation])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("kill"))


def session_members(session: int) -> list[str]:
    """The processes of a session that still live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def kill_after(command: list[str | Path], seconds: float) -> bool:
    """Start the command, SIGKILL its main process after `seconds`; whether that came before its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while left := session_members(process.pid):  # workers die with their parent, in a moment
            assert time.monotonic() < deadline, f"processes {left} outlive their parent"
            time.sleep(0.005)
        return True
    assert process.returncode == 0
    return False


@pytest.mark.parametrize("operation", ["download", "clone", "encrypt", "encrypt qcow2", "decrypt"])
def test_a_kill_at_any_moment_is_followed_by_success(store: Store, operation: str) -> None:
    dice = random.Random(f"{SEED} {operation}")
    start = time.monotonic()
    subprocess.run(store.apply(operation), check=True, stdout=subprocess.DEVNULL)
    usual = time.monotonic() - start
    store.ebi("delete", "backingimage", "target")
    killed = 0
    for number in range(ROUNDS // 5):
        where = f"round {number} of {operation}, seed {SEED}"
        killed += kill_after(store.apply(operation), dice.uniform(0, usual))
        status = store.status("target")
        if status is None or status["state"] != "ready":
            assert status is None or status["state"] in ("failed", "pending", "starting"), f"{where}: {status}"
            subprocess.run(store.apply(operation), check=True, stdout=subprocess.DEVNULL)
            status = store.status("target")
        assert status is not None and status["state"] == "ready", where
        target = Path(str(status["path"]))
        kept = {"record.json", "extents.json", target.name}
        assert {file.name for file in target.parent.iterdir()} <= kept | {"header.luks"}, where
        if operation in ("download", "clone", "decrypt"):
            assert golden.sha512(target) == store.plain, where
        elif number % 8 == 0:
            again = store.clone("back", "target", "decrypt")
            store.ebi("apply", "-f", store.secret, "-f", again)
            assert golden.sha512(store.path("back")) == store.plain, where
            store.ebi("delete", "backingimage", "back")
        store.ebi("delete", "backingimage", "target")
        assert not (store.data / "images" / "target").exists(), where
    assert killed > ROUNDS // 5 // 4, "most rounds ended before their kill"


def test_the_sources_are_as_they_were(store: Store) -> None:
    assert {name: golden.sha512(store.path(name)) for name in store.sources} == store.sources
