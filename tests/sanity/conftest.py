"""csi-sanity's counts, below pytest's own."""

from collections.abc import Mapping

import pytest

from tests.kernel.conftest import home
from tests.sanity.report import Report

__all__ = ["home"]

reports: dict[str, Report] = {}


@pytest.fixture
def tell() -> dict[str, Report]:
    """Where a test leaves its report, by the name that it shall be shown with."""
    return reports


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told: Mapping[str, int] = {}
    for name, report in reports.items():
        terminalreporter.write_line(f"csi-sanity, {name}: {report}")
        if report.skipped != told:  # they are the same for most
            told = report.skipped
            for reason, count in sorted(told.items()):
                terminalreporter.write_line(f"    {count:3} skipped: {reason}")
