"""EvoGrad: the hypergradient of a validation loss, from K perturbed copies of a model and first-order gradients alone.

Bohdal, Yang, Hospedales: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization", NeurIPS 2021,
arXiv 2106.10575.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .host.processes import Shares, norm
from .host.in_place import InPlace
from .operations.kinks import Kinks
from .noise import NOISES, Layout, NoiseFunction, Position, SeededNoise, draw_seeds
from .host.precision import Precision
from .host.problem import (
    Closure,
    Hypergradient,
    Parameters,
    Problem,
    Vector,
    check_count,
    check_finite,
    check_positive,
    estimator,
    partial,
)

STRATEGIES = ("stream", "in_place", "retain", "vmap")
RADIUS = 3e-6  # of guided candidates, over the norm of θ: where kinks are shared and in float32, small and large networks are right
UNRESOLVED = (
    "hyperparameters[{i}]: the gradients of two candidates by it differ by {apart:.2g} eps of {dtype}, so that the estimate for "
    "it is rounding in large part, if it acts on the parameters at all. Candidates further apart (noise='guided': radius, "
    "random: sigma), losses and hyperparameters in more digits, or evograd.mixed_mode, which takes no difference, resolve it"
)
RESOLVED = 8  # random candidates whose distance from θ, over its norm, is this many eps of low precision are told apart


@estimator
def hypergradient(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    parameters: Parameters = None,
    n_candidates: int = 2,
    sigma: float = 1e-3,
    temperature: float = 0.05,
    noise: str | NoiseFunction = "sign",
    radius: float | None = None,
    share_kinks: bool = True,
    strategy: str | None = None,
    chunk_size: int | None = None,
    common_random_numbers: bool = False,
    inner_lr: float | None = None,
    lookahead: Parameters | str = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    share: str | None = None,
) -> Hypergradient:
    """Estimate dℓ_V/dλ by EvoGrad.

    With θ the model's parameters, λ the hyperparameters, σ `sigma`, τ `temperature` and K `n_candidates`:

        1. perturb    θ_k = θ + σ ε_k,  k = 1..K
        2. evaluate   ℓ_k = ℓ_T(θ_k, λ)
        3. softmax    w = softmax(−ℓ / τ)
        4. combine    θ* = Σ_k w_k θ_k
        result        dℓ_V(θ*, λ)/dλ = ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ,  with c_k as in `loss_coefficients`

    The last line is the chain rule written out, so it is the same number as differentiating through steps 3 and 4, but
    only first-order gradients of one candidate at a time are ever needed.

    Args:
        train_loss: ℓ_T, a function of the model that returns a scalar. It is called once for each candidate, with `model`, in
            which the candidate's parameters stand in for its own; whatever depends on λ is computed inside of it.
        val_loss: ℓ_V, likewise.
        model: any torch.nn.Module. Its parameters, buffers, gradients, modes and flags are afterwards as before, and so are its
            modules' attributes, with the entries of their lists, dicts and sets. What a module reaches by other ways (objects of
            its own, globals) is not looked after: there a candidate sees what another one left.
        hyperparameters: tensors of any shape that require grad. They may be parameters of the model; they are not perturbed.
        parameters: the parameters to perturb: names, (name, tensor) pairs or a mapping. Tensors that are not the model's own
            are taken as θ in their place. Default: all that require grad and are no hyperparameters.
        n_candidates: K ≥ 2.
        sigma: σ > 0, the standard deviation of the perturbation of each parameter.
        temperature: τ > 0. With "guided", σ and τ set the scale alone, see `inner_lr`.
        noise: "sign" (the paper's, sign of N(0, 1)), "normal" (N(0, 1), the paper's 1-D illustration), "guided", or a function
            of (tensor, generator) that returns independent noise of the tensor's shape and unit variance, and the same again
            for the same state of the generator. "guided" goes beyond the paper: candidates θ ± r G/‖G‖ with G = ∂ℓ_V/∂θ, and
            weights at their limit 1/K, which makes the same four moves the central finite difference of the hypergradient
            through one SGD step (T1–T2). It holds one gradient of the model's size, gives the two candidates of each ± pair the
            same random draws, and has nothing to tune.
        radius: r > 0, how far guided candidates lie from θ. Default: 3e-6 ‖θ‖, which float32 resolves. In lower precision, of
            the parameters or by autocast, half of its eps times ‖θ‖ (bfloat16: 0.004 ‖θ‖), and 4 eps where θ is less than half
            of the parameters (adapters).
        share_kinks: let the second candidate of a guided pair run with the activation pattern of the first, see `evograd.operations.kinks`.
            A difference counts the jumps of ∂ℓ_T/∂λ where a ReLU or the maximum of a pool changes sides between the two, and
            T1–T2 does not.
        strategy: "stream" keeps one candidate at a time, and K gradients of λ's size: nothing of the model's size grows with
            K. "in_place" does the same in the model's own tensors: a candidate is written into them, the closure is evaluated
            on the very module (compiled, wrapped, held by the closure itself), and parameters and buffers are put back, the
            same bits, after an error too. What they were is kept, one copy. "retain" keeps the K graphs and takes one
            backward pass of Σ_k c_k ℓ_k: faster where λ is large. "vmap" evaluates all candidates in one batched pass
            (torch.func.vmap), K times the memory: faster where the model is small. Default: "stream"; "in_place", the only
            one there is, for a model that is sharded by FSDP2 (see below).
        chunk_size: how many candidates "vmap" batches at a time. Fewer than K bound its memory, and train_loss is then evaluated
            twice. Default: all.
        common_random_numbers: let every candidate draw the same random numbers from torch's generators (dropout, say).
        inner_lr: rescale the estimate to the inner learning rate η of T1–T2 hypergradients; the model's learning rate is what
            you want. For small σ the estimate's expectation is the T1–T2 hypergradient at η = σ² (K − 1) / (K τ), which is 1e-5 at
            the defaults: so small that Adam's eps may exceed it and SGD does not move. Default: that scale, the paper's.
        lookahead: where "guided" takes G: named parameters (those after the training step, say), or "sgd" for one SGD step of
            `inner_lr` on train_loss from θ, which costs a forward and a backward pass. Default: at θ. Where λ scales the step
            itself (a learning rate as a factor of the loss, a weight decay) only a lookahead sees a step that is too long.
        generator: a CPU generator that seeds are drawn from, those of the noise, and with `group` those of what closures draw.
            Default: torch's global one.
        group: a torch.distributed process group that shares out the work (`torch.distributed.group.WORLD` is that of all
            processes). Each calls with the same θ, λ and settings, and each gets the same result. See `share`. Default: this
            process does everything, or, with a sharded model, the processes that hold its shards do. K losses, K slopes and
            one gradient of λ's size cross the network, and nothing of θ's size.
        share: what the processes of the group divide. "candidates": all have the same batches, and each evaluates its part of
            the candidates, at least one, or one guided pair. The result is that of one process (to float32's rounding in
            "retain", to that of the result in "stream"), with the numbers that closures draw (dropout) seeded for each
            candidate, alike in every process. "batch": each closure is a mean over the process's own part of the batch, parts
            of equal size; all evaluate every candidate, and losses and gradients are averaged. Not for noise="guided": G of
            the whole batch has θ's size. Default: "candidates"; "batch", the only one there is, for a sharded model, guided
            too.

    Returns:
        Hypergradient: `grads` (aligned with `hyperparameters`), `val_loss` (), `candidate_losses` (K,), `weights` (K,).

    Raises:
        ValueError, TypeError: an argument out of its range, a radius that the losses' precision does not resolve, or a loss
            that is not a scalar.
        RuntimeError: a hyperparameter on which no loss depends, a loss or a gradient that is NaN or infinite, a loss that writes
            into the model's parameters, or that goes back to them and not to what stands in their place. With `group` also, in
            every process: a closure that raised in another one, or generators
            that disagree (no noise is sent, so it must be drawn alike: seed them alike). A process that dies is noticed by
            torch.distributed, at the latest after the timeout of its init_process_group; torchrun ends the others at once. Also
            while a CUDA graph is captured: seeds come from the host, and each replay would take the same directions.

    A model sharded by FSDP2 (torch.distributed.fsdp.fully_shard, over a mesh of one dimension, or of two for HSDP): every
    process calls, with closures that are means over its own part of the batch (equal parts), as it would for training. ε is
    drawn on each shard, by seeds of its own (replicas need torch seeded alike); ⟨G, ε⟩ and norms are summed over the shards;
    beyond what FSDP2 sends by itself, K losses, K slopes (guided: two norms) and one gradient of λ's size cross the network.
    λ are plain tensors, alike in all processes: a parameter of the model stays one by fully_shard(…, ignored_params={…}).
    Tensors of `parameters` and `lookahead` are DTensors, like the model's. Refused are a MixedPrecisionPolicy that computes
    in fewer digits than the parameters have, which does not resolve the candidates, plain parameters among θ, a call in the
    midst of gradient accumulation, and tensor parallelism. A closure that raises in one process alone leaves the others
    waiting in FSDP2, as in training: torchrun ends them.

    Candidates differ in loss by about σ‖∇ℓ_T‖: evaluate them in float32, not under autocast, and on CUDA without TF32
    (torch.backends.cudnn.allow_tf32, which is True by default, and torch.backends.cuda.matmul.allow_tf32); there is a warning
    where θ is on CUDA and one of them is on, and where random candidates are too close for lower precision. Guided ones take
    a radius that it resolves, and are then right to some percent; a smaller one that is given is an error. Autocast inside a
    compiled graph cannot be seen. There is a warning where the gradients of two candidates by some λ have never differed by
    8 eps: their difference is rounding then. What train_loss detaches, and depends on θ, is a constant to T1–T2 but differs between
    candidates; "guided" comes close to T1–T2 if it is computed once, at θ, and handed to all of them (the input of label
    noise's weight net, that of MetaXL's transformation).
    """
    guided = isinstance(noise, str) and noise == "guided"
    _check(n_candidates, sigma, temperature, noise, radius, strategy, chunk_size, inner_lr, lookahead, generator, group)
    in_place = None if strategy is None else strategy == "in_place"
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters, in_place)
    problem.check_differences()
    lam = problem.lam
    eta = sigma**2 * (n_candidates - 1) / (n_candidates * temperature)  # of the estimate as it comes

    precision = problem.precision
    with problem.undisturbed(), precision.watched(), Shares(problem, group, share, n_candidates, guided) as shares:
        # starts: states of torch's generators, by set of candidates that draw the same random numbers. One process fills
        # them as it goes; those of a group agree on them before.
        if guided:
            layout = Layout(problem.theta)
            starts = shares.starts(lambda: draw_seeds((), generator))
            start = starts.get(0)
            if lookahead == "sgd" and start is None:
                starts[0] = problem.draws.state()
            with problem.draws.replay(start):
                ahead = problem.lookahead(layout, lookahead, inner_lr)
            with problem.draws.replay(starts.get("validation")):
                val, direct, gradient = problem.val_gradient(layout, ahead)
            del ahead
            norms = shares.norms(gradient, [p for bucket in layout.buckets for p in bucket.tensors])
            relative = max(RADIUS, precision.radius)
            settings = (n_candidates, radius, relative, share_kinks, common_random_numbers)
            candidates = _Guided(layout, gradient, norms, *settings, problem.place)
            del gradient
        else:
            function = NOISES[noise] if isinstance(noise, str) else noise
            shard = problem.sharding.shard if problem.sharding else None
            epsilon = SeededNoise(function, problem.theta, n_candidates, generator, shard)
            starts = shares.starts(lambda: epsilon.first)
            candidates = _Random(epsilon, sigma, common_random_numbers)

        # 1. perturb, 2. evaluate
        losses, partials, streaming = [], [], strategy not in ("retain", "vmap")
        if strategy == "vmap":
            batched = _Batched(problem, candidates, shares.candidates, chunk_size)
            losses = [batched.losses()]
        for k in shares.candidates if strategy != "vmap" else ():
            alike = candidates.alike(k)
            start = starts.get(k if alike is None else alike)
            if start is None and alike is not None:
                starts[alike] = problem.draws.state()
            with problem.draws.replay(start), problem.at(candidates.parameters(k)), candidates.pattern(k):
                loss = problem.evaluate(train_loss)
                if streaming:  # the graph of this candidate ends here
                    partials.append(lam.flat(partial(loss, problem.hyperparameters)))
                    loss = loss.detach()
            losses.append(loss.reshape(1))
        losses = torch.cat(losses)

        # 3. softmax
        candidate_losses = shares.gather(losses.detach())
        weights = candidates.weights(candidate_losses, temperature)

        # 4. combine, and the slopes s_k = σ⟨∂ℓ_V/∂θ*, ε_k⟩, which give the chain rule's coefficients
        if guided:
            coefficients = candidates.coefficients(weights, eta if inner_lr is None else inner_lr)
        else:
            with problem.draws.replay(starts.get("validation")):
                val, direct, slopes = _validate_merged(problem, epsilon, weights, sigma, shares.candidates)
            coefficients = loss_coefficients(weights, shares.slopes(slopes), temperature)
            if inner_lr is not None:
                coefficients = coefficients * (inner_lr / eta)

        # the chain rule: ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ
        own = shares.of(coefficients)
        if streaming:
            weighted = lam.weighted_sum(own, partials)
        elif strategy == "vmap":
            weighted = batched.weighted_sum(own, losses, lam)
        else:
            weighted = lam.flat(partial((own * losses).sum(), problem.hyperparameters))
        val, total = shares.total(val, lam.flat(direct), weighted)
        grads = problem.grads(total)
        # Few parameters may get the same noise twice, and without G there is nothing to tell apart.
        differ = guided or epsilon.layout.n_parameters >= 64
        look = differ and streaming and not precision.low and shares.candidates[:2] == [0, 1]
        apart = lam.apart(*partials[:2], candidates.norm > 0 if guided else None) if look else []
        apart = check_finite(candidate_losses, val, grads, apart)
        if (i := problem.unresolved(apart, (noise, radius, sigma))) is not None:
            dtype = problem.hyperparameters[i].dtype
            warnings.warn(UNRESOLVED.format(i=i, apart=apart[i], dtype=dtype), stacklevel=3)  # past `estimator`
        if precision.low and not isinstance(val, FakeTensor):
            if guided:
                candidates.check_resolved(precision)
            elif sigma < (enough := RESOLVED * precision.eps * _root_mean_square(problem.theta.values())):
                warnings.warn(
                    f"losses are computed in {precision.dtype}, which does not resolve by how much candidates differ at "
                    f"sigma={sigma!r}: the estimate is rounding in large part. Evaluate them in float32, or take "
                    f"noise='guided' or sigma={1.1 * enough:.1g}",
                    stacklevel=3,  # past `estimator`
                )
    return Hypergradient(grads, val, candidate_losses, weights)


def candidate_weights(losses: Tensor, temperature: float) -> Tensor:
    """w = softmax(−ℓ / τ) over the candidates, dimension 0 of `losses` (K, …)."""
    return torch.softmax(-losses / temperature, dim=0)


def loss_coefficients(weights: Tensor, slopes: Tensor, temperature: float) -> Tensor:
    """c_k = dℓ_V(θ*)/dℓ_k = −(w_k / τ) (s_k − Σ_j w_j s_j), with w `weights` and s `slopes`, both (K, …). They sum to zero.

    s_k = dℓ_V/dw_k = ⟨∂ℓ_V/∂θ*, θ_k − θ⟩; what is common to all candidates cancels.
    """
    return -(weights / temperature) * (slopes - (weights * slopes).sum(0))


class _Random:
    """θ_k = θ + σ ε_k with independent noise."""

    def __init__(self, epsilon: SeededNoise, sigma: float, common: bool):
        self.epsilon, self.sigma, self.common = epsilon, sigma, common

    def parameters(self, k: int) -> Position:
        layout = self.epsilon.layout
        return layout.moved(self.epsilon.scaled(k, b, self.sigma) for b in range(len(layout.buckets)))

    def alike(self, k: int) -> int | None:
        """Which candidates draw the same random numbers as this one; None: no other ever does."""
        return 0 if self.common else None

    def pattern(self, k: int) -> AbstractContextManager:
        return nullcontext()

    weights = staticmethod(candidate_weights)


class _Guided:
    """θ_k = θ ± r G/‖G‖, and θ itself for the last of an odd number: central differences along G, in pairs.

    Candidates in place need G for the first of them alone: the model holds the step then, and the others take it from there.
    """

    def __init__(
        self,
        layout: Layout,
        gradient: list[Tensor | None],
        norms: Sequence[Tensor],
        n_candidates: int,
        radius: float | None,
        relative: float,
        share_kinks: bool,
        common: bool,
        place: InPlace | None,
    ):
        self.layout, self.gradient, self.n_candidates = layout, gradient, n_candidates
        self.share_kinks, self.common = share_kinks, common
        self.place, self.held = place, 0  # held: the sign of the step that the model holds
        self.norm, self.size = norms  # of G and θ
        self.chosen = relative if radius is None else None
        if radius is None:
            self.radius = relative * torch.where(self.size > 0, self.size, 1)
        else:
            self.radius = torch.full_like(self.norm, radius)
        self.step = torch.where(self.norm > 0, self.radius / self.norm, 0)  # no gradient, no direction: candidates are θ itself
        self.kinks: Kinks | None = None  # of the pair that is evaluated

    def check_resolved(self, precision: Precision) -> None:
        """Errors where the two of a pair are so close that their difference is rounding."""
        if self.chosen is not None and self.chosen < precision.radius:
            raise RuntimeError(
                f"train_loss is computed in {precision.dtype}, and val_loss in more digits, by which the radius was chosen; "
                f"give radius={precision.radius * self.size.item():.2g}, or let both run in the same"
            )
        given, least = self.radius.item(), precision.eps / 4 * self.size.item()
        if self.chosen is None and given < least:
            raise ValueError(
                f"radius={given:.2g} is not resolved by {precision.dtype}, in which losses are computed: at least {least:.2g} "
                "is needed for parameters of this norm; radius=None chooses one"
            )

    def amplitude(self, k: int) -> int:
        return 0 if k == self.n_candidates - 1 and k % 2 == 0 else (1, -1)[k % 2]

    def parameters(self, k: int) -> Position:
        for b, bucket in enumerate(self.layout.buckets):
            if self.held:
                flat = self.place.displacement(bucket).mul_(self.held * self.amplitude(k))
            else:
                flat, gradient = bucket.empty(), self.gradient[b]
                torch.mul(gradient, (self.amplitude(k) * self.step).to(gradient), out=flat[: gradient.numel()])
                if self.place is not None:
                    self.gradient[b] = gradient = None
            yield bucket.moved(flat)
            del flat
        if self.place is not None:
            self.held = self.amplitude(k)

    def alike(self, k: int) -> int:
        return 0 if self.common else min(k // 2, self.n_candidates // 2 - 1)

    def pattern(self, k: int) -> AbstractContextManager:
        if not self.share_kinks or self.amplitude(k) == 0:
            return nullcontext()
        if k % 2 == 0:
            self.kinks = Kinks()
            return self.kinks.record()
        return self.kinks.replay()

    def weights(self, losses: Tensor, temperature: float) -> Tensor:
        """Their limit for a small radius."""
        return torch.full_like(losses, 1 / len(losses))

    def coefficients(self, weights: Tensor, inner_lr: float) -> Tensor:
        """∓ η ‖G‖ / 2r, averaged over the pairs: what c_k tends to, at the scale of `inner_lr`."""
        signs = torch.arange(self.n_candidates, device=weights.device, dtype=weights.dtype).remainder_(2).mul_(2).sub_(1)
        if self.n_candidates % 2:
            signs[-1:].zero_()
        return signs * (inner_lr * self.norm / (2 * self.radius * (self.n_candidates // 2))).to(weights)


class _Batched:
    """All candidates, or chunks of them, in one pass by torch.func.vmap."""

    def __init__(self, problem: Problem, candidates: _Random, of: Sequence[int], chunk_size: int | None):
        self.problem, self.candidates = problem, candidates
        size = len(of) if chunk_size is None else chunk_size
        self.chunks = [of[start : start + size] for start in range(0, len(of), size)]
        self.starts: list[list[Tensor]] = []

    def losses(self) -> Tensor:
        """ℓ_k of all candidates, with their graph if it is one chunk."""
        if len(self.chunks) == 1:
            return self._evaluate(self.chunks[0])
        losses = []
        for chunk in self.chunks:
            again = self.starts[0] if self.starts and self.candidates.common else None  # the first chunk draws anew
            self.starts.append(again or self.problem.draws.state())
            with self.problem.draws.replay(again), torch.no_grad():
                losses.append(self._evaluate(chunk))
        return torch.cat(losses)

    def weighted_sum(self, coefficients: Tensor, losses: Tensor, lam: Vector) -> Vector.Flat:
        """Σ_k c_k ∂ℓ_k/∂λ."""
        if len(self.chunks) == 1:
            return lam.flat(partial((coefficients * losses).sum(), lam.tensors))
        total = None
        for chunk, start, own in zip(self.chunks, self.starts, coefficients.split(len(self.chunks[0]))):
            with self.problem.draws.replay(start):
                term = lam.flat(partial((own * self._evaluate(chunk)).sum(), lam.tensors))
            total = term if total is None else lam.add(total, term)
        return total

    def _evaluate(self, chunk: Sequence[int]) -> Tensor:
        epsilon, problem = self.candidates.epsilon, self.problem
        stacked = {}
        for b, bucket in enumerate(epsilon.layout.buckets):
            flat = bucket.empty(len(chunk))
            for row, k in zip(flat, chunk):
                epsilon.scaled(k, b, self.candidates.sigma, out=row)
            stacked.update(bucket.moved(flat))
        buffers = [b.expand(len(chunk), *b.shape).clone() for b in problem.slots.buffers.values()]

        def loss(parameters: dict[str, Tensor], buffers: list[Tensor]) -> Tensor:
            with problem.holding(parameters, buffers):
                return problem.evaluate(problem.train_loss)

        randomness = "same" if self.candidates.common else "different"
        try:
            return torch.func.vmap(loss, randomness=randomness)(stacked, buffers)
        except RuntimeError as error:
            if "vmap" not in str(error) and "batch" not in str(error).lower():
                raise
            raise RuntimeError(
                f"strategy='vmap' cannot batch an operation of train_loss: {str(error).splitlines()[0]} "
                "Use strategy='stream', which takes any operation, or write the operation without it"
            ) from error


def _root_mean_square(tensors: Iterable[Tensor]) -> float:
    tensors = [t for t in tensors if t.numel()]
    return norm(tensors).item() / max(1, sum(t.numel() for t in tensors)) ** 0.5


def _validate_merged(
    problem: Problem, epsilon: SeededNoise, weights: Tensor, sigma: float, candidates: Sequence[int]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """(ℓ_V, ∂ℓ_V/∂λ, s_k of `candidates`) at θ* = Σ_k w_k θ_k, over all k.

    The gradient by θ* never exists whole: its part of every s_k is taken bucket by bucket, as the backward pass comes to it.
    """
    dots: list[list[Tensor]] = [[] for _ in candidates]

    def take(b: int, gradient: Tensor) -> None:
        for own, k in zip(dots, candidates):
            for part, noise in epsilon.pieces(k, b):
                piece = gradient[part]
                own.append(torch.dot(piece, noise[: len(piece)]).to(weights))

    val, direct = problem.gradient(problem.val_loss, epsilon.layout, _merged(epsilon, weights, sigma), take)
    problem.check_validation(bool(dots[0]), direct)
    if not dots[0]:
        return val, direct, weights.new_zeros(len(candidates))
    flat = torch.stack([dot for own in dots for dot in own])
    return val, direct, sigma * (flat if len(flat) == len(candidates) else flat.view(len(candidates), -1).sum(1))


def _merged(epsilon: SeededNoise, weights: Tensor, sigma: float) -> Position:
    """θ* = θ + σ Σ_k w_k ε_k."""
    for b, bucket in enumerate(epsilon.layout.buckets):
        flat = bucket.zeros()
        for k, weight in enumerate(weights.to(flat)):
            for part, noise in epsilon.pieces(k, b):
                flat[part].addcmul_(noise, weight, value=sigma)
        yield bucket.moved(flat)
        del flat


def _check(
    n_candidates, sigma, temperature, noise, radius, strategy, chunk_size, inner_lr, lookahead, generator, group
) -> None:
    if not isinstance(n_candidates, Integral) or n_candidates < 2:
        raise ValueError(
            f"n_candidates={n_candidates!r} must be an integer of at least 2: with one candidate the softmax is constant"
        )
    for name, value in {"sigma": sigma, "temperature": temperature}.items():
        check_positive(name, value)
    for name, value in {"inner_lr": inner_lr, "radius": radius}.items():
        if value is not None:
            check_positive(name, value)
    accepted = [*NOISES, "guided"]
    if not callable(noise) and noise not in accepted:
        raise ValueError(
            f"noise={noise!r} is unknown; accepted are {', '.join(map(repr, accepted))} or a function of (tensor, generator)"
        )
    guided = not callable(noise) and noise == "guided"
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; accepted are {', '.join(map(repr, STRATEGIES))}")
    if guided and strategy == "vmap":
        raise ValueError(
            "strategy='vmap' evaluates candidates at once, but the two of a pair of noise='guided' run one after the other, "
            "since they share their kinks; accepted are 'stream', 'in_place' and 'retain'"
        )
    if chunk_size is not None:
        if strategy != "vmap":
            raise ValueError(f"chunk_size is of strategy='vmap'; it has no meaning with strategy={strategy!r}")
        check_count("chunk_size", chunk_size)
    if not guided:
        for name, value in {"lookahead": lookahead, "radius": radius}.items():
            if value is not None:
                what = "where noise='guided' takes its gradient" if name == "lookahead" else "how far guided candidates lie from θ"
                raise ValueError(f"{name} is {what}; it has no meaning with noise={noise!r}")
    if generator is not None:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            given = f"on {generator.device}" if isinstance(generator, torch.Generator) else type(generator).__name__
            raise ValueError(
                f"generator is {given}; it must be a torch.Generator on the CPU, since seeds are drawn on the host"
            )
        if guided and group is None:
            raise ValueError("generator is what random noise draws from; noise='guided' draws nothing")
