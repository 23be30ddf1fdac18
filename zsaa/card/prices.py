"""What hours and joules cost. The defaults are rounded list prices of their date: give your own."""

from __future__ import annotations

from dataclasses import dataclass, field

HOURS = {"T4": 0.35, "H100": 3.0, "cpu": 0.03}  # USD; "cpu": of one core


@dataclass(frozen=True)
class Prices:
    """hours: USD per hour of a device, by a part of its name ("cpu": of one core); kwh: USD per kilowatt-hour; date: of
    when they are."""

    hours: dict[str, float] = field(default_factory=lambda: dict(HOURS))
    kwh: float = 0.15
    date: str = "2025, rounded list prices in the US, not looked up since"

    def __post_init__(self):
        for name, price in {**self.hours, "kwh": self.kwh}.items():
            if not price >= 0:
                raise ValueError(f"the price of {name!r} is {price!r} USD, and must be 0 or more.")

    def of(self, device: str, cores: int) -> tuple[str, float] | None:
        """The name and the hourly price of a device; None where there is none for it."""
        if device == "cpu":
            return ("cpu", cores * self.hours["cpu"]) if "cpu" in self.hours else None
        found = [name for name in self.hours if name in device]
        return (max(found, key=len), self.hours[max(found, key=len)]) if found else None


PRICES = Prices()
