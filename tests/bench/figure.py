"""A figure: what was measured, round by round, against a floor of the same rounds or an absolute budget."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable
from enum import Enum

import msgspec


class Kind(Enum):
    """What a budget bounds."""

    RATIO_AT_MOST = "ratio at most"
    RATIO_AT_LEAST = "ratio at least"
    VALUE_AT_MOST = "value at most"
    VALUE_AT_LEAST = "value at least"

    @property
    def is_of_value(self) -> bool:
        """Whether it bounds the value itself, and not its ratio to a floor."""
        return self in (Kind.VALUE_AT_MOST, Kind.VALUE_AT_LEAST)


class Budget(msgspec.Struct, frozen=True):
    """A bound of the figure's ratio or value."""

    kind: Kind
    limit: float


class Round(msgspec.Struct, frozen=True):
    """One measurement; `floor` was measured beside it."""

    value: float
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value by floor."""
        return None if self.floor is None else self.value / self.floor


class Figure(msgspec.Struct, frozen=True):
    """All rounds of one figure. `unit` is that of value and floor, `beside` the command that the floor is of."""

    name: str
    unit: str
    runs: list[Round]
    budget: Budget | None = None
    beside: str = ""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(run.value for run in self.runs)

    @property
    def floor(self) -> float | None:
        """The median floor."""
        floors = [run.floor for run in self.runs if run.floor is not None]
        return statistics.median(floors) if floors else None

    @property
    def ratio(self) -> float | None:
        """The median of the ratios of each round: what is common to a round (a busy machine) drops out."""
        ratios = [run.ratio for run in self.runs if run.ratio is not None]
        return statistics.median(ratios) if ratios else None

    @property
    def holds(self) -> bool:
        """Whether the budget holds; a figure without one is only shown."""
        if self.budget is None:
            return True
        if self.budget.kind is Kind.VALUE_AT_MOST:
            return self.value <= self.budget.limit
        if self.budget.kind is Kind.VALUE_AT_LEAST:
            return self.value >= self.budget.limit
        ratio = self.ratio
        assert ratio is not None
        return ratio <= self.budget.limit if self.budget.kind is Kind.RATIO_AT_MOST else ratio >= self.budget.limit

    def entry(self) -> dict[str, object]:
        """Its entry in bench.json."""
        return {
            "value": self.value,
            "unit": self.unit,
            "floor": self.floor,
            "ratio": self.ratio,
            "budget": None if self.budget is None else self.budget.limit,
            "beside": self.beside,
            "runs": [{"value": run.value, "floor": run.floor} for run in self.runs],
        }


Measurement = Callable[[int], Awaitable[list[Figure]]]
"""Measures with this many rounds; some figures come together, since they share a cluster."""
