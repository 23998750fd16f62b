"""A golden image of real files, the hashes of those files, and a web server that hands it out."""

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Stands in one file of the image; no ciphertext may hold it.
CANARY = b"this golden image's plaintext must never be seen on a disk " * 1000


def fill_tree(source: Path, tree: Path, limit: int) -> int:
    """Copy regular files of `source` into `tree` until `limit` bytes are reached; returns the bytes copied."""
    total = 0
    for folder, _, names in sorted(os.walk(source)):
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_symlink() or not file.is_file() or total + file.stat().st_size > limit:
                continue
            target = tree / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
            total += target.stat().st_size
    (tree / "canary").write_bytes(CANARY)
    return total


def make_raw(tree: Path, image: Path, size: int) -> None:
    """An ext4 filesystem of `size` bytes with the files of `tree`; what they do not fill stays a hole."""
    with image.open("wb") as file:
        file.truncate(size)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-E", "nodiscard", "-d", tree, image]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def make_qcow2(raw: Path, image: Path) -> None:
    """The same disk as compressed qcow2."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", raw, image]
    subprocess.run(command, check=True)


def hashes(tree: Path) -> dict[str, str]:
    """The SHA-256 of every regular file below `tree`, by relative path."""
    return {
        str(file.relative_to(tree)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in tree.rglob("*")
        if file.is_file() and not file.is_symlink()
    }


def sha512(file: Path) -> str:
    """The SHA-512 of a file, 128 hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha512").hexdigest()


def holds(file: Path, needle: bytes) -> bool:
    """Whether the bytes of `file` hold `needle` anywhere; holes are skipped."""
    step = 16 << 20
    with file.open("rb") as opened:
        offset, size = 0, file.stat().st_size
        while offset < size:
            try:
                data_at = os.lseek(opened.fileno(), offset, os.SEEK_DATA)
            except OSError:
                return False
            offset = max(0, data_at - len(needle))
            data = os.pread(opened.fileno(), step + 2 * len(needle), offset)
            if needle in data:
                return True
            offset += step + len(needle)
    return False


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep the demonstration's own output readable."""


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve `folder` over HTTP on loopback; yields the base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
