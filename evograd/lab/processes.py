"""What a training script needs to run in several processes, as torchrun starts them."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

Batch = TypeVar("Batch")


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
        return tqdm(*iterable, mininterval=1, **settings, **({"disable": True} if self.rank else {}))

    def part(self, batch: Tensor, dim: int = 0) -> Tensor:
        """This process's part of a batch, one of `size` equal ones in their order."""
        if self.size == 1:
            return batch
        self.check_equal_parts(batch.shape[dim], "samples")
        return batch.chunk(self.size, dim)[self.rank]

    def divide(self, batch: Batch, share: str | None, part: Callable[[Batch], Batch] | None = None) -> tuple[Batch, Batch]:
        """(what this process trains on, what its estimator sees): its part of the batch, and by `share` that or the whole.

        batch: a tuple of tensors, or whatever `part` makes this process's part of.
        """
        if self.size == 1:
            return batch, batch
        own = tuple(map(self.part, batch)) if part is None else part(batch)
        return own, own if share == "batch" else batch

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
    if device.type == "cuda":  # the one that `cli.device` has made the current one: NCCL would have to guess
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")
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
