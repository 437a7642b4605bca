"""Progress of long work on stderr: count, rate, time left. One line redrawn on a terminal, else a line
every ten seconds."""

import sys
import time
from collections.abc import Mapping

_EVERY_S = {True: 0.2, False: 10.0}  # between two lines, on a terminal and elsewhere


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Progress:
    """Reports one stage; call it with how much is done of how much, and figures worth seeing."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.last = self.start if not self.terminal else 0.0
        self.first_done: int | None = None

    def __call__(self, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        now = time.monotonic()
        if self.first_done is None:  # what a resumed stage had already is no part of its rate
            self.first_done, self.start = done, now
        if now - self.last < _EVERY_S[self.terminal] and done < total:
            return
        self.last = now
        rate = (done - self.first_done) / max(now - self.start, 1e-9)
        left = duration((total - done) / rate) if rate > 0 else "?"
        shown = "".join(f", {name} {value:.4g}" for name, value in (figures or {}).items())
        share = f"{done:,}/{total:,} ({100 * done // max(total, 1)} %)"
        line = f"{self.label}: {share}, {rate:,.1f}/s, {left} left{shown}"
        print(
            f"\r\x1b[K{line}" if self.terminal else line,
            end="" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self, message: str) -> None:
        """The last line."""
        print(("\r\x1b[K" if self.terminal else "") + f"{self.label}: {message}", file=sys.stderr, flush=True)
