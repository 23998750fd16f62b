"""`python -m tests.bench images|longhorn|node`: measure. `report`: write docs/benchmarks.md from what was measured.
Without a command: all of it, each suite where it belongs, `images` right here and the others on a kernel that has
device-mapper (tests/vm/run).

EBI_BENCH_DIR (or EBI_TEST_DIR, or /var/tmp) takes the files, some five times the size in all, gone afterwards. Results
go to EBI_RESULTS, or .cache/results. EBI_BENCH_VOLUMES is how many volumes are staged
together. Exit status 3 when a target was missed.
"""

import argparse
import compileall
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import disk, images, longhorn, machine, many, node, report, staging
from tests.bench.ours import Store
from tests.bench.result import MIB, Results
from tests.bench.timing import Clock

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("EBI_RESULTS", ROOT / ".cache/results"))
# Parts of a suite are for looking at; the report is made of whole ones.
_PART = "bench-part.json"
_NODE = {"stage": staging.measure, "many": many.measure, "disk": disk.measure}
_MISSED = 3
_VOLUMES = int(os.environ.get("EBI_BENCH_VOLUMES", "100"))  # staged together


@dataclass(frozen=True)
class _Suite:
    """One suite: what it measures, with its options (`size` in MiB; 0: it has none), and whether it needs devices."""

    measure: Callable[[argparse.Namespace, Store, Results, Clock], None]
    how: list[str]
    size: int = 0
    volumes: int = 0
    # In a virtual machine nobody else is at work, and what its host does can't be seen from within.
    patience: float = 0
    devices: bool = True
    parts: Mapping[str, object] = field(default_factory=dict)


def _images(arguments: argparse.Namespace, store: Store, results: Results, clock: Clock) -> None:
    suite = images.Suite(store, results, arguments.size * MIB, clock)
    for name in arguments.only or images.SECTIONS:
        images.SECTIONS[name](suite)
        _save(results, _PART)


def _longhorn(arguments: argparse.Namespace, store: Store, results: Results, clock: Clock) -> None:
    longhorn.measure(longhorn.Suite(store, results, arguments.size * MIB, clock))


def _node(arguments: argparse.Namespace, store: Store, results: Results, clock: Clock) -> None:
    suite = node.Suite(store, results, clock, arguments.volumes)
    for name in arguments.only or _NODE:
        _NODE[name](suite)
        _save(results, _PART)


_SUITES = {
    "images": _Suite(_images, images.HOW, size=2048, patience=120, devices=False, parts=images.SECTIONS),
    "longhorn": _Suite(_longhorn, longhorn.HOW, size=1024),
    "node": _Suite(_node, node.HOW, volumes=_VOLUMES, parts=_NODE),
}


@contextmanager
def _work() -> Iterator[Path]:
    """A directory for the files, gone afterwards."""
    parent = os.environ.get("EBI_BENCH_DIR") or os.environ.get("EBI_TEST_DIR") or "/var/tmp"
    directory = Path(tempfile.mkdtemp(prefix="ebi-bench.", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _measured(arguments: argparse.Namespace, suite: _Suite) -> Results:
    """Run a suite."""
    # As it is installed: with the bytecode beside the sources.
    compileall.compile_dir(ROOT / "plugin", quiet=1)
    clock = Clock(arguments.rounds, arguments.patience)
    with _work() as work:
        results = Results(arguments.suite, machine.facts(work), suite.how)
        suite.measure(arguments, Store(work), results, clock)
    if clock.noise and not suite.devices:
        results.remark(
            f"{len(clock.noise)} runs count; other processes took {100 * statistics.median(clock.noise):.0f} % of the"
            f" processor in the median one, {100 * max(clock.noise):.0f} % in the worst."
        )
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        results.remark("All sides ran at a higher scheduling priority than the rest of the machine.")
    return results


def _save(results: Results, name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(json.dumps(results.to_dict(), indent=1))


def _one(arguments: argparse.Namespace) -> int:
    """Measure one suite, or parts of it."""
    suite = _SUITES[arguments.suite]
    if suite.devices and not longhorn.possible():
        sys.exit("tests.bench: this needs root, loop devices and device-mapper; run it through tests/vm/run")
    results = _measured(arguments, suite)
    _save(results, _PART if getattr(arguments, "only", None) else f"bench-{results.suite}.json")
    missed = sum(row.met is False for row in results.rows)
    print(f"{results.suite}: {sum(row.met is True for row in results.rows)} targets met, {missed} missed")
    return _MISSED if missed else 0


def _all(arguments: argparse.Namespace) -> int:
    """Measure every suite where it belongs, and write the report."""
    status = 0
    for name, suite in _SUITES.items():
        print(f"== {name}", flush=True)
        (RESULTS / f"bench-{name}.json").unlink(missing_ok=True)  # an earlier run's
        where: Sequence[str | Path] = [ROOT / "tests/vm/run", "--seconds", "3600"] if suite.devices else []
        done = subprocess.run([*where, sys.executable, "-m", "tests.bench", name], cwd=ROOT, check=False).returncode
        if done not in (0, _MISSED):
            print(f"tests.bench: the suite {name} ended with {done}", file=sys.stderr)
        status = max(status, done, key=lambda code: (code not in (0, _MISSED), code))
    _report(arguments)
    return status


def _report(_: argparse.Namespace) -> int:
    """Write the report."""
    report.write(RESULTS, ROOT / "docs")
    return 0


def main() -> int:
    """Measure or report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=_all)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, suite in _SUITES.items():
        command = commands.add_parser(name)
        if suite.size:
            command.add_argument("--size", type=int, default=suite.size, metavar="MIB", help="default: %(default)s")
        if suite.volumes:
            command.add_argument(
                "--volumes", type=int, default=suite.volumes, help="how many are staged together (default: %(default)s)"
            )
        if suite.parts:
            command.add_argument("--only", action="append", choices=suite.parts, help="these parts only")
        command.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
        command.add_argument(
            "--patience", type=float, default=suite.patience, metavar="SECONDS",
            help="how long, in all, to wait for other processes to be quiet, and to do again what they disturbed"
            " (default: %(default)s)",
        )  # fmt: skip
        command.set_defaults(run=_one, suite=name)
    commands.add_parser("report").set_defaults(run=_report)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
