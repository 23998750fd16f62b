"""The part `stage` of the suite `node`: NodeStageVolume and NodeUnstageVolume beside the same commands in a script."""

import os

from plugin.luks import header
from plugin.volumes import Volume, tables
from tests.bench.node import Golden, Suite
from tests.bench.result import MIB, Row
from tests.bench.script import BASE, IMAGE, STORE, Script
from tests.bench.timing import Contender
from tests.demo.node import Kubelet

_CAPACITY = 96 * MIB
_FACTOR = 1.25


def measure(suite: Suite) -> None:
    """A first stage, a later one, and unstaging: with the cheapest key derivation, and with a common one."""
    for derivation in ("least", "forced"):
        with suite.golden(derivation) as golden, suite.node.server() as kubelet:
            ours = _Ours(suite, golden, kubelet)
            script = _script(suite, golden, ours.create())
            _measure(suite, ours, script, derivation)
            ours.delete()


def _measure(suite: Suite, ours: "_Ours", script: Script, derivation: str) -> None:
    of = f"of an encrypted volume with an encrypted image, {derivation} derivation"
    first = Contender("ours", ours.stage, ours.renew)
    _row(suite, f"first NodeStageVolume {of}", first, Contender("script", script.first_stage, script.unstage))
    ours.stage()
    ours.unstage()
    later = Contender("ours", ours.stage, ours.unstage)
    _row(suite, f"later NodeStageVolume {of}", later, Contender("script", script.stage, script.unstage))
    if derivation == "least":  # the way down derives nothing
        ours.stage()
        script.stage()
        back = Contender("ours", ours.unstage, ours.stage)
        _row(suite, "NodeUnstageVolume of the same", back, Contender("script", script.unstage, script.stage))
        ours.unstage()
        script.unstage()


def _row(suite: Suite, what: str, ours: Contender, script: Contender) -> None:
    found = suite.clock.compare([ours, script], exactly=suite.clock.rounds)
    limit = _FACTOR * found["script"].median
    suite.results.add(Row(what, "s", found["ours"], "script", found["script"], f"at most {_FACTOR:g} x script", limit))


class _Ours:
    """The calls for one volume, over the socket."""

    def __init__(self, suite: Suite, golden: Golden, kubelet: Kubelet) -> None:
        self._suite, self._golden, self._kubelet = suite, golden, kubelet
        self._staging = suite.node.staging / "one"
        self._id = ""

    def create(self) -> Volume:
        self._id = self._kubelet.create("one", _CAPACITY, self._golden.parameters)
        return self._suite.records.get(self._id)

    def stage(self) -> None:
        self._kubelet.stage(self._id, self._staging, self._golden.secret)

    def unstage(self) -> None:
        self._kubelet.unstage(self._id, self._staging)

    def renew(self) -> None:
        self.unstage()
        self.delete()
        self.create()

    def delete(self) -> None:
        self._kubelet.delete(self._id)


def _script(suite: Suite, golden: Golden, volume: Volume) -> Script:
    """The scripts for a volume of the same image and size."""
    work = suite.store.work / f"script-{os.urandom(4).hex()}"
    work.mkdir()
    image = golden.image
    base = tables.base(image.extents(), image.virtual_size, volume.covered, IMAGE)
    store = work / "volume"
    with store.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, volume.file_size)
    script = Script(work, image.disk, store, header.read(image.disk))
    script.prepare(base, tables.snapshot(BASE, STORE, volume.covered, volume.capacity, volume.chunk))
    return script
