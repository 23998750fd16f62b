"""Log lines: text for people, or one JSON object a line for programs, which also tells the call that it is about."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from plugin.errors import invalid

FORMS = ("text", "json")
_LEVELS = ("debug", "info", "warning", "error")
_fields: ContextVar[dict[str, str]] = ContextVar("fields")  # never changed in place


@contextmanager
def context(**fields: str) -> Iterator[None]:
    """Have the lines that this thread logs in the block carry `fields`, such as request_id, method and volume.

    Blocks nest; an empty field is left out. A thread started in the block does not inherit them.
    """
    token = _fields.set({**_fields.get({}), **{name: value for name, value in fields.items() if value}})
    try:
        yield
    finally:
        _fields.reset(token)


def whose() -> str:
    """The fields of `context` for the end of a line of text, where that does not say by itself whose it is."""
    fields = _fields.get({})
    return f" ({', '.join(f'{name} {value!a}' for name, value in fields.items())})" if fields else ""


def configure(level: str, form: str = "text") -> None:
    """Log to standard error from `level` (debug, info, warning, error) up, as `form` says: text or json.

    A second call replaces the first. Raises INVALID for another level or form.
    """
    if level.lower() not in _LEVELS:
        raise invalid(f"invalid log level {level!r}", f"give one of {', '.join(_LEVELS)}")
    if form not in FORMS:
        raise invalid(f"invalid log form {form!r}", f"give one of {', '.join(FORMS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Json() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class _Json(logging.Formatter):
    """One line an event, whatever it holds: line breaks and all beyond ASCII are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields.get({}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
