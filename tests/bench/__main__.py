"""`python -m tests.bench images|longhorn`: measure. `report`: write docs/benchmarks.md from what was measured.

EBI_BENCH_DIR (or EBI_TEST_DIR, or /var/tmp) takes the files, some five times the size in all, gone afterwards. Results
go to EBI_RESULTS, or .cache/results. Exit status 1 when a target was missed.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench import images, longhorn, machine, report
from tests.bench.ours import Store
from tests.bench.result import MIB, Results

ROOT = Path(__file__).parents[2]


@contextmanager
def _work() -> Iterator[Path]:
    """A directory for the files, gone afterwards."""
    parent = os.environ.get("EBI_BENCH_DIR") or os.environ.get("EBI_TEST_DIR") or "/var/tmp"
    directory = Path(tempfile.mkdtemp(prefix="ebi-bench.", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _images(arguments: argparse.Namespace) -> Results:
    with _work() as work:
        results = Results("images", machine.facts(work), [*images.HOW, f"Rounds: {arguments.rounds} or more."])
        suite = images.Suite(Store(work), results, arguments.size * MIB, arguments.rounds)
        for name in arguments.only or images.SECTIONS:
            images.SECTIONS[name](suite)
    return results


def _longhorn(arguments: argparse.Namespace) -> Results:
    if not longhorn.possible():
        sys.exit("tests.bench: this needs root, loop devices and device-mapper; run it through tests/vm/run")
    with _work() as work:
        results = Results("longhorn", machine.facts(work), [*longhorn.HOW, f"Rounds: {arguments.rounds} or more."])
        longhorn.measure(longhorn.Suite(Store(work), results, arguments.size * MIB, arguments.rounds))
    return results


def main() -> int:
    """Measure or report."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, size in (("images", _images, 2048), ("longhorn", _longhorn, 256)):
        command = commands.add_parser(name)
        command.add_argument("--size", type=int, default=size, metavar="MIB", help="default: %(default)s")
        command.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: %(default)s)")
        if name == "images":
            command.add_argument("--only", action="append", choices=images.SECTIONS, help="these sections only")
        command.set_defaults(run=run)
    commands.add_parser("report").set_defaults(run=None)
    arguments = parser.parse_args()
    found = Path(os.environ.get("EBI_RESULTS", ROOT / ".cache/results"))
    if arguments.run is None:
        report.write(found, ROOT / "docs")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = arguments.run(arguments)
    found.mkdir(parents=True, exist_ok=True)
    # Parts of a suite are for looking at; a report is made of whole ones.
    name = "bench-part.json" if getattr(arguments, "only", None) else f"bench-{results.suite}.json"
    (found / name).write_text(json.dumps(results.to_dict(), indent=1))
    missed = sum(row.met is False for row in results.rows)
    print(f"{results.suite}: {sum(row.met is True for row in results.rows)} targets met, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
