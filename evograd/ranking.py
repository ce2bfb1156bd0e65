"""What a comparison of estimators has found: a row for each, best choice first, and their table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from .measuring import Cost

EXACT, MIXED = "T1–T2", "mixed mode"
STEP, STEP_BY_PASSES = "the optimizer's step", "trajectory, N = 1"
# Whose hypergradient is the measure: the first of these that can run, without and with an optimizer. Of the former the last two
# are differences that tend to T1–T2.
MEASURES = {True: (EXACT, MIXED, "guided", "finite differences"), False: (STEP, STEP_BY_PASSES)}
BY_MATH = "in sdpa_kernel(SDPBackend.MATH)"
COSINE, FACTOR = 0.99, 2.0  # a good estimate has at least this cosine, and is not longer or shorter than by this factor
WIDTH = 120  # of the lines below the table


@dataclass(frozen=True)
class Row:
    """What `compare` found of one estimator.

    call: how it was called, in `evograd`, but for the problem.  cosine, sign, norm: as of `agreement`, None without a measure.
    cost: of one hypergradient.  reason: why there is nothing else, if it could not run.
    """

    name: str
    call: str
    cosine: float | None = None
    sign: float | None = None
    norm: float | None = None
    cost: Cost | None = None
    reason: str | None = None

    @property
    def good(self) -> bool:
        """Whether it points the way of the measure, at about its length."""
        return self.cosine is not None and self.cosine >= COSINE and 1 / FACTOR <= self.norm <= FACTOR


def ranked(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Best choice first: good ones by their time, others by their cosine, then what could not run. As they came without one."""

    def place(row: Row) -> tuple[int, float]:
        if row.cost is None:
            return 3, 0.0
        if row.cosine is None:
            return 2, 0.0
        return (0, row.cost.seconds) if row.good else (1, -row.cosine)

    return tuple(sorted(rows, key=place))


@dataclass(frozen=True, repr=False)
class Comparison:
    """rows: best choice first.  plain: cost of a training step's forward and backward pass.  exact: whose hypergradient is the
    measure: "T1–T2", or the first that can run of "mixed mode", "guided", "finite differences" ("the optimizer's step", "trajectory,
    N = 1", where an optimizer was given); or None.  draws: of how many,
    at most, the agreement is the mean.

    str() is a table.
    """

    rows: tuple[Row, ...]
    plain: Cost
    exact: str | None
    draws: int

    def __str__(self) -> str:
        header = ["estimator", "cosine", "sign", "norm", "time", "memory", "FLOPs", "launches", "evograd."]
        lines = [header]
        for row in self.rows:
            if row.cost:
                quality = ["–" if v is None else _number(v) for v in (row.cosine, row.sign, row.norm)]
                lines.append([row.name, *quality, *(f"{ratio:.2f}" for ratio in _ratios(row.cost, self.plain)), row.call])
        widths = [max(map(len, column)) for column in zip(*lines)]
        last = len(header) - 1
        align = lambda i, cell: cell.ljust(widths[i] * (i == 0)) if i in (0, last) else cell.rjust(widths[i])
        table = ["  ".join(align(i, cell) for i, cell in enumerate(line)) for line in lines]
        return "\n".join([self._headline(), "", *table, "", *self._notes()])

    __repr__ = __str__

    def _headline(self) -> str:
        best = self.rows[0]
        exact = next((row for row in self.rows if row.name == self.exact), None)
        if exact is None:
            return "No measure could run: there is nothing to compare with, and the order says nothing."
        if best is exact:
            what = "exact" if self.exact in (EXACT, MIXED, STEP) else "the measure"
            return f"{best.name}, {what}, is the fastest of those that point its way."
        time, memory, *_ = _ratios(best.cost, exact.cost)
        return f"{best.name}: cosine {best.cosine:.3f} to {self.exact} at {time:.2f} of its time and {memory:.2f} of its memory"

    def _notes(self) -> Iterable[str]:
        """What the columns are, and what could not run."""
        plain = f"{self.plain.seconds * 1e3:.3g} ms, {self.plain.peak_bytes / 1e6:.3g} MB, {self.plain.flops / 1e9:.3g} GFLOP"
        yield f"Time, memory (peak), FLOPs and launches: over a training step's forward and backward pass ({plain})."
        if self.exact:
            yield f"Cosine, share of equal signs, and norm over norm: to {self.exact}, mean of {self.draws} draws at most."
        if self.exact == MIXED:
            yield "T1–T2 by double backward could not run; mixed mode after an SGD step is the same hypergradient."
        elif self.exact in MEASURES[True][2:]:
            yield f"Nothing exact could run; the measure is {self.exact} after an SGD step, a difference that tends to T1–T2."
        if any(row.call.endswith(BY_MATH) for row in self.rows):
            yield f"{BY_MATH}: fused attention has no second derivative and no forward mode; all were compared there."
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.reason:
                reasons.setdefault(row.reason, []).append(row.name)
        for reason, names in reasons.items():
            yield from textwrap.wrap(f"{'; '.join(names)} could not run: {reason}", WIDTH, subsequent_indent="    ")


def _number(value: float) -> str:
    """Three digits behind the point, where these say something."""
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def _ratios(cost: Cost, over: Cost) -> list[float]:
    """Seconds, peak bytes, FLOPs and launches of one over those of another; NaN where that has none."""
    pairs = [(getattr(cost, key), getattr(over, key)) for key in ("seconds", "peak_bytes", "flops", "launches")]
    return [a / b if b else float("nan") for a, b in pairs]
