"""Rows of a benchmark as text."""

from __future__ import annotations


def print_rows(rows: list[dict], columns: str) -> None:
    table = [columns.split(), *([str(row[column]) for column in columns.split()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
