"""`python -m tests.bench images|longhorn`: measure. `report`: write docs/benchmarks.md from what was measured.

EBI_BENCH_DIR (or EBI_TEST_DIR, or /var/tmp) takes the files, some five times the size in all, gone afterwards. Results
go to EBI_RESULTS, or .cache/results. Exit status 1 when a target was missed.
"""

import argparse
import compileall
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import images, longhorn, machine, report
from tests.bench.ours import Store
from tests.bench.result import MIB, Results
from tests.bench.timing import Clock

ROOT = Path(__file__).parents[2]
RESULTS = Path(os.environ.get("EBI_RESULTS", ROOT / ".cache/results"))
# Parts of a suite are for looking at; the report is made of whole ones.
_PART = "bench-part.json"


@contextmanager
def _work() -> Iterator[Path]:
    """A directory for the files, gone afterwards."""
    parent = os.environ.get("EBI_BENCH_DIR") or os.environ.get("EBI_TEST_DIR") or "/var/tmp"
    directory = Path(tempfile.mkdtemp(prefix="ebi-bench.", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _images(arguments: argparse.Namespace, work: Path, results: Results, clock: Clock) -> None:
    suite = images.Suite(Store(work), results, arguments.size * MIB, clock)
    for name in arguments.only or images.SECTIONS:
        images.SECTIONS[name](suite)
        _save(results, _PART)


def _longhorn(arguments: argparse.Namespace, work: Path, results: Results, clock: Clock) -> None:
    if not longhorn.possible():
        sys.exit("tests.bench: this needs root, loop devices and device-mapper; run it through tests/vm/run")
    longhorn.measure(longhorn.Suite(Store(work), results, arguments.size * MIB, clock))


def _measured(arguments: argparse.Namespace) -> Results:
    """Run a suite."""
    # As it is installed: with the bytecode beside the sources.
    compileall.compile_dir(ROOT / "plugin", quiet=1)
    clock = Clock(arguments.rounds, arguments.patience)
    with _work() as work:
        results = Results(arguments.suite, machine.facts(work), arguments.how)
        arguments.run(arguments, work, results, clock)
    if clock.noise:
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


def main() -> int:
    """Measure or report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    suites = (("images", _images, 2048, images.HOW), ("longhorn", _longhorn, 256, longhorn.HOW))
    for name, run, size, how in suites:
        command = commands.add_parser(name)
        command.add_argument("--size", type=int, default=size, metavar="MIB", help="default: %(default)s")
        command.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
        command.add_argument(
            "--patience", type=float, default=30, metavar="SECONDS",
            help="how long to wait before each run for the other processes to be quiet; 0: not, and no run again"
            " because of them (default: %(default)s)",
        )  # fmt: skip
        if name == "images":
            command.add_argument("--only", action="append", choices=images.SECTIONS, help="these sections only")
        command.set_defaults(suite=name, run=run, how=how)
    commands.add_parser("report").set_defaults(run=None)
    arguments = parser.parse_args()
    if arguments.run is None:
        report.write(RESULTS, ROOT / "docs")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = _measured(arguments)
    _save(results, _PART if getattr(arguments, "only", None) else f"bench-{results.suite}.json")
    missed = sum(row.met is False for row in results.rows)
    print(f"{results.suite}: {sum(row.met is True for row in results.rows)} targets met, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
