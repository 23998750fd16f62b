"""A short run of what `make soak` does for as long as one wants."""

import os
import random
from pathlib import Path

from tests.kernel.world import World
from tests.soak import __main__ as soak
from tests.soak.calls import Calls

SEED = int(os.environ.get("EBI_SOAK_SEED", str(random.SystemRandom().randrange(1 << 32))))


def test_random_calls_end_as_a_model_says(home: Path, world: World) -> None:
    Calls.home, Calls.world = home, world
    for number in range(5):  # hypothesis leaves rules out of a run, sometimes nearly all
        soak.run(SEED + number, steps=8, examples=7)
        print(SEED + number, Calls.made)  # shown where it fails
        made = {name: count for name, count in Calls.made.items() if name not in ("runs", "create")}
        if len(made) > 3 and sum(made.values()) > 20:
            return
    raise AssertionError("hardly a call was made")
