"""What is wrong on a node, as a value: found below, with the devices, volumes and images; told by the faces."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from plugin.errors import EbiError, Kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    `kind` is one of a fixed set of words, `subject` the object ("volume pvc-1"), `message` what is wrong with it and
    `hint` what to do. `repair` does that; None where a person has to. `safe` says that it may be repaired unasked,
    `wrong` is false for what may be meant so.
    """

    kind: str
    subject: str
    message: str
    hint: str
    repair: Callable[[], None] | None = None
    safe: bool = False
    wrong: bool = True

    def to_object(self) -> dict[str, Any]:
        """For programs."""
        return {
            "kind": self.kind,
            "subject": self.subject,
            "message": self.message,
            "hint": self.hint,
            "repairable": self.repair is not None,
            "wrong": self.wrong,
        }


def repair(findings: Iterable[Finding]) -> None:
    """Repair each of `findings` that can be, in turn, and tell of it in the log; a failure stops nothing."""
    for finding in findings:
        if finding.repair is None:
            continue
        try:
            finding.repair()
            log.warning("repaired %s: %s", finding.subject, finding.message)
        except (EbiError, OSError) as error:
            # Busy is somebody's present work.
            busy = isinstance(error, EbiError) and error.kind is Kind.BUSY
            log.log(logging.DEBUG if busy else logging.WARNING, "cannot repair %s: %s", finding.subject, error)
