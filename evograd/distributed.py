"""Several processes share out the work of one hypergradient: the candidates, or the batches. θ stays where it is.

And what a training script needs to run in several processes: `processes`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .noise import draw_seeds
from .problem import Problem

SHARES = ("candidates", "batch")
FAILED = -1.0


@dataclass(frozen=True)
class Processes:
    """The processes that torchrun has started for one run: which one this is, and what they do together.

    All draw the same batches, and each trains on its own part of them. Where there is one process nothing is done.
    group: all of them, for tensors on their devices.  host: all of them, for what the host knows.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None

    def progress(self, *iterable: Iterable, **settings):
        """tqdm's bar, which the first process alone shows."""
        from tqdm import tqdm  # here, so that the package itself does not need it

        return tqdm(*iterable, mininterval=1, **settings, **({"disable": True} if self.rank else {}))

    def part(self, batch: Tensor, dim: int = 0) -> Tensor:
        """This process's part of a batch, one of `size` equal ones in their order."""
        if self.size == 1:
            return batch
        self.check_equal_parts(batch.shape[dim], "samples")
        return batch.chunk(self.size, dim)[self.rank]

    def check_equal_parts(self, n: int, what: str) -> None:
        if n % self.size:
            raise ValueError(f"a batch of {n} {what} cannot be divided equally among {self.size} processes")

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that the other processes enter when the first one has left it: what it downloads, they find."""
        if self.rank:
            self.all(None)
        yield
        if not self.rank:
            self.all(None)

    def whole(self, part: Tensor) -> Tensor:
        """The batch (along dimension 0) of which every process gives its part."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of every process's tensor, without a graph; where there is one process, `tensor` itself."""
        if self.size == 1:
            return tensor
        total = tensor.detach() / self.size
        dist.all_reduce(total, group=self.group)
        return total

    def all(self, value: object) -> list:
        """Every process's value, by rank: anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def largest(self, number: int) -> int:
        """The largest of every process's numbers, known to the host."""
        if self.size == 1:
            return number
        result = torch.tensor(number)
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self.host)
        return int(result)

    def seed(self, seed: int, step: int, alike: bool = False) -> None:
        """Seed torch for what the losses of this step draw: a stream for each process, or, `alike`, the same for all.

        Every step anew: how many numbers are drawn depends on the data, and processes have different ones.
        """
        if self.size > 1:
            torch.manual_seed(self._number(seed, step, 0 if alike else self.rank + 1))

    def generator(self, seed: int, step: int) -> torch.Generator:
        """A generator in the same state in every process, whatever each has drawn so far."""
        return torch.Generator().manual_seed(self._number(seed, step, 0))

    def _number(self, seed: int, step: int, stream: int) -> int:
        first = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
        return (first + (step << 16) + stream) % 2**62

    def data_parallel(self, model: nn.Module, parameters: Iterable[Tensor]) -> nn.Module:
        """`model` for the ordinary step: the gradients of `parameters` are averaged as they come. Others are left alone."""
        if self.size == 1:
            return model
        trained = {id(p) for p in parameters}
        others = [p for p in model.parameters() if id(p) not in trained and p.requires_grad]
        for p in others:
            p.requires_grad_(False)  # DistributedDataParallel waits for the gradients of all that require them now
        # Buffers: see average_buffers. Broadcast, they would change between two passes of one step, under autograd's feet.
        named = inspect.signature(DistributedDataParallel).parameters
        flag = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # its name before torch 2.14
        settings = {"process_group": self.group, "gradient_as_bucket_view": True, flag: False}
        parallel = DistributedDataParallel(model, **settings)
        for p in others:
            p.requires_grad_(True)
        return parallel

    def averaging(self, parallel: nn.Module, last: bool):
        """A block with one of several backward passes of a step; in the `last` one the gradients, added up, are averaged."""
        return contextlib.nullcontext() if last or self.size == 1 else parallel.no_sync()

    def average_buffers(self, model: nn.Module) -> None:
        """BatchNorm's running statistics, of every process's part of the batch -> their mean."""
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        if self.size > 1 and buffers:
            flat = self.mean(torch.cat([b.reshape(-1) for b in buffers]))
            for buffer, value in zip(buffers, flat.split([b.numel() for b in buffers])):
                buffer.copy_(value.view_as(buffer))


ALONE = Processes()


def world_size() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes of this run, joined by NCCL on CUDA and by gloo on the CPU. The first one alone prints to stdout.

    A process that cannot reach the others ends too; if that is since one of them has ended, the other one's message counts.
    """
    if world_size() == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, stdout = dist.get_rank(), sys.stdout
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                sys.stdout = stack.enter_context(open(os.devnull, "w"))
            yield Processes(rank, dist.get_world_size(), dist.group.WORLD, dist.new_group(backend="gloo"))
    except RuntimeError as error:
        if not _left_alone(error):
            raise
        why = str(error).splitlines()[0]
        print(f"\nerror: process {rank}: {why}. If another process has ended before, its message counts", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        sys.stdout = stdout
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def _left_alone(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Shares:
    """This process's share in a group's hypergradient; all of it where `group` is None.

    Every process sends, and gets the sums of, K losses, K slopes and one gradient of λ's size: three all-reduces and nothing
    else. They are in float64, so that it cannot be seen who summed what first. Nothing is read on the host.

    A process that fails within the block still sends what the others wait for, with a mark. So all of them raise in the same
    step, and a process that catches its error and calls again is in step with the others.
    """

    def __init__(self, problem: Problem, group: dist.ProcessGroup | None, share: str, n_candidates: int, guided: bool):
        _check(group, share, n_candidates, guided)
        self.problem, self.group, self.n_candidates = problem, group, n_candidates
        self.by_batch = share == "batch"
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.parts = self.size if self.by_batch else 1
        self.own = slice(None) if self.by_batch else slice(self.rank, None, self.size)
        self.candidates = range(n_candidates)[self.own]
        self.device = next(iter(problem.theta.values())).device
        self.seed = 0
        # What is still to be sent. The last message begins with one number from each process: its seed, or FAILED.
        n_last = self.size + 1 + sum(h.numel() for h in problem.hyperparameters)
        self.unsent = [] if group is None else [n_candidates, n_candidates, n_last]
        self.seeds_seen: Tensor | None = None

    def starts(self, seed: Callable[[], int]) -> dict[int | str, list[Tensor]]:
        """States of torch's generators for each candidate's pass and for "validation", the same on every process.

        None where every process evaluates every candidate, and draws as one process does. `seed` gives a number that all
        processes must agree on; it is compared with theirs when the step ends.
        """
        if self.group is None:
            return {}
        self.seed = seed() % 2**52  # exact in float64
        if self.by_batch:
            return {}
        seeds = draw_seeds((self.n_candidates + 1,), torch.Generator().manual_seed(self.seed))
        return {key: self.problem.random_state(s) for key, s in zip([*range(self.n_candidates), "validation"], seeds)}

    def gather(self, values: Tensor) -> Tensor:
        """A number for each of this process's candidates -> (K,), everybody's; a mean over the parts of a batch."""
        if self.group is None:
            return values
        message = self._buffer()
        message[self.own] = values.to(message)
        self._sum(message)
        return (message / self.parts).to(values)

    def total(
        self, val: Tensor, direct: Sequence[Tensor | None], weighted: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """(ℓ_V, ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ) of the whole group from this process's terms."""
        if self.group is None:
            grads = self.problem.assemble([direct, weighted])
            return val, [g.to(h) for g, h in zip(grads, self.problem.hyperparameters)]
        # Σ over the processes: ∂ℓ_V/∂λ is there in each of them, a candidate in one (or, by parts of the batch, in each).
        scaled = [
            [None if g is None else g.double() / n for g in gs] for gs, n in ((direct, self.size), (weighted, self.parts))
        ]
        grads = self.problem.assemble(scaled)
        message = self._buffer()
        head, body = message[: self.size], message[self.size :]
        head[self.rank] = self.seed
        torch.cat([(val.double() / self.size).reshape(1).to(body), *(g.reshape(-1).to(body) for g in grads)], out=body)
        self._sum(message)
        self.seeds_seen = head
        total, *flat = body.split([1, *(g.numel() for g in grads)])
        total = torch.where((head == head[0]).all(), total[0], torch.nan)  # check_finite then raises, on every process
        return total.to(val), [f.view_as(h).to(h) for f, h in zip(flat, self.problem.hyperparameters)]

    def _buffer(self) -> Tensor:
        return torch.zeros(self.unsent[0], dtype=torch.float64, device=self.device)

    def _sum(self, message: Tensor) -> None:
        """The only way to the other processes."""
        later, self.unsent = self.unsent[1:], []  # if this fails, nobody is left to send to
        dist.all_reduce(message, group=self.group)
        self.unsent = later

    def __enter__(self) -> Shares:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, Exception) or self.group is None:
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


def _check(group, share: str, n_candidates: int, guided: bool) -> None:
    if share not in SHARES:
        raise ValueError(f"share={share!r} is unknown; accepted are {', '.join(map(repr, SHARES))}")
    if group is None:
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this process is in (torch.distributed.group.WORLD, once "
            f"init_process_group was called) or None, not {type(group).__name__}"
        )
    if share == "batch" and guided:
        raise ValueError(
            "share='batch' with noise='guided' would send a gradient of the model's size; use share='candidates', "
            "with the same batches in every process"
        )
    if share == "candidates" and n_candidates < dist.get_world_size(group):
        raise ValueError(
            f"n_candidates={n_candidates} cannot be shared out over {dist.get_world_size(group)} processes; "
            "at least one for each is needed"
        )
