"""Log lines and progress of an evaluation, on terminals and in notebooks."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import Any, Iterator

from . import _advxl


class Screen:
    """Prints lines to standard output, like AutoAttack, and a progress line on terminals and in notebooks."""

    def __init__(self, verbose: bool = True, log_path: Any = None) -> None:
        self._verbose = verbose
        self._log_path = log_path
        self._drawn = 0
        self._replaces = verbose and (_is_terminal() or _is_notebook())

    def line(self, text: str) -> None:
        """Print a line and append it to the log file."""
        if self._verbose:
            self._clear()
            print(text, flush=True)
        if self._log_path:
            with open(self._log_path, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def progress(self, done: int, total: int, text: str) -> None:
        """Show the progress, which the next call replaces."""
        if self._replaces:
            percent = 100 * done // max(total, 1)
            text = f"{percent:3d} %  {text}"
            sys.stdout.write("\r" + text.ljust(self._drawn))
            sys.stdout.flush()
            self._drawn = len(text)

    def _clear(self) -> None:
        if self._drawn:
            sys.stdout.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def close(self) -> None:
        """Clear the progress line."""
        self._clear()
        if self._replaces:
            sys.stdout.flush()


def _is_terminal() -> bool:
    return bool(getattr(sys.stdout, "isatty", lambda: False)())


def _is_notebook() -> bool:
    shell = sys.modules.get("IPython")
    return shell is not None and type(getattr(shell, "get_ipython", lambda: None)()).__name__ == "ZMQInteractiveShell"


@contextmanager
def stoppable() -> Iterator[Any]:
    """Yield a stop request set by Ctrl-C: the work is saved and ends after the pass in progress. A second Ctrl-C ends
    it immediately."""
    stop = _advxl.Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.request()

    earlier = signal.getsignal(signal.SIGINT)
    if not callable(earlier):
        # Keep a handler that ignores Ctrl-C or ends the process.
        yield stop
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    except _advxl.TryAgainError:
        if stop.requested:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, earlier)
