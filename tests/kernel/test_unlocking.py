"""Many volumes unlock at once in a cgroup that could not hold all their key derivations.

The proportions are those of stages of 1 GiB each in 3 GiB; EBI_UNLOCK_STAGES and EBI_UNLOCK_MIB make it as large.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from plugin.host import budget
from plugin.luks import header
from plugin.luks.parameters import Pbkdf
from tests.kernel.world import MIB, SECRET, Machine, World, steps
from tests.killing import child

STAGES = int(os.environ.get("EBI_UNLOCK_STAGES", "4"))
NEEDED = int(os.environ.get("EBI_UNLOCK_MIB", "64"))
DEAR = {"CRYPTO_KEY_VALUE": "x", "CRYPTO_PBKDF": "argon2i", "CRYPTO_PBKDF_MEMORY": str(NEEDED << 10)}
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def machine(home: Path, world: World) -> Machine:
    return Machine(home, world)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup whose memory is three times what one key derivation needs."""
    (CGROUPS / "cgroup.subtree_control").write_text("+memory")
    made = CGROUPS / f"ebi-test-{os.getpid()}"
    made.mkdir()
    (made / "memory.max").write_text(str(3 * NEEDED * MIB))
    if (made / "memory.swap.max").exists():
        (made / "memory.swap.max").write_text("0")
    yield made
    made.rmdir()


def test_all_succeed_where_together_they_would_run_out_of_memory(machine: Machine, cgroup: Path) -> None:
    names = [f"vol{number}" for number in range(STAGES)]
    for name in names:
        machine.create(name, 16 * MIB, encrypted="true")

    def stage_all() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        assert NEEDED * MIB <= budget.shared().limit <= 2 * NEEDED * MIB
        with ThreadPoolExecutor(STAGES) as pool:
            for _ in range(2):  # the first makes the headers, the second opens them
                list(pool.map(lambda name: machine.stage(name, DEAR), names))
                list(pool.map(machine.unstage, names))

    assert child(stage_all) == 0
    events = dict(line.split() for line in (cgroup / "memory.events").read_text().splitlines())
    assert events["oom_kill"] == "0"
    assert all(machine.volumes.get(name).formatted for name in names)


def test_a_new_volume_takes_the_cost_of_its_image_and_no_benchmark_runs(machine: Machine, world: World) -> None:
    volume = machine.create("vol", 32 * MIB, world.encrypted)
    # The secret asks for another cost than the image's header has; a benchmark would choose a third.
    asked = {key: value for key, value in SECRET.items() if key == "CRYPTO_KEY_VALUE"}
    with steps() as made:
        machine.stage("vol", asked)
    machine.unstage("vol")
    assert header.read(volume.path).pbkdf == header.read(world.encrypted.path).pbkdf == Pbkdf("pbkdf2", 1000)
    assert [name for name in made if "unlock" in name or "format" in name] == [
        "unlock_image",
        "format_volume",
        "unlock_volume",
    ]
