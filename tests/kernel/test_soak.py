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
    for number in range(10):  # some runs are made of nothing but reads of what is not there
        soak.run(SEED + number, steps=15)
        print(SEED + number, Calls.made)  # shown where it fails
        if sum(Calls.made.values()) > 15:
            return
    raise AssertionError("hardly a call was made")
