"""Log lines that people read and programs parse."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from plugin import logs
from plugin.errors import EbiError, Kind

log = logging.getLogger("plugin.volumes.node")


class Written(io.StringIO):
    """What went to standard error."""

    def lines(self) -> list[dict[str, Any]]:
        """As JSON, object by object."""
        return [json.loads(line) for line in self.getvalue().splitlines()]


@contextmanager
def configured(*arguments: str) -> Iterator[Written]:
    """The block logs as `configure` sets it up; the root logger, which is everybody's, is as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    try:
        with redirect_stderr(Written()) as stream:
            logs.configure(*arguments)
            yield stream
    finally:
        root.handlers = handlers
        root.setLevel(level)


class TestJson:
    def test_a_line_says_when_what_and_who(self) -> None:
        with configured("info", "json") as stderr:
            log.info("volume %s is staged", "pvc-1")
        (line,) = stderr.lines()
        assert datetime.now(UTC) - datetime.fromisoformat(line.pop("time")) < timedelta(seconds=10)
        assert line == {"level": "info", "logger": "plugin.volumes.node", "message": "volume pvc-1 is staged"}

    def test_it_carries_the_call_and_volume_that_it_is_about(self) -> None:
        with configured("info", "json") as stderr:
            with logs.context(request_id="7", method="NodeStageVolume"):
                log.info("begins")
                with logs.context(volume="pvc-1", staging=""):
                    log.info("maps")
                log.info("ends")
            log.info("after")
        call = {"request_id": "7", "method": "NodeStageVolume"}
        known = ("request_id", "method", "volume", "staging")
        found = [{name: line[name] for name in known if name in line} for line in stderr.lines()]
        assert found == [call, {**call, "volume": "pvc-1"}, call, {}]

    def test_calls_in_other_threads_have_their_own(self) -> None:
        both = threading.Barrier(2)

        def call(number: str) -> None:
            with logs.context(request_id=number):
                both.wait(10)
                log.info("call %s", number)
                both.wait(10)

        with configured("info", "json") as stderr:
            threads = [threading.Thread(target=call, args=(number,)) for number in ("1", "2")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
        found = stderr.lines()
        assert sorted(line["request_id"] for line in found) == ["1", "2"]
        assert all(line["message"] == f"call {line['request_id']}" for line in found)

    def test_an_exception_is_one_field(self) -> None:
        with configured("info", "json") as stderr:
            try:
                raise ValueError("two\nlines")
            except ValueError:
                log.exception("it failed")
        (line,) = stderr.lines()
        assert line["message"] == "it failed"
        assert line["exception"].startswith("Traceback")
        assert line["exception"].endswith("ValueError: two\nlines")

    def test_no_name_can_break_a_line(self) -> None:
        name = 'a\n{"level": "error"}\u2028\udcff'
        with configured("info", "json") as stderr, logs.context(volume=name):
            log.info("%s", name)
        (line,) = stderr.lines()
        assert (line["level"], line["message"], line["volume"]) == ("info", name, name)


class TestConfigure:
    def test_text_is_for_people(self) -> None:
        with configured("debug") as stderr:
            log.debug("hello")
        assert stderr.getvalue().endswith(" DEBUG plugin.volumes.node hello\n")

    def test_what_is_below_the_level_is_silent(self) -> None:
        with configured("WARNING", "json") as stderr:
            log.info("no")
            log.warning("yes")
        assert [line["message"] for line in stderr.lines()] == ["yes"]

    def test_the_last_one_holds(self) -> None:
        with configured("error", "text") as stderr:
            logs.configure("info", "json")
            log.info("yes")
        assert [line["message"] for line in stderr.lines()] == ["yes"]

    @pytest.mark.parametrize("arguments", [("loud",), ("info", "xml")])
    def test_what_it_does_not_know_is_refused(self, arguments: tuple[str, ...]) -> None:
        with pytest.raises(EbiError) as error, configured(*arguments):
            pass
        assert error.value.kind is Kind.INVALID
