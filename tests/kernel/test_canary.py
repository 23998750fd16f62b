"""A passphrase stays in memory and pipes: hunted through everything that a whole run leaves behind."""

import base64
import os
import secrets
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import grpc
import pytest
import yaml

from tests.demo import golden
from tests.demo.__main__ import example
from tests.demo.node import Node

CANARY = "canary-" + secrets.token_hex(16)
WRONG = "wrong-" + secrets.token_hex(16)
MIB = 1 << 20


def needles() -> Iterator[bytes]:
    """The passphrases as they might be written down."""
    for text in (CANARY, WRONG):
        raw = text.encode()
        yield from (raw, base64.b64encode(raw)[:-4], raw.hex().encode(), urllib.parse.quote(text).encode())


def changed(folder: Path, since: float) -> Iterator[tuple[Path, bytes]]:
    """The regular files below `folder` that were written after `since`, seconds of the epoch, and what is in them."""
    with tempfile.TemporaryFile(dir=folder) as new:
        device = os.fstat(
            new.fileno()
        ).st_dev  # in the virtual machine the host's files, which others use, have another
    for directory, _, names in os.walk(folder):
        for file in (Path(directory, name) for name in names):
            with suppress(FileNotFoundError):  # somebody's temporary file
                status = file.lstat()
                if stat.S_ISREG(status.st_mode) and status.st_ctime >= since and status.st_dev == device:
                    yield file, file.read_bytes()


def secret_file(path: Path, passphrase: str, iterations: str = "1000") -> Path:
    """A Secret document with a cheap key derivation."""
    data = {"CRYPTO_KEY_VALUE": passphrase, "CRYPTO_PBKDF": "pbkdf2", "CRYPTO_PBKDF_FORCE_ITERATIONS": iterations}
    metadata = {"name": "longhorn-crypto", "namespace": "longhorn-system"}
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}))
    return path


def test_no_passphrase_is_found_anywhere_after_a_full_run(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    work, start = home, time.time() - 1  # a file's times lag behind by a tick
    outside = work / "given"  # what the user gives; the only place where the passphrase may stand
    outside.mkdir()
    secret, wrong = secret_file(outside / "secret.yaml", CANARY), secret_file(outside / "wrong.yaml", WRONG)
    dearer = secret_file(outside / "dearer.yaml", CANARY, "2000")
    given_files = (secret, wrong, dearer)
    trace = work / "execve"  # every argv and environment of every program that is started, from the kernel
    node = Node(
        work,
        [
            "strace",
            "--daemonize",
            "--follow-forks",
            "--seccomp-bpf",  # stop at execve only; every system call would take for ever
            "--output",
            str(trace),
            "--output-append-mode",
            "--trace=execve",
            "-v",
            "-s",
            "65536",
        ],
    )
    node.options = ["--log-level", "debug"]
    tree, raw = work / "tree", work / "golden.raw"
    tree.mkdir()
    golden.fill_tree(Path(golden.__file__).parent, tree, MIB)
    golden.make_raw(tree, raw, 16 * MIB)

    node.ebi("apply", "-f", example("1-download.yaml", work, url=raw.as_uri(), checksum=golden.sha512(raw)))
    node.ebi("apply", "-f", secret, "-f", example("3-encrypt.yaml", work))
    node.ebi("apply", "-f", wrong, "-f", example("4-decrypt.yaml", work), fails=True)
    node.ebi("apply", "-f", secret, "-f", example("4-decrypt.yaml", work))
    said = []
    with node.server() as kubelet:
        parameters = {"encrypted": "true", "backingImage": "parrot-cloned-encrypted"}
        volume = kubelet.create("canary", 32 * MIB, parameters)
        staging, target = node.staging / volume, work / "target"
        given = yaml.safe_load(secret.read_text())["stringData"]
        for bad in ({**given, "CRYPTO_KEY_VALUE": WRONG}, {**given, "CRYPTO_KEY_PROVIDER": "vault"}):
            with pytest.raises(grpc.RpcError) as refused:
                kubelet.stage(volume, staging, bad)
            said.append(str(refused.value))
        kubelet.stage(volume, staging, given)
        kubelet.publish(volume, staging, target)
        kubelet.unpublish(volume, target)
        node.ebi("volume", "rekey", volume, "--secret", secret, "--new-secret", dearer)
        kubelet.unstage(volume, staging)
        node.ebi("doctor")
        said.append(node.metrics())
        kubelet.delete(volume)
    captured = capfd.readouterr()
    said += [captured.out, captured.err]

    assert trace.read_bytes().count(b"cryptsetup") > 3, "the trace saw nothing"
    seen, found = set(), []
    folders = [work, *(Path(name) for name in ("/run", "/tmp", "/var/log", "/dev/shm"))]
    texts = [("what was said", "\n".join(said).encode())]
    for where, text in chain(texts, *(changed(folder, start) for folder in folders)):
        seen.add(where)
        if where not in given_files:
            found += [(where, needle) for needle in needles() if needle in text]
    assert not found
    assert {node.log, *given_files} <= seen, "the hunt is blind"
