"""Progress of long work on standard error: a bar for a person at a terminal, a line now and then for a log."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from plugin.images.progress import Progress

_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Bar:
    """Shows the progress of the image `name` while the context is open; call it with each `Progress`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show `progress`: bytes done of bytes in all."""
        if self._terminal:
            if self._bar is None:
                from tqdm import tqdm  # a tenth of the start of every command otherwise

                self._bar = tqdm(desc=self._name, unit="B", unit_scale=True, unit_divisor=1024, leave=False)
            self._bar.total = progress.total or None
            self._bar.set_postfix_str(progress.state, refresh=False)
            self._bar.update(progress.done - self._bar.n)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            share = f"{100 * progress.done // progress.total} %" if progress.total else f"{progress.done} bytes"
            print(f"backingimage/{self._name}: {progress.state}, {share}, {progress.text}", file=sys.stderr)
