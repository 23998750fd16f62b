"""A short run of what `make soak` does for as long as one wants."""

from pathlib import Path

from tests.kernel.world import World
from tests.soak import __main__ as soak
from tests.soak.calls import Calls


def test_random_calls_end_as_a_model_says(home: Path, world: World) -> None:
    Calls.home, Calls.world = home, world
    soak.run(20261125)
    assert Calls.made["stage"] > 0
