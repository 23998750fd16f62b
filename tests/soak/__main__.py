"""`python -m tests.soak MINUTES`: run the calls for that long; results go to EBI_RESULTS, a summary to standard output.

EBI_TEST_DIR names a directory for the volumes. EBI_SOAK_SEED repeats a run.
"""

import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.kernel.conftest import base_directory
from tests.kernel.world import World
from tests.soak.calls import Calls

STEPS, EXAMPLES = 40, 5


def main() -> int:
    """Run, write `soak.json` and `soak.md`, and fail if anything did."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    first = int(os.environ.get("EBI_SOAK_SEED", str(random.SystemRandom().randrange(1 << 32))))
    directory = base_directory() / f"soak-{os.getpid()}"
    directory.mkdir(mode=0o700, parents=True)
    Calls.home, Calls.world = directory, World(directory / "world")
    before, start, failure, number = _resources(), time.monotonic(), "", 0
    while not failure and time.monotonic() - start < minutes * 60:
        try:
            run(first + number)
        except Exception:
            failure = f"seed {first + number}\n{traceback.format_exc()}"
        number += 1
    result = {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "seed": first,
        "calls": dict(sorted(Calls.made.items())),
        "seconds a call": {name: round(Calls.seconds[name] / _count(name), 2) for name in sorted(Calls.seconds)},
        "before": before,
        "after": _resources(),
        "failure": failure,
    }
    results = Path(os.environ.get("EBI_RESULTS", "."))
    (results / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "soak.md").write_text(summary(result))
    print(summary(result), failure, sep="\n")
    if not failure:
        shutil.rmtree(directory)
    return int(bool(failure))


def run(number: int, steps: int = STEPS, examples: int = EXAMPLES) -> None:
    """Examples of at most `steps` calls each; nothing is shrunk, since time counts: the seed repeats them."""
    # Of the first three hypothesis makes the simplest there are, which read what is not there; those after them count.
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet,
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(Calls), settings=chosen)


def summary(result: dict[str, object]) -> str:
    """The result as a page of docs/."""
    calls, seconds = result["calls"], result["seconds a call"]
    assert isinstance(calls, dict)
    assert isinstance(seconds, dict)
    lines = [f"# Soak: {result['minutes']} minutes", ""]
    lines += [f"Random calls on four volumes against a model, seed {result['seed']}; kills among them.", ""]
    lines += ["| call | made | seconds each |", "|---|---|---|"]
    lines += [f"| {name} | {count:,} | {seconds.get(name, '')} |" for name, count in calls.items()]
    lines += ["", f"Before: {result['before']}. After: {result['after']}."]
    lines += ["Failed." if result["failure"] else "No call ended otherwise than the model says; nothing was left."]
    return "\n".join(lines) + "\n"


def _count(name: str) -> int:
    return sum(count for call, count in Calls.made.items() if call.partition(":")[0] == name) or 1


def _resources() -> dict[str, int]:
    return {
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "open files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
    }


if __name__ == "__main__":
    sys.exit(main())
