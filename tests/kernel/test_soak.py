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
    soak.run(SEED, steps=8, examples=7)
    print(SEED, Calls.made)  # shown where it fails
    assert sum(Calls.made.values()) > 20
    assert len(Calls.made) > 5, "hardly a call was made"
