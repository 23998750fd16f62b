"""The benchmarks' own tools: what they judge, watch, draw and write."""

import json
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench import plot, report
from tests.bench.result import MIB, Plot, Results, Row, Values
from tests.bench.timing import Clock, Contender
from tests.bench.watch import watched

ROOT = Path(__file__).parents[2]
TEMPORARY = """
import os, sys, tempfile, time
held = b"x" * (64 << 20)
with tempfile.TemporaryFile(dir=sys.argv[1]) as file:
    file.write(os.urandom(8 << 20))
    file.flush()
    time.sleep(0.3)
"""


def test_a_target_is_judged_by_the_median() -> None:
    ours = Values((1.0, 9.0, 2.0))
    assert Row("what", "s", ours, limit=2.0).met
    assert Row("what", "s", ours, limit=1.9).met is False
    assert Row("what", "s", ours).met is None
    assert Row("what", "s", ours, "cp", Values((4.0,))).ratio == 0.5


def test_results_survive_json() -> None:
    row = Row("what", "s", Values((1.0, 2.0)), "cp", Values((3.0,)), "less", 3.0)
    lines = {"ours": [(1.0, 2.0), (2.0, 3.0)]}
    found = Results("images", {"cores": "2"}, ["how"], [row], [Plot("p", "Title", "x", "y", lines)], ["remark"])
    assert Results.restored(json.loads(json.dumps(found.to_dict()))) == found


def test_memory_and_temporary_files_that_are_already_unlinked_are_seen(tmp_path: Path) -> None:
    peaks = watched([sys.executable, "-c", TEMPORARY, str(tmp_path)], [tmp_path])
    assert 8 * MIB <= peaks.disk < 9 * MIB
    assert 64 * MIB <= peaks.memory < 128 * MIB
    assert peaks.derivation == 0


def test_a_watched_command_that_fails_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such file"):
        watched([sys.executable, "-c", "import sys; sys.exit('no such file')"], [tmp_path])


def test_contenders_run_by_turns_and_are_cleaned_up() -> None:
    calls: list[str] = []
    contenders = [Contender(name, partial(calls.append, name), partial(calls.append, "-")) for name in "ab"]
    found = Clock(rounds=2, patience=0).compare(contenders)
    assert calls[:2] == ["a", "-"], "the run that warms up"
    assert "".join(calls[2:]).startswith("a-b-a-b-")
    assert all(2 <= len(values.all) <= 4 for values in found.values())


@pytest.mark.parametrize("logarithmic", ["", "x", "y", "xy"])
def test_a_picture_holds_every_point(logarithmic: str) -> None:
    lines = {"ours & theirs": [(1.0, 7.0), (64.0, 900.0)], "cp": [(1.0, 2.0), (64.0, 90.0)]}
    root = ElementTree.fromstring(plot.svg(Plot("p", "A < B", "x", "y", lines, logarithmic)))
    circles = root.findall(".//{*}circle")
    assert len(circles) == 4
    assert all(0 < float(circle.attrib["cx"]) < 720 and 0 < float(circle.attrib["cy"]) < 420 for circle in circles)
    assert "ours & theirs" in [text.text for text in root.findall(".//{*}text")]


@pytest.mark.skipif(not (ROOT / "docs/benchmarks.json").exists(), reason="make bench has not been run yet")
def test_the_page_of_benchmarks_is_what_their_results_make() -> None:
    pictures = report.pictures(report.kept(ROOT / "docs"))
    assert (ROOT / "docs/benchmarks.md").read_text() == report.text(report.kept(ROOT / "docs"))
    assert {path.name: path.read_text() for path in (ROOT / "docs/plots").iterdir()} == pictures


def test_a_suite_measured_again_takes_the_place_of_its_old_figures(tmp_path: Path) -> None:
    found, docs = tmp_path / "results", tmp_path / "docs"
    found.mkdir()
    docs.mkdir()
    for suites in (("images", "longhorn"), ("longhorn",)):
        for suite in suites:
            row = Row(f"{suite} of {len(suites)}", "s", Values((1.0,)))
            lines = Plot(f"{suite}{len(suites)}", "Title", "x", "y", {"ours": [(1.0, 2.0), (2.0, 3.0)]})
            one = Results(suite, {"cores": "2"}, ["how"], [row], [lines])
            (found / f"bench-{suite}.json").write_text(json.dumps(one.to_dict()))
        report.write(found, docs)
        for path in found.iterdir():
            path.unlink()
    page = (docs / "benchmarks.md").read_text()
    assert "images of 2" in page
    assert "longhorn of 1" in page
    assert "longhorn of 2" not in page
    assert {path.name for path in (docs / "plots").iterdir()} == {"images2.svg", "longhorn1.svg"}
