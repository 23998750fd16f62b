"""What commands print: a table for people; JSON or YAML, as Kubernetes' objects, for programs."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

FORMATS = ("table", "json", "yaml")


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the dotted path of its value in the object, and how to write that."""

    title: str
    path: str
    write: Callable[[Any], str] = str


def show(value: dict[str, Any] | list[dict[str, Any]], columns: Sequence[Column], form: str) -> None:
    """Print one object, or several as a list, in the given form."""
    if form == "table":
        objects = value if isinstance(value, list) else [value]
        table([column.title for column in columns], [[_cell(item, column) for column in columns] for item in objects])
        return
    document = {"apiVersion": "v1", "kind": "List", "items": value} if isinstance(value, list) else value
    if form == "json":
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        yaml.safe_dump(document, sys.stdout, sort_keys=False)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below titles, each column as wide as its widest cell."""
    lines = [titles, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(titles))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size(value: Any) -> str:
    """Bytes for people: 16.0 MiB."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def percent(value: Any) -> str:
    """A share of a hundred."""
    return f"{value} %"


def age(value: Any) -> str:
    """How long ago an RFC 3339 time was: 5m, 3h, 12d."""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(str(value))).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def _cell(item: dict[str, Any], column: Column) -> str:
    value: Any = item
    for key in column.path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or value == "":
        return "-"
    return str(value).lower() if isinstance(value, bool) else column.write(value)
