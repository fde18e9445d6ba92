"""How a run is asked to end early."""

from __future__ import annotations

import threading


class StopRequest:
    """Set once, from any thread or from a signal handler; a run ends after the batch in hand."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal = 0
        """Number of the signal that asked for it, 0 when it was something else."""

    def set(self, signal: int = 0) -> None:
        self.signal = self.signal or signal
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()
