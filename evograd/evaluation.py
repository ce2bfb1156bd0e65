"""How candidates are evaluated: one at a time, with their graphs kept, or all in one batched pass.

An evaluation has two moves: `losses` evaluates ℓ_k = ℓ_T(θ_k, λ), and `gradient` gives Σ_k c_k ∂ℓ_k/∂λ for coefficients that are
known only afterwards. What it evaluates are candidates, an object with

    position(k)   θ_k, bucket by bucket
    alike(k)      by whose random numbers it draws; None: by no other's
    pattern(k)    a block in which it is evaluated

In place is no evaluation of its own: there the model's own tensors hold the candidate (`evograd.host.in_place`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial as partial_call

import torch
from torch import Tensor

from .host.draws import Occasions
from .host.gathering import partial
from .host.problem import Problem
from .host.vectors import Vector


class Stream:
    """One candidate at a time: its graph ends when its gradient by λ is taken. Nothing of the model's size grows with K."""

    def __init__(self, problem: Problem, candidates, of: Sequence[int], occasions: Occasions):
        self.problem, self.candidates, self.of, self.occasions = problem, candidates, of, occasions
        self.partials: list[Vector.Flat] = []

    def losses(self) -> Tensor:
        """(len(of),), without a graph."""
        losses = []
        for k in self.of:
            with self.at(k):
                losses.append(self.taken(self.problem.evaluate(self.problem.train_loss)).reshape(1))
        return torch.cat(losses)

    def taken(self, loss: Tensor) -> Tensor:
        """A candidate's loss, after what is wanted of its graph was taken."""
        self.partials.append(self.problem.lam.flat(partial(loss, self.problem.hyperparameters, self.problem.keeps)))
        return loss.detach()

    @contextmanager
    def at(self, k: int) -> Iterator[None]:
        """The model at a candidate. Its backward pass belongs in here: of a checkpointed network it is a forward pass too."""
        alike = self.candidates.alike(k)
        draws = self.occasions.of(k if alike is None else alike, again=alike is not None)
        with draws, self.problem.at(self.candidates.position(k)), self.candidates.pattern(k):
            yield

    def gradient(self, coefficients: Tensor) -> Vector.Flat:
        """Σ_k c_k ∂ℓ_k/∂λ over `of`."""
        return self.problem.lam.weighted_sum(coefficients, self.partials)

    def first_two(self) -> list[Vector.Flat]:
        """Gradients by λ of candidates 0 and 1, where this process has them each by itself."""
        return self.partials[:2] if list(self.of[:2]) == [0, 1] else []


class Retain(Stream):
    """K graphs, and one backward pass of Σ_k c_k ℓ_k: faster where λ is large."""

    def losses(self) -> Tensor:
        self.kept = super().losses()
        return self.kept.detach()

    def taken(self, loss: Tensor) -> Tensor:
        return loss

    def gradient(self, coefficients: Tensor) -> Vector.Flat:
        return self.problem.lam.flat(partial((coefficients * self.kept).sum(), self.problem.hyperparameters))


class Vmap(Stream):
    """All candidates, or chunks of them, in one pass by torch.func.vmap: faster where the model is small.

    More chunks than one bound the memory: they are evaluated without a graph, and once more when the coefficients are known.
    """

    def __init__(self, *settings, chunk_size: int | None = None):
        super().__init__(*settings)
        size = chunk_size or len(self.of)
        self.chunks = [self.of[start : start + size] for start in range(0, len(self.of), size)]
        self.kept: Tensor | None = None

    def losses(self) -> Tensor:
        if len(self.chunks) == 1:
            self.kept = self._batched(self.chunks[0])
            return self.kept.detach()
        losses = []
        for i, chunk in enumerate(self.chunks):
            with self._drawn(i, first=True), torch.no_grad():
                losses.append(self._batched(chunk))
        return torch.cat(losses)

    def gradient(self, coefficients: Tensor) -> Vector.Flat:
        lam = self.problem.lam
        if self.kept is not None:
            return lam.flat(partial((coefficients * self.kept).sum(), lam.tensors))
        total = lam.flat([None] * len(lam.tensors))
        for i, (chunk, own) in enumerate(zip(self.chunks, coefficients.split(len(self.chunks[0])))):
            with self._drawn(i):
                total = lam.add(total, lam.flat(partial((own * self._batched(chunk)).sum(), lam.tensors)))
        return total

    def _drawn(self, i: int, first: bool = False):
        """A chunk draws the same when it is evaluated again; with common random numbers all draw what the first one does."""
        key = "chunk", 0 if self.candidates.common else i
        return self.occasions.of(key, again=first)

    def _batched(self, chunk: Sequence[int]) -> Tensor:
        problem = self.problem
        buffers = [b.expand(len(chunk), *b.shape).clone() for b in problem.slots.buffers.values()]

        def loss(parameters: dict[str, Tensor], buffers: list[Tensor]) -> Tensor:
            with problem.holding(parameters, buffers):
                return problem.evaluate(problem.train_loss)

        randomness = "same" if self.candidates.common else "different"
        try:
            return torch.func.vmap(loss, randomness=randomness)(self.candidates.stacked(chunk), buffers)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batch" not in str(error).lower():
                raise
            raise RuntimeError(
                f"strategy='vmap' cannot batch an operation of train_loss: {str(error).splitlines()[0]} "
                "Use strategy='stream', which takes any operation, or write the operation without it"
            ) from error


EVALUATIONS: dict[str | None, Callable[..., Stream]] = {
    None: Stream, "stream": Stream, "in_place": Stream, "retain": Retain, "vmap": Vmap
}  # fmt: skip
STRATEGIES = tuple(name for name in EVALUATIONS if name)


def evaluation_by(strategy: str | None, chunk_size: int | None = None) -> Callable[..., Stream]:
    return EVALUATIONS[strategy] if chunk_size is None else partial_call(Vmap, chunk_size=chunk_size)


def in_place(strategy: str | None) -> bool | None:
    """Whether candidates are to stand in the model's own tensors; None: where they must, in a sharded model."""
    return None if strategy is None else strategy == "in_place"
