"""One virtual machine for one command, by virtme-ng: another kernel over the host's files, which it only reads.

The command's output and exit status come back as files in a shared directory: the console may lose the last lines.
"""

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

DISK_SIZE = 24 << 30  # bytes; sparse, and gone afterwards
# What a command sees of our environment.
_PASSED_ON = ("EBI_", "PYTEST_", "HYPOTHESIS_", "CI", "MINUTES", "TERM")
# An emulated processor: after AVX the emulation of AES takes seven times as long, and page tables of five levels take
# longer than of four. See docs/decisions/030.
_EMULATED = " -cpu max,-avx,-avx2,-la57" if platform.machine() == "x86_64" else ""
_POLL = 0.2  # seconds; the shared directory has no notification across the machine's border
_BOOT = 300  # seconds; it takes 30 where nothing else runs
_POWER_OFF = 30  # seconds


class BrokenMachine(Exception):
    """The machine ended without an exit status; the text holds its last words."""


class _NotBooted(BrokenMachine):
    """It ended before it came to the command."""


def run(command: list[str], seconds: float, root: Path, cache: Path, results: Path) -> int:
    """Boot, run `command` in `root` as root, pass its output on as it comes, and return its exit status.

    A machine that breaks down before it comes to the command is started once more. Raises TimeoutError after
    `seconds`, and BrokenMachine.
    """
    try:
        return _run(command, seconds, root, cache, results)
    except _NotBooted as error:
        print(f"tests/vm: {error}\ntests/vm: starting it once more", file=sys.stderr)
        return _run(command, seconds, root, cache, results)


def _run(command: list[str], seconds: float, root: Path, cache: Path, results: Path) -> int:
    share = Path(tempfile.mkdtemp(prefix="vm.", dir=cache))
    process = None
    try:
        _prepare(command, root, share, results)
        tools = Path(sys.executable).parent
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}:/usr/sbin:/sbin"}
        with (share / "vng.log").open("wb") as log:
            process = subprocess.Popen(
                _vng(root, cache, share, results), cwd=root, env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return _follow(process, share, time.monotonic() + seconds)
    finally:
        if process:
            end(process)
        if (share / "dmesg").exists():
            shutil.copy(share / "dmesg", results / "dmesg")
        shutil.rmtree(share)


def end(process: subprocess.Popen[bytes]) -> None:
    """End `process` and all of its process group, which it leads."""
    with suppress(ProcessLookupError):  # it had ended, and so had the others
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _prepare(command: list[str], root: Path, share: Path, results: Path) -> None:
    """Lay down what guest.sh needs: the command with its environment, and an empty ext4 disk."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON) and name != "EBI_VM"}
    kept |= {"EBI_TEST_DIR": "/mnt/ebi", "EBI_RESULTS": str(results)}
    kept |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/run", "LANG": "C.UTF-8"}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in kept.items()]
    lines += [f"cd {shlex.quote(str(root))}", f"exec {shlex.join(command)}"]
    (share / "command").write_text("\n".join(lines) + "\n")
    (share / "output").touch()
    with (share / "disk").open("wb") as disk:
        disk.truncate(DISK_SIZE)
    mke2fs = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if mke2fs is None:
        raise BrokenMachine("mke2fs is missing: run make setup")
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext4", "-m", "0", "-E", "root_owner=0:0", share / "disk"], check=True)


def _vng(root: Path, cache: Path, share: Path, results: Path) -> list[str]:
    """The command line of the machine."""
    kernels = sorted((cache / "kernel/boot").glob("vmlinuz-*"))
    if not kernels:
        raise BrokenMachine(f"there is no kernel in {cache / 'kernel'}: run make setup")
    memory = min(4096, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 << 20))
    devices = (
        # Beside virtme's own export of the same files: this one may be cached. Python starts three times as fast.
        "-fsdev local,id=ebihost,path=/,security_model=none,readonly=on,multidevs=remap "
        "-device virtio-9p-pci,fsdev=ebihost,mount_tag=ebihost "
        f"-drive if=none,id=ebidisk,file={share}/disk,format=raw,cache=unsafe,discard=unmap "
        "-device virtio-blk-pci,drive=ebidisk,serial=ebi"
    )
    kvm = _has_kvm()
    return [
        "vng", "--run", str(kernels[-1]), "--force-9p", "--user", "root",
        *([] if kvm else ["--disable-kvm"]),
        "--append", "mitigations=off",  # they cost much under emulation, and guard nothing here
        "--cpus", str(min(4, os.cpu_count() or 1)), "--memory", f"{memory}M",
        "--rwdir", str(share), "--rwdir", str(results), f"--qemu-opts={devices}{'' if kvm else _EMULATED}",
        "--", shlex.join([str(root / "tests/vm/guest.sh"), str(share), str(results)]),
    ]  # fmt: skip


def _has_kvm() -> bool:
    """Whether the processor virtualises and we may ask it to. /dev/kvm alone does not prove the first."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def _follow(process: subprocess.Popen[bytes], share: Path, deadline: float) -> int:
    """Pass the output on until there is an exit status, then let the machine power off."""
    status, boot_by = share / "status", time.monotonic() + _BOOT
    with (share / "output").open("rb") as output:
        while not status.exists():
            _pass_on(output.read())
            if process.poll() is not None and not status.exists():
                sort = BrokenMachine if (share / "console").exists() else _NotBooted
                raise sort(f"the virtual machine ended early with {process.returncode}\n{_last_words(share)}")
            if time.monotonic() > boot_by and not (share / "console").exists():
                raise _NotBooted(f"the virtual machine has not booted within {_BOOT} s\n{_last_words(share)}")
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_POLL)
        _pass_on(output.read())
    try:
        process.wait(_POWER_OFF)
    except subprocess.TimeoutExpired:
        print("tests/vm: the machine does not power off; ending it", file=sys.stderr)
    return int(status.read_text())


def _pass_on(data: bytes) -> None:
    if data:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _last_words(share: Path) -> str:
    logs = [share / name for name in ("vng.log", "console", "dmesg") if (share / name).exists()]
    return "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
