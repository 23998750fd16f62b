"""Key derivations: each holds the memory that it needs of the process's budget, for as long as cryptsetup runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from plugin import events
from plugin.host import budget
from plugin.luks import metadata
from plugin.luks.parameters import Pbkdf


@contextmanager
def deriving(costs: Iterable[Pbkdf], step: str = "") -> Iterator[None]:
    """Derive keys at `costs`, one after the other, within the block; its time, without the wait, is told as `step`.

    A passphrase is tried on a header's keyslots in turn, so that the most expensive of them says what is needed.
    """
    memory = max((cost.memory_kib for cost in costs), default=0) << 10
    with budget.shared().hold(memory), events.step(step) if step else nullcontext():
        yield


@contextmanager
def opening(path: Path, step: str = "") -> Iterator[None]:
    """The same for whatever opens the LUKS2 file or device `path` by a passphrase."""
    with deriving(metadata.costs(path), step):
        yield
