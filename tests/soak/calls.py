"""The calls, as a state machine of hypothesis: each knows from the model how it must end, and what is there then."""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from plugin.errors import EbiError, Kind
from plugin.host import dm
from plugin.volumes import AccessMode
from tests.kernel.conftest import leftovers
from tests.kernel.world import MIB, SECRET, WRONG, Machine, World
from tests.killing import PROGRAMS, killed_at

_MANY = AccessMode.SINGLE_NODE_MULTI_WRITER
_PIECE = 64 << 10
# What each volume is: from which image, encrypted, and for raw use?
KINDS = {
    "golden": ("encrypted", True, False),
    "raw": ("encrypted", True, True),
    "blank": ("", True, False),
    "plain": ("plain", False, False),
}
volumes = st.sampled_from(sorted(KINDS))
targets = st.sampled_from(["one", "two"])
kills = st.none() | st.integers(0, 12)


@dataclass
class Model:
    """What must be true of a volume."""

    capacity: int
    formatted: bool = False
    staged: bool = False
    published: dict[str, bool] = field(default_factory=dict)  # whether it is read-only
    files: dict[str, str] = field(default_factory=dict)
    pieces: dict[int, bytes] = field(default_factory=dict)


class Calls(RuleBasedStateMachine):
    """Four volumes of different kinds on one node. `world` and `home` are set by whoever runs it."""

    world: ClassVar[World]
    home: ClassVar[Path]
    made: ClassVar[Counter[str]] = Counter()
    seconds: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        directory = self.home / os.urandom(4).hex()
        directory.mkdir()
        self.machine = Machine(directory, self.world)
        self.models: dict[str, Model] = {}

    def teardown(self) -> None:
        """Take everything down, with nothing left."""
        for name, model in self.models.items():
            for target in model.published:
                self.machine.unpublish(name, target)
            self.machine.unstage(name)
            self.machine.volumes.delete(name)
        assert leftovers() == []
        assert not any((self.machine.home / "volumes").glob("*"))
        type(self).made["runs"] += 1

    def call(self, name: str, expected: Kind | None, action: Callable[[], Any], kill: int | None = None) -> None:
        """Make a call, which must end as `expected`; one that must succeed may be killed once before."""
        start = time.monotonic()
        if kill is not None and expected is None and killed_at(kill, action, PROGRAMS):
            self.machine.volumes.recover()
            type(self).made["killed"] += 1
        found = _kind(action)
        assert found is expected, f"{name} ended as {found}, not {expected}"
        type(self).made[name if found is None else f"{name}: {found.name}"] += 1
        type(self).seconds[name] += time.monotonic() - start

    @initialize()
    def begin(self) -> None:
        """Two of them are there, so that something happens soon."""
        for name in ("golden", "raw"):
            self._create(name, 32, None)

    @rule(name=volumes, size=st.sampled_from([32, 48]), kill=kills)
    def create(self, name: str, size: int, kill: int | None) -> None:
        """CreateVolume: the same again is fine where it is large enough."""
        self._create(name, size, kill)

    def _create(self, name: str, size: int, kill: int | None) -> None:
        sort, encrypted, _ = KINDS[name]
        image = getattr(self.world, sort) if sort else None
        model = self.models.get(name)
        expected = Kind.EXISTS if model and model.capacity < size * MIB else None
        parameters = {} if image else {"encrypted": str(encrypted).lower()}
        self.call("create", expected, lambda: self.machine.create(name, size * MIB, image, **parameters), kill)
        if model is None:
            self.models[name] = Model(size * MIB)

    @rule(name=volumes, wrong=st.sampled_from([False, False, False, True]), kill=kills)
    def stage(self, name: str, wrong: bool, kill: int | None) -> None:
        """NodeStageVolume, sometimes with a wrong passphrase."""
        model, (_, encrypted, block) = self.models.get(name), KINDS[name]
        expected = None if model else Kind.NOT_FOUND
        if model and wrong and encrypted and not model.staged and (model.formatted or KINDS[name][0]):
            expected = Kind.INVALID
        elif wrong:
            return
        secret = WRONG if wrong else SECRET
        self.call("stage", expected, lambda: self.machine.stage(name, secret, block=block), kill)
        if model and expected is None:
            model.staged = model.formatted = True

    @rule(name=volumes)
    def stage_from_many_threads(self, name: str) -> None:
        """All get the same answer, or are told to wait."""
        model, block = self.models.get(name), KINDS[name][2]
        if model is None:
            return
        answers: list[Kind | None] = []
        action = lambda: self.machine.stage(name, block=block)  # noqa: E731
        threads = [threading.Thread(target=lambda: answers.append(_kind(action))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert None in answers
        assert set(answers) <= {None, Kind.BUSY}
        model.staged = model.formatted = True
        type(self).made["stage from many threads"] += 1

    @rule(name=volumes, where=targets, readonly=st.booleans(), kill=kills)
    def publish(self, name: str, where: str, readonly: bool, kill: int | None) -> None:
        """NodePublishVolume at one of two paths."""
        model, block = self.models.get(name), KINDS[name][2]
        expected = None
        if model is None:
            expected = Kind.NOT_FOUND
        elif not model.staged:
            expected = Kind.PRECONDITION
        elif model.published.get(where, readonly) != readonly:
            expected = Kind.EXISTS
        self.call(
            "publish", expected,
            lambda: self.machine.publish(name, where, readonly=readonly, block=block, access=_MANY), kill,
        )  # fmt: skip
        if model and expected is None:
            model.published[where] = readonly

    @rule(name=volumes, where=targets, kill=kills)
    def unpublish(self, name: str, where: str, kill: int | None) -> None:
        """NodeUnpublishVolume: what is not there is fine."""
        self.call("unpublish", None, lambda: self.machine.unpublish(name, where), kill)
        if name in self.models:
            self.models[name].published.pop(where, None)

    @rule(name=volumes, kill=kills)
    def unstage(self, name: str, kill: int | None) -> None:
        """NodeUnstageVolume: not while it is published."""
        model = self.models.get(name)
        expected = Kind.PRECONDITION if model and model.published else None
        self.call("unstage", expected, lambda: self.machine.unstage(name), kill)
        if model and expected is None:
            model.staged = False

    @rule(name=volumes, kill=kills)
    def expand(self, name: str, kill: int | None) -> None:
        """ControllerExpandVolume, and NodeExpandVolume where it is staged."""
        model = self.models.get(name)
        size = model.capacity + 16 * MIB if model and model.capacity < 80 * MIB else 0
        expected = None if model else Kind.NOT_FOUND
        self.call("expand", expected, lambda: self.machine.volumes.expand(name, size), kill)
        if model is None:
            return
        model.capacity = max(model.capacity, size)
        if model.staged:
            path = self.path(name) or self.machine.staging / name
            self.call("node expand", None, lambda: self.machine.volumes.node_expand(name, path, 0), kill)
            mapper = dm.find(f"ebi-vol-{name}")
            assert mapper and mapper.size == model.capacity

    @rule(name=volumes, kill=kills)
    def delete(self, name: str, kill: int | None) -> None:
        """DeleteVolume: not while it is staged."""
        model = self.models.get(name)
        expected = Kind.PRECONDITION if model and model.staged else None
        self.call("delete", expected, lambda: self.machine.volumes.delete(name), kill)
        if expected is None:
            self.models.pop(name, None)

    @rule(times=st.integers(1, 2))
    def restart(self, times: int) -> None:
        """A new server on the same node."""
        self.machine = Machine(self.machine.home, self.world)
        for _ in range(times):
            self.machine.volumes.recover()
        type(self).made["restart"] += 1

    @rule(name=volumes, number=st.integers(0, 7), size=st.integers(1, 300_000))
    def write(self, name: str, number: int, size: int) -> None:
        """A workload writes a file, or a piece of the raw device, and syncs it."""
        model, path = self.models.get(name), self.path(name, writable=True)
        if model is None or path is None:
            return
        content = os.urandom(size)
        if KINDS[name][2]:
            content = content[:_PIECE].ljust(_PIECE, b"\0")
            with path.open("r+b", buffering=0) as device:
                device.seek(number * 4 * MIB)
                device.write(content)
                os.fsync(device.fileno())
            model.pieces[number * 4 * MIB] = content
        else:
            with (path / f"file{number}").open("wb") as file:
                file.write(content)
                os.fsync(file.fileno())
            model.files[f"file{number}"] = hashlib.sha256(content).hexdigest()
        type(self).made["write"] += 1

    @rule(name=volumes)
    def read(self, name: str) -> None:
        """All that was written is there, and the image where nothing was; the volume says that it is well."""
        model, path = self.models.get(name), self.path(name)
        if model is None or path is None:
            return
        sort, _, block = KINDS[name]
        if block:
            image = self.world.plain.path.read_bytes()
            with path.open("rb", buffering=0) as device:
                # What is behind the image and was not written may be anything.
                wanted = {at: image[at : at + _PIECE] for at in range(0, len(image), 4 * MIB)} | model.pieces
                for at, piece in wanted.items():
                    device.seek(at)
                    assert device.read(_PIECE) == piece
        else:
            golden = {file: digest for file, digest in self.world.files.items() if "file7" in file} if sort else {}
            for file, digest in {**golden, **model.files}.items():
                assert hashlib.sha256((path / file).read_bytes()).hexdigest() == digest
        assert not self.machine.volumes.stats(name, path).condition.abnormal
        type(self).made["read"] += 1

    @invariant()
    def only_what_exists_is_listed(self) -> None:
        """ListVolumes, and the mappers of what is staged."""
        listed = {volume.id: volume.capacity for volume in self.machine.volumes.list()}
        assert listed == {name: model.capacity for name, model in self.models.items()}
        tops = {mapper.name.removeprefix("ebi-vol-") for mapper in dm.every("ebi-vol-")}
        assert tops == {name for name, model in self.models.items() if model.staged}

    def path(self, name: str, *, writable: bool = False) -> Path | None:
        """Where a workload sees the volume, if it is published (for writing)."""
        model = self.models.get(name)
        found = [target for target, readonly in model.published.items() if not (writable and readonly)] if model else []
        return self.machine.home / f"{name}-{found[0]}" if found else None


def _kind(action: Callable[[], Any]) -> Kind | None:
    try:
        action()
    except EbiError as error:
        return error.kind
    return None
