"""What csi-sanity found, read from its JUnit report."""

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Tests that `passed` and `failed`, by name, those `skipped`, by reason, and those that it leaves out itself."""

    passed: list[str]
    failed: list[str]
    skipped: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report in the file `path`."""
        passed, failed, skipped, pending = [], [], Counter[str](), 0
        for case in ET.parse(path).getroot().iter("testcase"):
            name, left_out = case.attrib["name"], case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(name)
            elif case.attrib.get("status") == "pending":
                pending += 1
            elif left_out is not None:
                skipped[left_out.attrib.get("message", "").removeprefix("skipped - ")] += 1
            elif name.startswith("[It]"):  # the others are what surrounds the tests
                passed.append(name)
        return cls(passed, failed, skipped, pending)

    def __str__(self) -> str:
        ran = len(self.passed) + len(self.failed)
        return (
            f"{ran} run, {len(self.passed)} passed, {len(self.failed)} failed,"
            f" {sum(self.skipped.values())} skipped for want of a capability, {self.pending} pending in csi-sanity"
        )
