"""What a figure is: a name, the counts it needs, and how their sums give its value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Sums = Mapping[str, np.ndarray]  # count name -> () or (resamples,) float64


@dataclass(frozen=True)
class Figure:
    """One figure: `compute` maps sums of the counts named in `needs` to its value; NaN where its denominator is 0."""

    name: str
    label: str
    needs: tuple[str, ...]
    compute: Callable[[Sums], np.ndarray]
    better: str  # "lower", "higher" or "" where neither is better as such
    percent: bool = True  # a share, shown in per cent; else a plain number

    def show(self, value: float, signed: bool = False) -> str:
        """`value` for people: per cent with one decimal, or a number with two; "–" where it is undefined."""
        if not np.isfinite(value):
            return "–"
        text = f"{100 * value:.1f}" if self.percent else f"{value:.2f}"
        if float(text) == 0:
            return text.lstrip("-")
        return ("+" if signed and value > 0 else "") + text.replace("-", "\N{MINUS SIGN}")


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator in float64, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def ratio(name: str, label: str, top: str, bottom: str, better: str = "", percent: bool = True) -> Figure:
    """The figure sum(top) / sum(bottom)."""
    return Figure(name, label, (top, bottom), lambda s: divide(s[top], s[bottom]), better, percent)
