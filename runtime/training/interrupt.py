"""Ctrl-C between two updates rather than in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While this is entered, the first Ctrl-C only sets `requested`; a second one interrupts at once.

    Only the main thread receives signals: in others this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> DeferredInterrupt:
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            # None stands for a handler that Python did not install: there is no way to put it back.
            self._previous = signal.signal(signal.SIGINT, self._remember) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGINT, self._previous)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
