"""What a training leaves to read: CSV files, and TensorBoard's where it is installed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Callable

from .._files import write_bytes


class Log:
    """A CSV file of rows that begin with a step.  What a run wrote after the step it resumes from is dropped."""

    def __init__(self, path: Path, columns: list[str], step: int, complain: Callable[[str], None]):
        self.path, self.columns, self.complain = path, ["step", *columns], complain
        self._guard(lambda: self._begin(step))

    def add(self, step: int, **values: Any) -> None:
        self._guard(lambda: self._append({"step": step, **values}))

    def _begin(self, step: int) -> None:
        rows: list[dict[str, str]] = []
        if self.path.exists():
            with open(self.path, newline="") as file:
                rows = [
                    row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and int(row["step"]) <= step
                ]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(self.path, text.getvalue().encode())

    def _append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _guard(self, write: Callable[[], None]) -> None:
        """A training is worth more than its log."""
        try:
            write()
        except OSError as error:
            self.complain(f"cannot write {self.path}: {error}")


def tensorboard(folder: Path, step: int) -> Any:
    """A ``SummaryWriter`` for what comes after ``step``, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
