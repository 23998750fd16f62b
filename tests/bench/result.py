"""What a benchmark found: rows that can be met or missed, lines of a plot, and the JSON that keeps both."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Values:
    """The same thing measured several times, in the row's unit."""

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value that counts."""
        return statistics.median(self.all)

    @property
    def spread(self) -> float:
        """The largest over the smallest."""
        return max(self.all) / min(self.all) if min(self.all) else 1.0


@dataclass(frozen=True)
class Row:
    """One comparison. `limit` is what `ours` may be at most, None where nothing is asked; `unit` is s, MiB or empty."""

    what: str
    unit: str
    ours: Values
    peer_name: str = ""
    peer: Values | None = None
    target: str = ""
    limit: float | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.ours.median / self.peer.median if self.peer and self.peer.median else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.limit is None else self.ours.median <= self.limit

    def cells(self) -> list[str]:
        """What, ours, peer, ratio, target, met: as they stand in a table."""
        peer = f"{self.peer_name}: {_shown(self.peer, self.unit)}" if self.peer else "-"
        target = self.target
        if self.limit is not None and self.peer and self.unit == "s":
            target += f", here {self.limit:.2f} {self.unit}"
        ratio = f"{self.ratio:.2f}" if self.ratio is not None else "-"
        return [
            self.what, _shown(self.ours, self.unit), peer, ratio, target or "-",
            {True: "yes", False: "**no**", None: "-"}[self.met],
        ]  # fmt: skip

    @classmethod
    def restored(cls, value: dict[str, Any]) -> "Row":
        """The inverse of `asdict`."""
        peer = Values(tuple(value["peer"]["all"])) if value["peer"] else None
        return cls(**{**value, "ours": Values(tuple(value["ours"]["all"])), "peer": peer})


@dataclass(frozen=True)
class Plot:
    """Lines of points (x, y) under the names of who was measured; `logarithmic` names the axes that are so."""

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    logarithmic: str = ""


@dataclass
class Results:
    """All that one suite found, with the facts of the machine and of how it was measured."""

    suite: str
    machine: dict[str, str]
    how: list[str]
    rows: list[Row] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep a row, and show it."""
        self.rows.append(row)
        print(" | ".join(row.cells()), flush=True)

    def remark(self, text: str) -> None:
        """Keep something that has to be known about the figures, and show it."""
        self.remarks.append(text)
        print(text, flush=True)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def restored(cls, value: dict[str, Any]) -> "Results":
        """The inverse of `to_dict`."""
        plots = [
            Plot(**{**plot, "lines": {name: [(x, y) for x, y in line] for name, line in plot["lines"].items()}})
            for plot in value["plots"]
        ]
        return cls(**{**value, "rows": [Row.restored(row) for row in value["rows"]], "plots": plots})


def _shown(values: Values, unit: str) -> str:
    """The median, and in brackets what it lies between."""
    digits = 1 if unit == "MiB" else 2
    text = f"{values.median:.{digits}f} {unit}".strip()
    if len(values.all) > 1:
        text += f" ({min(values.all):.{digits}f}-{max(values.all):.{digits}f})"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
