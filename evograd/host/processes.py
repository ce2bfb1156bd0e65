"""Several processes share out the work of one hypergradient: the candidates, or the batches. θ stays where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import draw_seeds
from .problem import Problem, Vector, exactly

SHARES = ("candidates", "batch")
FAILED = -1.0


class Shares:
    """This process's share in a group's hypergradient; all of it where `group` is None.

    Every process sends, and gets the sums of, K losses, K slopes and one gradient of λ's size: three all-reduces and nothing
    else. They are in float64, so that it cannot be seen who summed what first. Nothing is read on the host.

    Where the model is sharded, the group is the processes that hold its shards: losses are means over their parts of the batch;
    slopes and norms (two more numbers, for "guided") are sums over the shards, of which there may be replicas.

    A process that fails within the block still sends what the others wait for, with a mark. So all of them raise in the same
    step, and a process that catches its error and calls again is in step with the others. Not so with a sharded model: the
    others wait within a pass, where FSDP2 gathers parameters, and cannot be told.
    """

    def __init__(self, problem: Problem, group: dist.ProcessGroup | None, share: str | None, n_candidates: int, guided: bool):
        self.sharding = sharding = problem.sharding
        _check(problem, group, share, n_candidates, guided)
        self.problem, self.n_candidates = problem, n_candidates
        self.by_batch = share == "batch" or sharding is not None
        if sharding is not None:
            self.groups, self.rank, self.size = sharding.process_groups, sharding.rank, sharding.size
        elif group is not None:
            self.groups, self.rank, self.size = [group], dist.get_rank(group), dist.get_world_size(group)
        else:
            self.groups, self.rank, self.size = [], 0, 1
        self.parts = self.size if self.by_batch else 1
        # Candidates that stay together: guided pairs share their kinks.
        self.unit = 2 if guided and self.groups and not self.by_batch else 1
        self.own = slice(None) if self.by_batch else slice(self.rank, None, self.size)
        units = range(0, n_candidates, self.unit)[self.own]
        self.candidates = [k for unit in units for k in range(unit, min(unit + self.unit, n_candidates))]
        self.padding = -n_candidates % self.unit  # of an odd number, so that all units are whole
        self.device = sharding.device if sharding is not None else next(iter(problem.theta.values())).device
        self.seed = 0
        # What is still to be sent. The last message begins with one number from each process: its seed, or FAILED.
        n_last = self.size + 1 + sum(h.numel() * (1 + h.is_complex()) for h in problem.hyperparameters)
        n = n_candidates + self.padding
        norms = [2] if guided and sharding is not None else []
        self.unsent = norms + ([n] if guided else [n, n]) + [n_last] if self.groups else []
        self.seeds_seen: Tensor | None = None

    def starts(self, seed: Callable[[], int]) -> dict[int | str, list[Tensor]]:
        """States of torch's generators for each candidate's pass and for "validation", the same on every process.

        None where every process evaluates every candidate, and draws as one process does. `seed` gives a number that all
        processes must agree on; it is compared with theirs when the step ends.
        """
        if not self.groups:
            return {}
        if self.sharding is None or self.sharding.replicas > 1:  # shards without replicas may draw as they like
            self.seed = seed() % 2**52  # exact in float64
        if self.by_batch:
            return {}
        seeds = draw_seeds((self.n_candidates + 1,), torch.Generator().manual_seed(self.seed))
        return {key: self.problem.draws.state(s) for key, s in zip([*range(self.n_candidates), "validation"], seeds)}

    def of(self, values: Tensor) -> Tensor:
        """This process's candidates' among (K,) values."""
        if not self.groups:
            return values
        return F.pad(values, (0, self.padding)).view(-1, self.unit)[self.own].reshape(-1)[: len(self.candidates)]

    def gather(self, values: Tensor) -> Tensor:
        """A number for each of this process's candidates -> (K,), everybody's; a mean over the parts of a batch."""
        if not self.groups:
            return values
        message = self._buffer()
        whole = F.pad(values, (0, -len(values) % self.unit)).view(-1, self.unit)
        message.view(-1, self.unit)[self.own] = whole.to(message)
        self._sum(message)
        return (message / self.parts).to(values)[: self.n_candidates]

    def slopes(self, values: Tensor) -> Tensor:
        """⟨G, ε_k⟩ of each of this process's candidates -> (K,), everybody's; sums over the shards, if there are any."""
        if self.sharding is None:
            return self.gather(values)
        return self._over_shards(values)

    def norms(self, *vectors: Sequence[Tensor]) -> list[Tensor]:
        """The norm of each vector, given in pieces; over the shards, if there are any."""
        own = [norm(vector) for vector in vectors]
        if self.sharding is None:
            return own
        squares = torch.stack([n.to(self.device).double().square() for n in own])
        return [s.sqrt().to(n) for s, n in zip(self._over_shards(squares), own)]

    def _over_shards(self, values: Tensor) -> Tensor:
        message = self._buffer()
        message.copy_(values)
        self._sum(message)
        return (message / self.sharding.replicas).to(values)

    def total(self, val: Tensor, direct: Vector.Flat, weighted: Vector.Flat) -> tuple[Tensor, Vector.Flat]:
        """(ℓ_V, ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ) of the whole group from this process's terms."""
        lam = self.problem.lam
        if not self.groups:
            return val, lam.add(direct, weighted)
        # Σ over the processes: ∂ℓ_V/∂λ is there in each of them, a candidate in one (or, by parts of the batch, in each).
        scaled = (self._scaled(direct, 1 / self.size), self._scaled(weighted, 1 / self.parts))
        own = lam.add(*scaled)
        self.problem.check_dependence(own)
        message = self._buffer()
        head, body = message[: self.size], message[self.size :]
        head[self.rank] = self.seed
        parts = [torch.view_as_real(v).view(-1) if v.is_complex() else v for v in own.vectors]
        torch.cat([(val.double() / self.size).reshape(1).to(body), *(p.to(body) for p in parts)], out=body)
        self._sum(message)
        self.seeds_seen = head
        total, *sums = body.split([1, *map(len, parts)])
        # A complex view has to begin at an even element, which a part of a message need not.
        vectors = [torch.view_as_complex(s.clone().view(-1, 2)) if v.is_complex() else s for s, v in zip(sums, own.vectors)]
        total = torch.where((head == head[0]).all(), total[0], torch.nan)  # check_finite then raises, on every process
        return total.to(val), Vector.Flat([v.to(o.device) for v, o in zip(vectors, own.vectors)], own.depends)

    @staticmethod
    def _scaled(flat: Vector.Flat, factor: float) -> Vector.Flat:
        return flat if flat.vectors is None else Vector.Flat([exactly(v) * factor for v in flat.vectors], flat.depends)

    def _buffer(self) -> Tensor:
        return torch.zeros(self.unsent[0], dtype=torch.float64, device=self.device)

    def _sum(self, message: Tensor) -> None:
        """The only way to the other processes."""
        later, self.unsent = self.unsent[1:], []  # if this fails, nobody is left to send to
        for group in self.groups:
            dist.all_reduce(message, group=group)
        self.unsent = later

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception) or not self.groups:
            return
        if self.sharding is not None and self.unsent:
            return
        with contextlib.suppress(RuntimeError):  # if the others are gone, this process's own error is what counts
            while self.unsent:
                message = self._buffer()
                if len(self.unsent) == 1:
                    message[self.rank] = FAILED
                self._sum(message)
        if self.seeds_seen is None:
            return
        seeds = self.seeds_seen.tolist()
        failed = ", ".join(str(rank) for rank, seed in enumerate(seeds) if seed == FAILED)
        if failed:
            raise RuntimeError(f"process {failed} of the group failed in this step; its own message says why") from None
        if len(set(seeds)) > 1:
            raise RuntimeError(
                "the processes of the group drew different noise; seed torch alike in all of them, or give each "
                "generator=torch.Generator().manual_seed(…) with the same number"
            ) from None


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all of them as one vector, in float32 at least."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(tensors)
    return torch.stack([n.to(norms[0].device, dtype) for n in norms]).norm()


def _check(problem: Problem, group, share: str | None, n_candidates: int, guided: bool) -> None:
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
    if sharding is not None:
        if sorted(dist.get_process_group_ranks(group)) != sharding.ranks:
            raise ValueError(
                f"group must be the processes that hold the model's shards, {sharding.ranks}, or None, which means them"
            )
        return
    if share == "batch" and guided:
        raise ValueError(
            "share='batch' with noise='guided' would send a gradient of the model's size; use share='candidates', "
            "with the same batches in every process"
        )
    if guided and n_candidates // 2 < dist.get_world_size(group):
        raise ValueError(
            f"n_candidates={n_candidates} cannot be shared out over {dist.get_world_size(group)} processes in pairs, as "
            "noise='guided' needs it, since the two of a pair share their kinks; at least two for each are needed"
        )
    parallel = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in problem.slots.modules)
    if share != "batch" and parallel and problem.place is not None:
        raise ValueError(
            "model is DistributedDataParallel, which all processes must call alike: use share='batch', or pass the bare model, "
            "ddp.module, whose candidates can be shared out"
        )
    if share != "batch" and n_candidates < dist.get_world_size(group):
        raise ValueError(
            f"n_candidates={n_candidates} cannot be shared out over {dist.get_world_size(group)} processes; "
            "at least one for each is needed"
        )
