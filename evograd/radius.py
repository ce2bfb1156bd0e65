"""How far a pair of candidates stands from θ: a radius that finds itself.

The gradients of the pair and the one between them tell it: e = ‖g₊ + g₋ − 2g₀‖ / ‖g₊ − g₋‖, the even part over the odd one. Where
curvature rules, e grows in proportion to the radius, and the central difference is off by about e². Where rounding rules, e falls
as the radius grows, and the difference is off by about e/2. At e ≈ 2.5 ε^(1/3) both are small.
"""

from __future__ import annotations

import math

RETAKES = 2  # of a pair, within one call
LONGEST = 16  # steps by one side in a row
WIDEST = 1000  # times its start, up to which a radius is raised


def start(eps: float) -> float:
    """Of the radius, over the scale of θ (see `evograd.guided.scale`): 1e-3 in float32. eps: resolution of the losses."""
    return 0.2 * eps ** (1 / 3)


def target(eps: float) -> float:
    """Of e: 1e-2 in float32, 1.5e-5 in float64, 0.15 in bfloat16."""
    return min(2.5 * eps ** (1 / 3), 0.15)


def apart_enough(eps: float) -> float:
    """By so many eps the pair's gradients are to differ: 700 in float32, where those of few hyperparameters may cancel."""
    return (2.5 * eps ** (1 / 3)) ** -1.5


def rounding_rules(curvature: float, apart: float, eps: float) -> bool:
    """e times the number of eps that the two differ by is of order 1 to 100 where e is rounding, and far more where it is not."""
    return not curvature * apart > 0.2 / math.sqrt(eps)


def is_found(curvature: float, apart: float, eps: float) -> bool:
    """Whether a pair is near its best. curvature: e, NaN where there is no gradient between the two.  apart: in eps."""
    return apart >= 0.8 * apart_enough(eps) and not curvature > 2 * target(eps)


def better(relative: float, curvature: float, apart: float, eps: float, before: tuple[float, float] | None = None) -> float:
    """The radius that a pair suggests which has not found it. before: (radius, e) of the pair that was taken first."""
    if apart < 0.8 * apart_enough(eps):
        aim = apart_enough(eps) * min(max(0.1 / target(eps), 1.0), 3.0)  # with few digits curvature is near
        return _raised(relative, aim / max(apart, 1e-4 * aim), eps)
    rounding = rounding_rules(curvature, apart, eps)
    if before is not None and curvature != before[1]:  # two radii tell it
        rounding = (relative < before[0]) == (curvature > before[1])
    if rounding:
        return _raised(max(relative, before[0] if before else 0), min(max(curvature / target(eps), 2.0), 100.0), eps)
    return relative * max(target(eps) / curvature, 1e-4)


def _raised(relative: float, factor: float, eps: float) -> float:
    return max(relative, min(relative * factor, WIDEST * start(eps)))


class Radius:
    """The radius of `evograd.guided`, carried from one call to the next: in a loop no pair is taken twice then.

        radius = evograd.Radius()
        for …:
            result = evograd.guided(…, radius=radius)

    Each call begins at what the last one has found. One object serves one problem, or one loop; a checkpoint keeps its `state_dict`.

    value: over the scale of θ. Default: where calls without a Radius begin.
    retakes: how many pairs were taken again.
    age, run: how many steps of a `Trajectory` went by one side since the last pair, and how many may: twice as many after each
    pair that finds the radius as good as it was, and none after another.
    """

    def __init__(self, value: float | None = None):
        self.value, self.retakes, self.age, self.run = value, 0, 0, 0

    def due(self) -> bool:
        """Whether a pair is to show how good the radius is. To be asked once a step."""
        self.age += 1
        return self.value is None or self.age > self.run

    def judged(self, curvature: float, retaken: bool, eps: float) -> None:
        """After a pair of a trajectory."""
        steady = not retaken and not curvature > 2 * target(eps)
        self.age, self.run = 0, min(2 * self.run or 1, LONGEST) if steady else 0

    def follow(self, relative: float, curvature: float, apart: float, eps: float) -> None:
        """What the next call begins at, after one whose pair was `relative`: nearer to the best, by a factor of two at most."""
        if math.isnan(curvature):
            self.value = relative
        elif rounding_rules(curvature, apart, eps):
            self.value = _raised(relative, 2.0, eps)
        elif curvature > target(eps):
            self.value = relative * max(target(eps) / curvature, 0.5)
        else:
            self.value = _raised(relative, min(target(eps) / curvature, 2.0), eps)

    def state_dict(self) -> dict:
        return {"value": self.value, "retakes": self.retakes, "age": self.age, "run": self.run}

    def load_state_dict(self, state: dict) -> None:
        self.value, self.retakes = state["value"], state["retakes"]
        self.age, self.run = state.get("age", 0), state.get("run", 0)

    def __repr__(self) -> str:
        return f"Radius({self.value})"
