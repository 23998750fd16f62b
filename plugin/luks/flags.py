"""dm-crypt's flags: how a device is opened, and kept in its LUKS2 header so that it is opened so every time.

Sources: cryptsetup-open(8); the kernel's dm-crypt documentation; "LUKS2 On-Disk Format Specification", config flags.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Flags:
    """`discards` go through to the device below; reads and writes are ciphered where they are made, with no queue."""

    discards: bool = False
    no_read_workqueue: bool = False
    no_write_workqueue: bool = False

    @property
    def names(self) -> frozenset[str]:
        """As a LUKS2 header calls them."""
        given = {
            "allow-discards": self.discards,
            "no-read-workqueue": self.no_read_workqueue,
            "no-write-workqueue": self.no_write_workqueue,
        }
        return frozenset(name for name, wanted in given.items() if wanted)

    def arguments(self, kept: Iterable[str] = ()) -> list[str]:
        """The options of `cryptsetup open`; they also ask it to write into the header what is not among `kept`."""
        given = {
            "--allow-discards": self.discards,
            "--perf-no_read_workqueue": self.no_read_workqueue,
            "--perf-no_write_workqueue": self.no_write_workqueue,
        }
        options = [option for option, wanted in given.items() if wanted]
        return [*options, "--persistent"] if self.names - set(kept) else options


NONE = Flags()
