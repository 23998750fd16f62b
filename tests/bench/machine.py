"""The facts of the machine that figures depend on. No names of hosts, users or directories."""

import ctypes
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path


def facts(directory: Path) -> dict[str, str]:
    """What the figures were measured on; `directory` is where the files lie."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", cpuinfo, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "CPU": model[1] if model else platform.machine(),
        "AES instructions": ", ".join(sorted(known & {"aes", "vaes"})) or "none",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "machine": _virtual(),
        "kernel": _version(platform.release()),
        "filesystem": _filesystem(directory),
        "Python": platform.python_version(),
        "OpenSSL": _openssl(),
        "cryptsetup": _version(_first_line("cryptsetup", "--version")),
        "qemu-img": _version(_first_line("qemu-img", "--version")),
        "coreutils": _version(_first_line("cp", "--version")),
    }


def _version(text: str) -> str:
    """The first version number in `text`; a suffix that is somebody's own is left out."""
    found = re.search(r"\d+(\.\d+)+(-\d+-\w+)?", text)
    return found[0] if found else "?"


def _first_line(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return (done.stdout.splitlines() or [""])[0]


def _openssl() -> str:
    """The version of the libcrypto that ciphers payloads, which need not be Python's own."""
    try:
        lib = ctypes.CDLL("libcrypto.so.3")
    except OSError:
        return "?"
    lib.OpenSSL_version.restype = ctypes.c_char_p
    return _version(lib.OpenSSL_version(0).decode())


def _virtual() -> str:
    if "hypervisor" not in Path("/proc/cpuinfo").read_text():
        return "bare metal"
    # systemd-detect-virt(1): "qemu" is QEMU without KVM.
    emulated = _first_line("systemd-detect-virt", "--vm") == "qemu"
    return "virtual, its processor emulated in software" if emulated else "virtual"


def _filesystem(directory: Path) -> str:
    """The type of the filesystem that `directory` lies on: proc_pid_mountinfo(5)."""
    best, found = "", "?"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        point, kind = fields[4], fields[fields.index("-") + 1]
        if directory.resolve().is_relative_to(point) and len(point) >= len(best):
            best, found = point, kind
    return found
