"""Programs that run when something is over, also when whoever started it is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import run as gateway
from plugin.host.run import CommandError, at_the_end


def test_runs_when_the_block_ends_and_no_sooner(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with at_the_end(["touch", str(mark)]):
        assert not mark.exists()
    assert mark.exists()
    mark.unlink()
    with pytest.raises(KeyError), at_the_end(["touch", str(mark)]):
        raise KeyError
    assert mark.exists()


def test_runs_when_the_process_is_killed_in_the_block(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    os.mkfifo(mark)
    code = (
        "from plugin.host.run import at_the_end; import time, sys\n"
        "with at_the_end(['sh', '-c', 'echo done > $0', sys.argv[1]]): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, mark], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert mark.read_text() == "done\n"  # waits for the writer


def test_a_failure_is_told() -> None:
    with pytest.raises(CommandError, match="false exited with 1"), at_the_end(["false"]):
        pass


def test_a_program_that_is_not_there_is_told_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EbiError, match=r"mkfs\.xfs: no such program") as caught:
        gateway.run(["mkfs.xfs", "/dev/null"])
    assert caught.value.kind is Kind.UNAVAILABLE
    assert caught.value.hint == "install the package that holds it (Debian: xfsprogs)"
