"""docs/benchmarks.md and its plots, written from docs/benchmarks.json, where a new run of a suite replaces the old."""

import json
from pathlib import Path

from tests.bench import plot
from tests.bench.result import Results, table

_KEPT = "benchmarks.json"
_TITLES = {
    "images": "Images, file to file",
    "longhorn": "Against Longhorn's way",
    "node": "Volumes on a node",
}
_HEAD = """\
# Benchmarks

Written by `make bench` from [benchmarks.json](benchmarks.json), which holds every single value; not to be edited.
Figures depend on the machine; ours and a peer's in one row come from one run on the same one. A ratio is ours over the
peer's, so less than 1 means that we are faster. Each row says what is asked of it, and whether it was met in this run.
"""


def write(found: Path, docs: Path) -> None:
    """Take over the suites measured into `found`, and write everything below `docs` anew."""
    kept_in = docs / _KEPT
    suites = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    for name in _TITLES:
        measured = found / f"bench-{name}.json"
        if measured.exists():
            suites[name] = json.loads(measured.read_text())
    kept_in.write_text(json.dumps(suites, indent=1, sort_keys=True) + "\n")
    results = kept(docs)
    (docs / "benchmarks.md").write_text(text(results))
    plots = docs / "plots"
    plots.mkdir(exist_ok=True)
    for path in plots.glob("*.svg"):
        path.unlink()
    for name, picture in pictures(results).items():
        (plots / name).write_text(picture)


def kept(docs: Path) -> list[Results]:
    """The suites whose results are kept below `docs`, in the page's order."""
    suites = json.loads((docs / _KEPT).read_text())
    return [Results.restored(suites[name]) for name in _TITLES if name in suites]


def pictures(results: list[Results]) -> dict[str, str]:
    """The plots by the names of their files."""
    return {f"{picture.name}.svg": plot.svg(picture) for one in results for picture in one.plots}


def text(results: list[Results]) -> str:
    """The page."""
    return "\n".join([_HEAD, *(_section(one) for one in results)])


def _section(found: Results) -> str:
    met = [row.met for row in found.rows if row.met is not None]
    facts = "; ".join(f"{name} {value}" for name, value in found.machine.items())
    head = ["what", "ours", "peer", "ratio", "target", "met"]
    parts = [
        f"## {_TITLES[found.suite]}",
        f"{sum(met)} of {len(met)} targets met. Machine: {facts}.",
        "\n".join(f"- {line}" for line in found.how),
        table(head, [row.cells() for row in found.rows]),
        *found.remarks,
        *(f"![{picture.title}](plots/{picture.name}.svg)" for picture in found.plots),
    ]
    return "\n\n".join(parts) + "\n"
