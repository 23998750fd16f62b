"""Programs that run when something is over, also when whoever started it is killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from plugin.errors import EbiError, Kind
from plugin.host import run as gateway
from plugin.host.lock import held, is_locked, locked
from plugin.host.run import CommandError, at_the_end, run


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


def test_runs_after_a_program_of_the_block_that_outlives_a_kill(tmp_path: Path) -> None:
    wait, go, said = tmp_path / "wait", tmp_path / "go", tmp_path / "said"
    os.mkfifo(wait)
    os.mkfifo(go)
    code = (
        "from plugin.host.run import at_the_end, run; import sys\n"
        "with at_the_end(['sh', '-c', 'echo after >> $0', sys.argv[3]]) as end:\n"
        "    run(['sh', '-c', 'echo > $0; read _ < $1; echo first >> $2', *sys.argv[1:]], fds=(end,))"
    )
    with subprocess.Popen([sys.executable, "-c", code, wait, go, said]) as process:
        wait.read_text()
        process.send_signal(signal.SIGKILL)
    time.sleep(0.1)
    assert not said.exists()
    go.write_text("\n")
    deadline = time.monotonic() + 10
    while not said.exists() or len(said.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert said.read_text().split() == ["first", "after"]


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


def test_a_program_that_outlives_a_kill_keeps_the_locks_that_it_was_started_under(tmp_path: Path) -> None:
    wait, go = tmp_path / "wait", tmp_path / "go"
    os.mkfifo(wait)
    os.mkfifo(go)
    code = (
        "from pathlib import Path; from plugin.host.lock import locked; from plugin.host.run import run; import sys\n"
        "with locked(Path(sys.argv[1]), 'it'): run(['sh', '-c', 'echo > $0; read _ < $1', *sys.argv[2:]])"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "volume", wait, go]) as process:
        wait.read_text()
        process.send_signal(signal.SIGKILL)
    assert is_locked(tmp_path / "volume")
    go.write_text("\n")
    deadline = time.monotonic() + 10
    while is_locked(tmp_path / "volume"):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lock_that_was_let_go_first_is_not_handed_on(tmp_path: Path) -> None:
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(locked(tmp_path / "first", "it"))
        second.enter_context(locked(tmp_path / "second", "it"))
        first.close()
        assert run(["readlink", f"/proc/self/fd/{held()[0]}"]).stdout.decode().strip() == str(tmp_path / "second")
    assert held() == []
