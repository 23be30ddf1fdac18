"""What the runner prints."""

from __future__ import annotations

import os
import re
import sys
import time


def say(text: str = "", end: str = "\n") -> None:
    """Prints at once. Where nobody reads any longer (a closed terminal, `| head`) the run goes on: its logs and its
    index page tell all."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def clock(seconds: float | None) -> str:
    """Formats seconds as m:ss or h:mm:ss; "?" for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """One line per notebook that keeps changing on a terminal; elsewhere a line per cell and minute."""

    def __init__(self, name: str, cells: int):
        self.name, self.cells, self.cell, self.heading = name, cells, 0, ""
        self.start = self.said = time.monotonic()
        self.live = sys.stdout.isatty()

    def start_cell(self, index: int, source: str, is_code: bool) -> None:
        if not is_code:
            heading = re.search(r"^#+\s*(.+)$", source, re.MULTILINE)
            self.heading = heading.group(1).strip() if heading else self.heading
        self.cell = index + 1
        if is_code or self.live:
            self.say()

    def say(self) -> None:
        self.said = time.monotonic()
        text = f"  {self.name}  cell {self.cell}/{self.cells}  {clock(self.said - self.start)}  {self.heading}"
        say(f"\r\033[K{text[:100]}" if self.live else text.rstrip(), end="" if self.live else "\n")

    def tick(self) -> None:
        if time.monotonic() - self.said >= (1 if self.live else 60):
            self.say()

    def close(self) -> None:
        if self.live:
            say("\r\033[K", end="")
