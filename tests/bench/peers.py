"""Who we are measured against. Each function does a whole job, the fsync included where it says so."""

from pathlib import Path

from tests.bench.ours import PASSPHRASE, run
from tests.bench.timing import synced

# Same cipher and key as ours. qemu-img writes LUKS1.
_LUKS = "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256"
QEMU_DERIVATION = 2000  # milliseconds, as qemu-img has it where nobody says otherwise
_TRIES = 30
_SECRET = ["--object", "secret,id=key,file=/dev/stdin"]


def copy(source: Path, target: Path, *, reflink: bool = False) -> None:
    """cp and fsync."""
    run(["cp", f"--reflink={'auto' if reflink else 'never'}", source, target])
    synced(target)


def qemu_encrypt(source: Path, target: Path, *, form: str = "raw", milliseconds: int = 10) -> None:
    """qemu-img into a LUKS file, and fsync.

    `milliseconds`: what its key derivation shall take. To find out what takes so long costs seconds, whatever they
    are, and nothing turns that off.
    """
    options = ["-f", form, "-O", "luks", "-o", f"key-secret=key,iter-time={milliseconds},{_LUKS}"]
    command: list[str | Path] = ["qemu-img", "convert", *_SECRET, *options, source, target]
    for again in reversed(range(_TRIES)):
        try:
            run(command, stdin=PASSPHRASE.encode())
            break
        except RuntimeError as error:
            # It failed at its start, to measure the derivation: a matter of luck.
            if not again or "accurate CPU usage" not in str(error):
                raise
    synced(target)


def qemu_decrypt(source: Path, target: Path) -> None:
    """qemu-img out of a LUKS file, and fsync."""
    image = f"driver=luks,key-secret=key,file.driver=file,file.filename={source}"
    run(["qemu-img", "convert", *_SECRET, "--image-opts", image, "-O", "raw", target], stdin=PASSPHRASE.encode())
    synced(target)


def sha512(source: Path) -> None:
    """sha512sum."""
    run(["sha512sum", source])
