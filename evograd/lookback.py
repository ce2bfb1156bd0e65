"""From the last remembered step to the first: θ_t and its surroundings at each, and what its update makes of a direction."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .host.problem import Problem
from .host.processes import Alone
from .host.steps import Gradients, Step
from .host.vectors import BUCKET, Bucket, Layout, exactly
from .operations.kinks import Kinks, OwnKinks
from .optimizers import Product, Update, vector_jacobian_product
from .recording import Recording

PIECE = 2**19  # elements, which a CPU's cache holds; elsewhere launches count
State = list[dict[str, Tensor]]  # the optimizer's, or cotangents of it: flat tensors by name, for each bucket


class Lookback:
    """The steps of a recording, used up one after the other. `problem.layout` is around θ_t where step t comes.

    kinks: whether passes that are run again record theirs.
    losses: (N,), of training.  settings: for each step, the last one first, and group, dℓ_V by the numbers of its update.
    gaps: (‖U(θ) − θ'‖², ‖θ' − θ‖², ‖θ‖², ‖a‖²) of each step, of this process's part of θ.
    """

    def __init__(self, recording: Recording, problem: Problem, team: Alone, update: Update, kinks: bool):
        self.steps, self.away, self.every = recording.steps, recording.away, recording.every
        self.elementwise = recording.elementwise
        self.problem, self.team, self.update, self.kinks = problem, team, update, kinks
        last = self.steps[-1]
        self.layout = last.layout or Layout(problem.theta, last.kinds)  # of the direction
        problem.layout = self.layout.around(problem.theta)
        self.after: list[Tensor] | None = None  # θ_{t+1}
        self.again: list[Step] = []  # steps that were run again
        self.losses = torch.stack([step.loss for step in self.steps]).to(
            torch.promote_types(self.steps[0].loss.dtype, torch.float32)
        )
        self.settings: list[list[dict[str, Tensor]]] = []
        self.gaps: list[Tensor] = []

    def __iter__(self) -> Iterator[Step]:
        if self.away is not None:
            self.away.bring(self.steps[-1])
        while self.steps or self.again:
            step = self._next()
            self.problem.layout = step.layout.at(step.theta)
            yield step
            self.after, step.theta, step.gradient, step.at_theta, step.passes = step.theta, None, None, None, []

    def _next(self) -> Step:
        if not self.again and self.every > 1:
            first = max(i for i, step in enumerate(self.steps) if step.theta is not None)
            self.again, self.steps[first:] = self.steps[first:], []
            self._run_again(self.again)
        if self.again:
            return self.again.pop()
        step = self.steps.pop()
        if self.away is not None:
            self.away.wait()
            if self.steps:
                self.away.bring(self.steps[-1])
        return step

    def product(self, step: Step, a: list[Tensor], b: State) -> tuple[list[Tensor], State, list[Tensor]]:
        """(a, b), cotangents of (θ_{t+1}, s_{t+1}), times the Jacobian of the update: those of θ_t, s_t and g_t.

        The lists are emptied on the way.
        """
        old, new, after = self.layout, step.layout, self.after
        if new is not old:
            a[:], b[:], after = relaid(a, old, new), relaid_state(b, old, new), after and relaid(after, old, new)
        self.layout, self.after = new, None
        self.settings.append([{} for _ in step.settings])
        self.gaps.append(exactly(torch.zeros(4, device=self.losses.device)))
        results = []
        for i, bucket in enumerate(new.buckets):
            there = bucket.copied(dict(enumerate(self.problem.theta[n] for n in bucket.names))) if after is None else after[i]
            of, states, a[i], b[i] = a[i], b[i], None, None
            moved = step.kinds[bucket.names[0]].group is not None
            results.append(self._of_bucket(step, i, there, of, states) if moved else (of, states, torch.zeros_like(of)))
        step.states = None
        a, b, u = map(list, zip(*results))
        return a, b, self._unclipped(step, u)

    def _of_bucket(self, step: Step, i: int, after: Tensor, a: Tensor, b: dict) -> tuple[Tensor, dict, Tensor]:
        """`product` of one bucket; of an update by elements piece by piece, into the memory of θ_{t+1} and of the state."""
        bucket, state, g = step.layout.buckets[i], self._state(step, i), clipped(step, i)
        if not self.elementwise:
            flat = lambda tensor: bucket.copied({0: tensor})
            tensors = [bucket.views(t)[0] for t in (step.theta[i], g, after, a)]
            made = self._of_piece(step, bucket, state, *tensors, {n: bucket.views(c)[0] for n, c in b.items()})
            return flat(made.theta), {n: flat(c) for n, c in made.state.items()}, flat(made.gradient)
        u = torch.empty_like(a)
        for part in pieces(bucket, step.layout.n_parameters):
            of, along = ({n: t[part] if isinstance(t, Tensor) else t for n, t in d.items()} for d in (state, b))
            made = self._of_piece(step, bucket, of, step.theta[i][part], g[part], after[part], a[part], along)
            after[part], u[part] = made.theta, made.gradient
            for name, c in made.state.items():
                state[name][part] = c
        return after, {name: state[name] for name in made.state}, u

    def _of_piece(self, step: Step, bucket: Bucket, state: dict, theta, g, after, a, b: dict) -> Product:
        group = step.kinds[bucket.names[0]].group
        made = vector_jacobian_product(self.update, theta, g, state, step.settings[group], a, b)
        of = self.settings[-1][group]
        for name, c in made.settings.items():
            of[name] = of.get(name, 0) + c
        norms = torch._foreach_norm([made.after - after, after - theta, theta, a])
        self.gaps[-1] = self.gaps[-1] + exactly(torch.stack(norms)).square()
        return made

    @property
    def weights(self) -> Tensor:
        return torch.full_like(self.losses, 1 / len(self.losses))

    def gaps_and_growth(self) -> tuple[list[Tensor], Tensor]:
        """(how far the update was from what it should be, over what is allowed, step by step; how many times a has grown)"""
        gaps = torch.stack([gap.to(self.losses.device) for gap in self.gaps])
        self.team.again([("over_shards", gaps.numel())])
        gap, step, theta, size = self.team.over_shards(gaps.flatten()).view_as(gaps).sqrt().unbind(1)
        eps = max(torch.finfo(bucket.like.dtype).eps for bucket in self.layout.buckets)
        allowed = (0.01 * step + 8 * eps * theta).clamp_min(torch.finfo(gap.dtype).tiny)
        first = size.index_select(0, (size > 0).int().argmax().reshape(1))  # the last steps may have moved nothing
        return list((gap / allowed).unbind()), size.max() / first[0]

    def by_setting(self) -> list[dict[str, Tensor]]:
        """For each group, (N,) or (N, 2) of each of its numbers; 0 where a step does not depend on it."""
        result = []
        for groups in zip(*reversed(self.settings)):
            like = {name: c for group in groups for name, c in group.items()}
            filled = {name: [group.get(name, torch.zeros_like(c)) for group in groups] for name, c in like.items()}
            result.append({name: torch.stack(values) for name, values in sorted(filled.items())})
        if numbers := [t for group in result for t in group.values()]:
            flat = torch.cat([t.flatten() for t in numbers])
            self.team.again([("over_shards", flat.numel())])
            for t, total in zip(numbers, self.team.over_shards(flat).split([t.numel() for t in numbers])):
                t.copy_(total.view_as(t))
        return result

    def _state(self, step: Step, i: int) -> dict:
        """The optimizer's, as the update takes it: flat, or each tensor in its shape."""
        bucket = step.layout.buckets[i]
        flat = step.kinds[bucket.names[0]].states
        return {n: bucket.views(s)[0] if n in flat and not self.elementwise else s for n, s in step.states[i].items()}

    def _unclipped(self, step: Step, u: list[Tensor]) -> list[Tensor]:
        """Back through g ↦ g min(1, c/(‖g‖ + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
        if step.clipping is None:
            return u
        norm, limit = step.clipping
        factor = limit / (norm + 1e-6)
        along = torch.stack([(v * g).sum(dtype=norm.dtype) for v, g in zip(u, step.gradient)]).sum()
        self.team.again([("over_shards", 1)])
        (along,) = self.team.over_shards(along.reshape(1))
        pull = torch.where(factor < 1, along * factor / ((norm + 1e-6) * norm), 0)
        return [v * factor.clamp(max=1).to(v) - g * pull.to(g) for v, g in zip(u, step.gradient)]

    def _run_again(self, steps: list[Step]) -> None:
        """From the first one's state, which was kept, to the last one; passes draw what they drew."""
        old, theta, states = steps[0].layout, steps[0].theta, steps[0].states
        for step in steps:
            new = step.layout or Layout(old.at(theta).whole(), step.kinds)
            if new is not old:
                theta, states = relaid(theta, old, new), relaid_state(states, old, new)
            kinds = [step.kinds[bucket.names[0]] for bucket in new.buckets]
            counts = [{"step": kind.count + step.t} if self.elementwise else {} for kind in kinds]
            step.layout, step.theta, step.states = new, theta, [{**s, **c} for s, c in zip(states, counts)]
            for one in step.passes:
                one.kinks = Kinks(packed=True) if self.kinks else OwnKinks()
            self.problem.layout = new.at(theta)
            step.gradient = [None] * len(theta)
            self.team.again([("mean", 0)])
            found = step.gradients(self.problem, self.problem.layout.own, self.team, step.gradient.__setitem__)
            step.at_theta = Gradients(*found, step.gradient)
            old, (theta, states) = new, self._stepped(step)

    @torch.no_grad()
    def _stepped(self, step: Step) -> tuple[list[Tensor], list[dict]]:
        """(θ_{t+1}, s_{t+1})"""
        theta, states = list(step.theta), list(step.states)
        for i, bucket in enumerate(step.layout.buckets):
            group = step.kinds[bucket.names[0]].group
            if group is None:
                continue
            shaped = (lambda t: t) if self.elementwise else lambda t, bucket=bucket: bucket.views(t)[0]
            made, state = self.update(*map(shaped, (theta[i], clipped(step, i))), self._state(step, i), step.settings[group])
            flat = lambda t, bucket=bucket, made=made: bucket.copied({0: t}) if t.shape == made.shape else t
            flat = (lambda t: t) if self.elementwise else flat
            theta[i], states[i] = flat(made), {n: flat(s) if isinstance(s, Tensor) else s for n, s in state.items()}
        return theta, states


def clipped(step: Step, i: int) -> Tensor:
    """The gradient of a bucket, as the update was given it."""
    if step.clipping is None:
        return step.gradient[i]
    norm, limit = step.clipping
    return step.gradient[i] * (limit / (norm + 1e-6)).clamp(max=1).to(step.gradient[i])


def pieces(bucket: Bucket, n_parameters: int) -> Iterator[slice]:
    """Of a bucket, so that what an update keeps for its derivative is small beside θ."""
    length = max(PIECE if bucket.like.device.type == "cpu" else BUCKET, n_parameters // 16)
    return (slice(start, start + length) for start in range(0, bucket.size, length))


def relaid(flats: list[Tensor], old: Layout, new: Layout) -> list[Tensor]:
    """Flat tensors of one layout, in another one's places."""
    return new.flats(old.named(flats))


def relaid_state(state: State, old: Layout, new: Layout) -> State:
    """What lies flat of it; a name that some parameters have not is left out in theirs."""
    flat = lambda s, bucket: isinstance(s, Tensor) and s.shape == (bucket.size,)
    result: State = [{} for _ in new.buckets]
    for name in {name for of in state for name in of}:
        there = [(bucket, of[name]) for bucket, of in zip(old.buckets, state) if name in of and flat(of[name], bucket)]
        tensors = {n: t for bucket, s in there for n, t in zip(bucket.names, bucket.views(s))}
        for of, s in zip(result, new.flats(tensors)):
            of.update({} if s is None else {name: s})
    return result
