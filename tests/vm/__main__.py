"""tests/vm/run [--seconds N] COMMAND…: run it as root on a kernel that has device-mapper, and exit as it does.

The command runs in the repository's directory. It finds in EBI_TEST_DIR an empty directory on ext4 for its data, and in
EBI_RESULTS one whose files are kept. Out of time is exit status 124; a virtual machine that broke down is 125.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.vm import machine

ROOT = Path(__file__).parents[2]
OUT_OF_TIME = 124


def run_here(command: list[str], seconds: float, results: Path) -> int:
    """Run `command` on the running kernel, in a process group of its own, all of which ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="ebi-test.", dir=os.environ.get("EBI_TEST_DIR", "/var/tmp")))
    environment = {**os.environ, "EBI_TEST_DIR": str(directory), "EBI_RESULTS": str(results)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return OUT_OF_TIME
    finally:
        machine.end(process)
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """Choose the kernel and run."""
    parser = argparse.ArgumentParser(prog="tests/vm/run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1500, help="the time limit (default: %(default)g)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("no command")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cache = Path(os.environ.get("EBI_CACHE", ROOT / ".cache")).resolve()
    results = cache / "results"
    results.mkdir(parents=True, exist_ok=True)
    if subprocess.run([ROOT / "tools/direct"], check=False).returncode == 0:
        status = run_here(arguments.command, arguments.seconds, results)
    else:
        try:
            status = machine.run(arguments.command, arguments.seconds, ROOT, cache, results)
        except machine.BrokenMachine as error:
            print(f"tests/vm: {error}", file=sys.stderr)
            return 125
        except TimeoutError:
            status = OUT_OF_TIME
    if status == OUT_OF_TIME:
        print(f"tests/vm: not done within {arguments.seconds:g} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
