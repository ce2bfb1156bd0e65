"""Several processes share out the work of one hypergradient: the candidates, the batches, or the shards of a model.

An estimator's body asks its team for sums and means, and reads alike for one process and for many. A team is `Alone`,
`ByCandidates`, `ByBatch` or `OfShards`; `team` chooses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .draws import Occasions, draw_seeds
from .problem import Problem
from .vectors import Vector, exactly

SHARES = ("candidates", "batch")
FAILED = -1.0


class Alone:
    """One process does everything.

    candidates: which of them this process evaluates.
    averages: whether `mean` is over several processes, so that a gradient by θ has to be whole.
    """

    averages = False

    def __init__(self, problem: Problem, n_candidates: int):
        self.problem, self.candidates = problem, range(n_candidates)

    def occasions(self, seed: Callable[[], int]) -> Occasions:
        """What losses draw, by candidate and for "validation". `seed` gives a number that all processes must agree on."""
        return Occasions(self.problem.draws)

    def of(self, values: Tensor) -> Tensor:
        """This process's candidates' among (K,) values."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """A number for each of this process's candidates -> (K,), everybody's; a mean over the parts of a batch."""
        return values

    def slopes(self, values: Tensor) -> Tensor:
        """⟨G, ε_k⟩ of each of this process's candidates -> (K,), everybody's; sums over the shards, if there are any."""
        return values

    def over_shards(self, values: Tensor) -> Tensor:
        """Sums of numbers over the shards, if there are any."""
        return values

    def again(self, moves: Sequence[tuple[str, int]]) -> None:
        """What comes is not the end: these moves are made once more."""

    def mean(self, gradient: list[Tensor]) -> list[Tensor]:
        """A gradient by θ, bucket by bucket -> its mean over the parts of a batch."""
        return gradient

    def total(self, val: Tensor, direct: Vector.Flat, weighted: Vector.Flat) -> tuple[Tensor, Vector.Flat]:
        """(ℓ_V, ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ) of all processes from this one's terms."""
        return val, self.problem.lam.add(direct, weighted)

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass


class _Group(Alone):
    """Processes that send each other sums: a few numbers, and one gradient of λ's size, in float64, so that it cannot be seen who
    summed what first. Nothing is read on the host.

    A process that fails within the block still sends what the others wait for, with a mark. So all of them raise in the same
    step, and a process that catches its error and calls again is in step with the others.

    moves: the methods that an estimator calls before `total`, in order, each with how many numbers it sends.
    """

    parts = 1  # of a batch

    def __init__(self, problem: Problem, n_candidates: int, moves: Sequence[tuple[str, int]], groups, rank: int, size: int):
        super().__init__(problem, n_candidates)
        self.n_candidates, self.moves = n_candidates, moves
        self.groups, self.rank, self.size = groups, rank, size
        self.device = next(iter(problem.theta.values())).device if problem.sharding is None else problem.sharding.device
        self.seed, self.seeds_seen = 0, None
        self.unsent: list[tuple] = []  # what the others wait for

    def __enter__(self) -> Alone:
        self.again(self.moves)
        return self

    def again(self, moves: Sequence[tuple[str, int]]) -> None:
        # The last message begins with one number from each process: its seed, or FAILED.
        n_last = self.size + 1 + sum(h.numel() * (1 + h.is_complex()) for h in self.problem.hyperparameters)
        self.unsent = [message for move, n in moves for message in self.messages(move, n)] + [self.message(n_last)]

    def message(self, n: int, like: Tensor | None = None) -> tuple:
        """(how many, of which dtype, where)"""
        return (n, torch.float64, self.device) if like is None else (n, like.dtype, like.device)

    def messages(self, move: str, n: int) -> list[tuple]:
        return [self.message(n)] if move in ("gather", "slopes") else []

    def occasions(self, seed: Callable[[], int]) -> Occasions:
        self.seed = seed() % 2**52  # exact in float64
        return Occasions(self.problem.draws)

    def gather(self, values: Tensor) -> Tensor:
        message = self._buffer()
        message[self.candidates[0] : len(message) : self.candidates.step] = values.to(message)
        return (self._summed(message) / self.parts).to(values)

    slopes = gather

    def total(self, val: Tensor, direct: Vector.Flat, weighted: Vector.Flat) -> tuple[Tensor, Vector.Flat]:
        # Σ over the processes: ∂ℓ_V/∂λ is there in each of them, a candidate in one (or, by parts of the batch, in each).
        own = self.problem.lam.add(_scaled(direct, 1 / self.size), _scaled(weighted, 1 / self.parts))
        self.problem.check_dependence(own)
        message = self._buffer()
        head, body = message[: self.size], message[self.size :]
        head[self.rank] = self.seed
        parts = [torch.view_as_real(v).view(-1) if v.is_complex() else v for v in own.vectors]
        torch.cat([(val.double() / self.size).reshape(1).to(body), *(p.to(body) for p in parts)], out=body)
        self.seeds_seen = self._summed(message)[: self.size]
        total, *sums = body.split([1, *map(len, parts)])
        # A complex view has to begin at an even element, which a part of a message need not.
        vectors = [torch.view_as_complex(s.clone().view(-1, 2)) if v.is_complex() else s for s, v in zip(sums, own.vectors)]
        total = torch.where((head == head[0]).all(), total[0], torch.nan)  # check_finite then raises, on every process
        return total.to(val), Vector.Flat([v.to(o.device) for v, o in zip(vectors, own.vectors)], own.depends)

    def _buffer(self) -> Tensor:
        n, dtype, device = self.unsent[0]
        return torch.zeros(n, dtype=dtype, device=device)

    def _summed(self, message: Tensor) -> Tensor:
        """The only way to the other processes."""
        later, self.unsent = self.unsent[1:], []  # if this fails, nobody is left to send to
        for group in self.groups:
            dist.all_reduce(message, group=group)
        self.unsent = later
        return message

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception):
            return
        with contextlib.suppress(RuntimeError):  # if the others are gone, this process's own error is what counts
            while self.unsent:
                message = self._buffer()
                if len(self.unsent) == 1:
                    message[self.rank] = FAILED
                self._summed(message)
        seeds = [] if self.seeds_seen is None else self.seeds_seen.tolist()
        if failed := ", ".join(str(rank) for rank, seed in enumerate(seeds) if seed == FAILED):
            raise RuntimeError(f"process {failed} of the group failed in this step; its own message says why") from None
        if len(set(seeds)) > 1:
            raise RuntimeError(
                "the processes of the group drew different noise; seed torch alike in all of them, or give each "
                "generator=torch.Generator().manual_seed(…) with the same number"
            ) from None


class ByCandidates(_Group):
    """All have the same batches, and each evaluates its part of the candidates."""

    def __init__(self, problem: Problem, n_candidates: int, *settings):
        super().__init__(problem, n_candidates, *settings)
        self.candidates = range(self.rank, n_candidates, self.size)

    def of(self, values: Tensor) -> Tensor:
        return values[self.rank :: self.size]

    def occasions(self, seed: Callable[[], int]) -> Occasions:
        """States that are the same in every process: its part of the candidates does not tell what was drawn before."""
        super().occasions(seed)
        seeds = draw_seeds((self.n_candidates + 1,), torch.Generator().manual_seed(self.seed))
        keys = [*range(self.n_candidates), "validation"]
        return Occasions(self.problem.draws, {key: self.problem.draws.state(s) for key, s in zip(keys, seeds)})


class ByBatch(_Group):
    """Each has a part of every batch, of equal size, and evaluates every candidate: losses and gradients are means."""

    averages = True

    def __init__(self, *settings):
        super().__init__(*settings)
        self.parts = self.size

    def messages(self, move: str, n: int) -> list[tuple]:
        if move == "mean":
            return [self.message(bucket.size, bucket.like) for bucket in self.problem.layout.buckets]
        return super().messages(move, n)

    def mean(self, gradient: list[Tensor]) -> list[Tensor]:
        means = []
        for flat in gradient:
            message = self._buffer()
            message[: len(flat)] = flat
            means.append(self._summed(message).div_(self.size)[: len(flat)])
        return means


class OfShards(ByBatch):
    """The processes that hold a sharded model: each has a part of every batch, and its shards of θ. FSDP2 averages gradients.

    Slopes and norms are sums over the shards, of which there may be replicas. A process that fails within a pass leaves the
    others waiting, where FSDP2 gathers parameters: they cannot be told.
    """

    averages = False

    def messages(self, move: str, n: int) -> list[tuple]:
        return [] if move == "mean" else [self.message(n)]

    def occasions(self, seed: Callable[[], int]) -> Occasions:
        # Shards without replicas may draw as they like.
        return super().occasions(seed if self.problem.sharding.replicas > 1 else lambda: 0)

    def over_shards(self, values: Tensor) -> Tensor:
        message = self._buffer().copy_(values)
        return (self._summed(message) / self.problem.sharding.replicas).to(values)

    slopes = over_shards

    def mean(self, gradient: list[Tensor]) -> list[Tensor]:
        return gradient

    def __exit__(self, kind, error, traceback) -> None:
        if not self.unsent:
            super().__exit__(kind, error, traceback)


def team(
    problem: Problem, group: dist.ProcessGroup | None, share: str | None, n_candidates: int, moves: Sequence[tuple[str, int]]
) -> Alone:
    """Who does the work, once `check` has let the arguments through."""
    if (sharding := problem.sharding) is not None:
        members = sharding.process_groups, sharding.rank, sharding.size
        return OfShards(problem, n_candidates, moves, *members)
    if group is None:
        return Alone(problem, n_candidates)
    members = [group], dist.get_rank(group), dist.get_world_size(group)
    kind = ByBatch if share == "batch" else ByCandidates
    return kind(problem, n_candidates, moves, *members)


def check(problem: Problem, group: dist.ProcessGroup | None, share: str | None) -> None:
    """Of the arguments `group` and `share` of every estimator that has them."""
    sharding = problem.sharding
    if share is not None and share not in SHARES:
        raise ValueError(f"share={share!r} is unknown; accepted are {', '.join(map(repr, SHARES))}")
    if sharding is not None and share == "candidates":
        raise ValueError(
            "share='candidates' is for processes that have the whole model each; those of a sharded model evaluate every "
            "candidate together, each on its part of the batch (share='batch', or none)"
        )
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process is in (torch.distributed.group.WORLD, once "
            f"init_process_group was called) or None, not {type(group).__name__}"
        )
    if sharding is not None and sorted(dist.get_process_group_ranks(group)) != sharding.ranks:
        raise ValueError(f"group must be the processes that hold the model's shards, {sharding.ranks}, or None, which means them")


def check_batch(problem: Problem, group: dist.ProcessGroup | None, share: str | None) -> None:
    """For an estimator that has no candidates to share out, but batches."""
    if share == "candidates" and group is not None:
        raise ValueError(
            "share='candidates' is of random candidates; the two of a guided pair stay together, since they share their kinks. "
            "Use share='batch', where each process has a part of every batch"
        )


def check_candidates(problem: Problem, group: dist.ProcessGroup | None, share: str | None, n_candidates: int) -> None:
    """Whether candidates can be shared out, where they are to be."""
    if problem.sharding is not None or group is None or share == "batch":
        return
    if problem.place is not None and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in problem.slots.modules):
        raise ValueError(
            "model is DistributedDataParallel, which all processes must call alike: use share='batch', or pass the bare model, "
            "ddp.module, whose candidates can be shared out"
        )
    if n_candidates < dist.get_world_size(group):
        raise ValueError(
            f"n_candidates={n_candidates} cannot be shared out over {dist.get_world_size(group)} processes; "
            "at least one for each is needed"
        )


def _scaled(flat: Vector.Flat, factor: float) -> Vector.Flat:
    return flat if flat.vectors is None else Vector.Flat([exactly(v) * factor for v in flat.vectors], flat.depends)
