"""Hypergradients through N steps of the optimizer that really trains, by one further first-order pass a step.

Relatives: MAGIC in EleutherAI's bergson and REPLAY (Engstrom et al. 2025), which go back step by step in the same way with double
backward; MixFlow-MG (Kemaev et al., ICML 2025) in forward mode; SAMA (Choe et al., NeurIPS 2023), Adam's Jacobian for one step;
FdeHBO (arXiv 2312.03807), differences for an implicit system; Maclaurin, Duvenaud, Adams (ICML 2015), who run the steps backward;
guided's pair is one nudge of Zucchet et al. (Neural Computation 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .evaluation import in_place
from .host import processes
from .host.checks import Closure, Parameters, check_choice, check_count, check_positive, refuse_sharded, warn
from .host.precision import full_precision
from .host.problem import Problem
from .host.result import ANOTHER, Hypergradient, check_finite, estimator
from .host.sharded import local
from .host.slots import clones, write
from .lookback import Lookback
from .optimizers import Update, update_of
from .products import WAYS
from .radius import Radius, target
from .recording import Recording

STRATEGIES = ("stream", "in_place")
GROWN, CURVED = 1e3, 0.1  # how far the direction may grow on its way back, and the curvature of a pair
ILL = (
    "{}: the hypergradient may be far off. Either a loss reads what has changed since, or the direction is ill-conditioned: take "
    "fewer steps, or sides=2; with Adam a larger eps, or begin after a warm-up, in which its second moment grows (clear())"
)


@dataclass(frozen=True)
class TrajectoryHypergradient(Hypergradient):
    """What `Trajectory.hypergradient` returns: a `Hypergradient` whose `candidate_losses` are the (N,) training losses, and

    settings: for each of the optimizer's groups dℓ_V by its numbers (lr, weight_decay, momentum, …) at each step, (N,) each, (N, 2)
        for betas. Their sum over the steps is the derivative by a setting that is the same in all of them.
    start: dℓ_V/dθ_0 by name, if it was asked for.
    """

    settings: list[dict[str, Tensor]] = ()
    start: dict[str, Tensor] | None = None


class Trajectory:
    """Training steps that are remembered, and a way back through them:

        trajectory = evograd.Trajectory(model, optimizer, [λ])
        for …:
            loss = trajectory.step(train_loss)
        result = trajectory.hypergradient(val_loss)

    With a, b = ∂ℓ_V/∂θ_N, 0 and U the optimizer's update, (θ_{t+1}, s_{t+1}) = U(θ_t, s_t, g_t), g_t = ∇_θ ℓ_t(θ_t, λ), going back:

        (a', b', u) = (a, b) times the Jacobian of U alone at (θ_t, s_t, g_t)
        (∂²ℓ_t/∂λ∂θ u, ∂²ℓ_t/∂θ² u) by passes at θ_t + r u/‖u‖, with the kinks and the random draws of θ_t's own
        dℓ_V/dλ += the first,   a = a' + the second,   b = b'

    Args:
        model: the network; θ are those of its parameters that the optimizer steps in.
        optimizer: torch.optim's SGD, Adam, AdamW, RMSprop or Adagrad, of any kind (fused, foreach, capturable), or another with
            `update`.
        hyperparameters: as in `evograd.hypergradient`; none of them is the optimizer's. [] where `settings` or `start` are all.
        parameters: names of those to go back through. Default: all of θ.
        sides: passes for each step back: 1, beside the gradients of the training step itself, with a pair now and then that shows
            the radius; or 2, a central difference, for a third more.
        radius: r > 0, or a `Radius` that several trajectories share. Default: one of its own, which each call carries on.
        second_moment: "frozen" holds √v of Adam, AdamW, RMSprop and Adagrad constant in the product.
        update: (θ, g, state, settings) -> (θ', state'), the step of an optimizer that is not known, for each tensor.
        by: "guided", passes; "mixed_mode", forward mode; "unrolled", double backward: the last two are exact, and references.
        every: k keeps each k-th state alone, and runs the steps between again: three plain steps a step, 2√N states for k = √N.
        device: "cpu" keeps what is remembered in the host's memory.
        strategy: "in_place", as in `evograd.hypergradient`; a model that is sharded by FSDP2 takes it by itself.

    Memory: that of a plain step, N times (θ, s, g) and the kinks in bits, and three copies of θ on the way back. Several processes:
    DistributedDataParallel and FSDP2 as they are, each process with its own part of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        hyperparameters: Sequence[Tensor],
        *,
        parameters: Parameters = None,
        sides: int = 1,
        radius: float | Radius | None = None,
        second_moment: str = "exact",
        update: Update | None = None,
        by: str = "guided",
        every: int = 1,
        device: str | torch.device | None = None,
        strategy: str | None = None,
    ):
        check_choice("by", by, WAYS)
        check_choice("strategy", strategy, STRATEGIES)
        check_count("every", every)
        if sides not in (1, 2):
            raise ValueError(f"sides={sides!r} must be 1 or 2")
        if radius is not None and not isinstance(radius, Radius):
            check_positive("radius", radius)
        self.radius = Radius() if radius is None else radius
        self.sides, self.by = sides, by
        settings = dict(
            in_place=in_place(strategy), kinks=by == "guided", elementwise=update is None, every=every, device=device
        )
        self.recording = Recording(model, optimizer, list(hyperparameters), parameters, **settings)
        self.update = update_of(optimizer, update, second_moment)
        if by != "guided" and self.recording.sharding is not None:
            refuse_sharded(self.recording.parameters)

    @estimator
    def step(self, train_loss: Closure | Sequence[Closure], *, clip_norm: float | None = None, scaler=None) -> Tensor:
        """One training step, bit for bit that of zero_grad(), backward(), optimizer.step(); -> the loss, (), without a graph.

        Args:
            train_loss: a function of the model; several are gradient accumulation, each evaluated and gone back through alone,
                and their mean is the loss. What a function reads (x and y of a loop) is kept as it is now.
            clip_norm: gradients are clipped as by torch.nn.utils.clip_grad_norm_(…, clip_norm).
            scaler: a torch.amp.GradScaler. A step that it skips was not made.

        Raises:
            RuntimeError: the model's parameters, λ or the optimizer's state have changed since the last step, or others are trained.
        """
        return self.recording.step(train_loss, clip_norm, scaler)

    @estimator
    def hypergradient(self, val_loss: Closure, *, start: bool = False) -> TrajectoryHypergradient:
        """dℓ_V(θ_N, λ)/dλ through all remembered steps, which are then forgotten, after an error too.

        start: also dℓ_V/dθ_0, for one backward pass more.
        """
        with self.recording.taken(val_loss) as problem, full_precision(), problem.undisturbed():
            products = WAYS[self.by](problem, self.sides, self.radius)
            with self._team(problem) as team:
                back = Lookback(self.recording, problem, team, self.update, self.by == "guided")
                val, direct, a = problem.val_gradient(problem.layout.own)
                direct = [torch.zeros_like(h) for h in problem.hyperparameters] if self.recording.alone else direct
                total, a, b = problem.lam.flat(direct), problem.layout.padded(team.mean(a)), [{} for _ in a]
                for step in back:
                    a, b, u = back.product(step, a, b)
                    mixed, curved = products(step, u, start or step.t > 0, team)  # ∂²ℓ_t/∂λ∂θ u, ∂²ℓ_t/∂θ² u
                    total, a = problem.lam.add(total, mixed), added(a, curved)
                val, total = team.total(val, problem.lam.flat([]), total)
                grads = [] if self.recording.alone else problem.grads(total)
                own = grads, val, back.losses, back.weights, products.curvature, back.by_setting()
                return _looked_at(TrajectoryHypergradient(*own, back.layout.named(a) if start else None), back, products)

    def __len__(self) -> int:
        """How many steps are remembered."""
        return len(self.recording.steps)

    def clear(self) -> None:
        """Forget them."""
        self.recording.clear()

    def state_dict(self) -> dict:
        raise NotImplementedError(
            "a Trajectory has no state_dict: its steps hold closures and batches. Checkpoint after hypergradient() or clear(), when "
            "it is empty, and keep radius.state_dict() of the Radius that it was given"
        )

    def _team(self, problem: Problem) -> processes.Alone:
        """DistributedDataParallel's processes, or those of a sharded model."""
        model = self.recording.model
        group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None
        return processes.team(problem, group, "batch", 2, [("mean", 0)])


def one_step(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    by: str = "guided",
    parameters: Parameters = None,
) -> TrajectoryHypergradient:
    """Through the step that the optimizer would make now. Model and optimizer are left as they were, after an error too."""
    with _undone(model, optimizer):
        trajectory = Trajectory(model, optimizer, hyperparameters, parameters=parameters, by=by)
        trajectory.step(train_loss)
        return trajectory.hypergradient(val_loss)


def _tens(value: float) -> str:
    """The power of ten below: a loop is warned once of each."""
    return f"{10 ** math.floor(math.log10(value)):g}" if math.isfinite(value) else "any number"


@contextmanager
def _undone(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """A step that is made within the block is taken back."""
    own = [*model.parameters(), *model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    states = {p: dict(state) for p, state in optimizer.state.items()}
    own += [s for state in states.values() for s in state.values() if isinstance(s, Tensor)]
    own = [local(t) for t in own]
    values = clones(own)
    try:
        yield
    finally:
        write(own, values)
        for p, gradient in grads:
            p.grad = gradient
        optimizer.state.clear()
        optimizer.state.update(states)


def added(a: list[Tensor], b: list[Tensor] | None) -> list[Tensor]:
    """a + b; the lists are emptied on the way."""
    return a if b is None else [a.pop(0) + b.pop(0) for _ in range(len(a))]


def _looked_at(result: TrajectoryHypergradient, back: Lookback, products) -> TrajectoryHypergradient:
    """The result, once it is known to be finite, and its steps to be those that were made. The one host synchronisation."""
    gaps, growth = back.gaps_and_growth()
    changes = [change.min() for change in products.changes]  # where both are large, there is another batch
    before = {f"train_loss of step {t}": loss for t, loss in enumerate(result.candidate_losses.unbind())}
    _, read = check_finite(result.candidate_losses, result.val_loss, result.grads, [growth, *gaps, *changes], before)
    if not read:
        return result
    growth, read, n = read[0], read[1:], len(gaps)
    if wrong := [n - 1 - i for i, value in enumerate(read[:n]) if not value < 1]:
        raise RuntimeError(
            f"step {wrong[-1]} of the trajectory did not do what the optimizer's update does: its gradients or parameters were "
            "changed on the way (a hook of the optimizer, p.data), or update= is not its update"
        )
    far = [i for i, value in enumerate(read[n:]) if value > ANOTHER]
    if far:
        products.distrust()
    if other := [n - 1 - i for i in far if products.by_both[i]]:
        warn(
            f"train_loss of step {other[-1]} has another value beside θ than it had in training: it reads what has changed since "
            "(attributes of an object, an iterator; bind what it needs, lambda m, x=x, y=y: …), or a direction is ill-conditioned "
            "(Adam's first steps, few hyperparameters: begin after a warm-up, or take several steps)"
        )
    elif growth > GROWN:
        warn(ILL.format(f"the direction has grown more than {_tens(growth)} times on its way back"))
    elif products.curvature is not None and products.curvature > max(CURVED, 2 * target(products.eps)):
        warn(ILL.format(f"the curvature of pairs is above {_tens(products.curvature)} at every radius (0.01 is right in float32)"))
    return result
