"""EvoGrad: the hypergradient of a validation loss, from K perturbed copies of a model and first-order gradients alone.

Bohdal, Yang, Hospedales: "EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization", NeurIPS 2021,
arXiv 2106.10575.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Shares
from .noise import NOISES, GuidedNoise, NoiseFunction, SeededNoise, draw_seeds
from .problem import Closure, Hypergradient, Parameters, Problem, check_finite, check_positive, partial

STRATEGIES = ("stream", "retain")


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
    strategy: str = "stream",
    common_random_numbers: bool = False,
    inner_lr: float | None = None,
    lookahead: Parameters | str = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    share: str = "candidates",
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
        model: any torch.nn.Module. Its parameters, buffers, gradients, modes and flags are afterwards as before.
        hyperparameters: tensors of any shape that require grad. They may be parameters of the model; they are not perturbed.
        parameters: the parameters to perturb: names, (name, tensor) pairs or a mapping. Tensors that are not the model's own
            are taken as θ in their place. Default: all that require grad and are no hyperparameters.
        n_candidates: K ≥ 2.
        sigma: σ > 0, the standard deviation of the perturbation of each parameter.
        temperature: τ > 0.
        noise: "sign" (the paper's, sign of N(0, 1)), "normal" (N(0, 1), the paper's 1-D illustration), "guided", or a function
            of (tensor, generator) that returns independent noise of the tensor's shape and unit variance, and the same again
            for the same state of the generator. "guided" goes beyond the paper: ε_k = ±√P G/‖G‖, with G = ∂ℓ_V/∂θ over all P
            perturbed parameters, which makes the same four moves the central finite difference of the hypergradient through
            one SGD step (T1–T2). It holds one gradient of the model's size, and gives the two candidates of each ± pair the
            same random draws. Its candidates are σ√P from θ: if `weights` come out near 0 and 1, raise τ or lower σ.
        strategy: "stream" keeps one candidate at a time, and K gradients of λ's size: nothing of the model's size grows with K.
            "retain" keeps the K graphs and takes one backward pass of Σ_k c_k ℓ_k: faster where λ is large.
        common_random_numbers: let every candidate draw the same random numbers from torch's generators (dropout, say).
        inner_lr: rescale the estimate to the inner learning rate of T1–T2 hypergradients. For small σ its expectation is the
            T1–T2 hypergradient at inner learning rate σ² (K − 1) / (K τ), or σ² P / τ if guided (K even). Default: that scale.
        lookahead: where "guided" takes G: named parameters (those after the training step, say), or "sgd" for one SGD step of
            `inner_lr` on train_loss from θ. Default: at θ.
        generator: a CPU generator that seeds are drawn from, those of the noise, and with `group` those of what closures draw.
            Default: torch's global one.
        group: a torch.distributed process group that shares out the work (`torch.distributed.group.WORLD` is that of all
            processes). Each calls with the same θ, λ and settings, and each gets the same result. See `share`. Default: this
            process does everything. K losses, K slopes and one gradient of λ's size cross the network, and nothing of θ's size.
        share: what the processes of the group divide. "candidates": all have the same batches, and each evaluates its part of
            the candidates, at least one. The result is that of one process (to float32's rounding in "retain", to that of the
            result in "stream"), with the numbers that closures draw (dropout) seeded for each candidate, alike in every
            process. "batch": each closure is a mean over the process's own part of the batch, parts of equal size; all evaluate
            every candidate, and losses and gradients are averaged. Not for noise="guided": G of the whole batch has θ's size.

    Returns:
        Hypergradient: `grads` (aligned with `hyperparameters`), `val_loss` (), `candidate_losses` (K,), `weights` (K,).

    Raises:
        ValueError, TypeError: an argument out of its range, or a loss that is not a scalar.
        RuntimeError: a hyperparameter on which no loss depends, or a loss that is NaN or infinite. With `group` also, in every
            process: a closure that raised in another one, or generators that disagree (no noise is sent, so it must be drawn
            alike: seed them alike). A process that dies is noticed by torch.distributed, at the latest after the timeout of
            its init_process_group; torchrun ends the others at once.

    Candidates differ in loss by about σ‖∇ℓ_T‖: evaluate them in float32, not under autocast. What train_loss detaches, and
    depends on θ, is a constant to T1–T2 but differs between candidates; "guided" comes close to T1–T2 if it is computed once,
    at θ, and handed to all of them (the input of label noise's weight net, that of MetaXL's transformation).
    """
    _check(n_candidates, sigma, temperature, noise, strategy, inner_lr, lookahead, generator, group)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters)
    theta, guided = problem.theta, noise == "guided"

    with problem.undisturbed(), Shares(problem, group, share, n_candidates, guided) as shares:
        # starts: states of torch's generators, by set of candidates that draw the same random numbers. One process fills
        # them as it goes; those of a group agree on them before.
        if guided:
            starts = shares.starts(lambda: draw_seeds((), generator))
            start = starts.get(0)
            if lookahead == "sgd" and start is None:
                starts[0] = problem.random_state()
            with problem.replay(start):
                ahead = problem.lookahead(lookahead, inner_lr)
            with problem.replay(starts.get("validation")):
                val, direct, gradient = problem.val_gradient(ahead)
            epsilon = GuidedNoise(gradient, n_candidates)
        else:
            epsilon = SeededNoise(NOISES[noise] if isinstance(noise, str) else noise, theta, n_candidates, generator)
            starts = shares.starts(lambda: next(iter(epsilon.seeds[0].values())))

        # 1. perturb, 2. evaluate
        losses, partials = [], []
        for k in shares.candidates:
            alike = 0 if common_random_numbers else min(k // 2, n_candidates // 2 - 1) if guided else k
            start = starts.get(alike)
            if start is None and (guided or common_random_numbers):
                starts[alike] = problem.random_state()
            with problem.replay(start):
                loss = problem.loss(
                    train_loss, {name: torch.add(p, epsilon(k, name), alpha=sigma) for name, p in theta.items()}
                )
            if strategy == "stream":  # the graph of this candidate ends here
                partials.append(partial(loss, problem.hyperparameters))
                loss = loss.detach()
            losses.append(loss)

        # 3. softmax
        candidate_losses = shares.gather(torch.stack([loss.detach() for loss in losses]))
        weights = candidate_weights(candidate_losses, temperature)

        # 4. combine, and the slopes s_k = σ⟨∂ℓ_V/∂θ*, ε_k⟩
        if guided:
            slopes = sigma * epsilon.slopes.to(weights)[shares.own]
        else:
            with problem.replay(starts.get("validation")):
                val, direct, slopes = _validate_merged(problem, epsilon, weights, sigma, shares.candidates)
        slopes = shares.gather(slopes)

        # the chain rule: ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ
        coefficients = loss_coefficients(weights, slopes, temperature)
        if inner_lr is not None:
            spread = epsilon.mean_square * epsilon.n_parameters if guided else 1 - 1 / n_candidates
            coefficients = coefficients * (inner_lr * temperature / (sigma**2 * spread))
        own = coefficients[shares.own]
        if strategy == "stream":
            weighted = [_weighted_sum(own, gs) for gs in zip(*partials)]
        else:
            weighted = partial((own * torch.stack(losses)).sum(), problem.hyperparameters)
        val, grads = shares.total(val, direct, weighted)
        check_finite(candidate_losses, val)
    return Hypergradient(grads, val, candidate_losses, weights)


def candidate_weights(losses: Tensor, temperature: float) -> Tensor:
    """w = softmax(−ℓ / τ) over the candidates, dimension 0 of `losses` (K, …)."""
    return torch.softmax(-losses / temperature, dim=0)


def loss_coefficients(weights: Tensor, slopes: Tensor, temperature: float) -> Tensor:
    """c_k = dℓ_V(θ*)/dℓ_k = −(w_k / τ) (s_k − Σ_j w_j s_j), with w `weights` and s `slopes`, both (K, …). They sum to zero.

    s_k = dℓ_V/dw_k = ⟨∂ℓ_V/∂θ*, θ_k − θ⟩; what is common to all candidates cancels.
    """
    return -(weights / temperature) * (slopes - (weights * slopes).sum(0))


def _validate_merged(
    problem: Problem, epsilon: SeededNoise, weights: Tensor, sigma: float, candidates: Sequence[int]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """(ℓ_V, ∂ℓ_V/∂λ, s_k of `candidates`) at θ* = Σ_k w_k θ_k, over all k.

    The gradient by θ* never exists whole: a hook on each merged tensor takes its part of every s_k as soon as the backward
    pass has that tensor's gradient, and hands on an empty view in its place.
    """
    slopes = weights.new_zeros(len(candidates))

    def combine(name: str) -> Tensor:
        merged = problem.theta[name].clone()
        for k, weight in enumerate(weights):
            merged.addcmul_(epsilon(k, name), weight.to(merged), value=sigma)

        def take_slopes(gradient: Tensor) -> Tensor:
            for slope, k in zip(slopes, candidates):
                dot = torch.dot(gradient.reshape(-1), epsilon(k, name).reshape(-1))
                slope.add_(dot.to(slope), alpha=sigma)
            return gradient.new_zeros(()).expand_as(gradient)

        merged.requires_grad_().register_hook(take_slopes)
        return merged

    merged = {name: combine(name) for name in problem.theta}
    val = problem.loss(problem.val_loss, merged)
    direct = partial(val, [*problem.hyperparameters, *merged.values()])[: len(problem.hyperparameters)]
    return val.detach(), direct, slopes


def _weighted_sum(coefficients: Tensor, grads: Sequence[Tensor | None]) -> Tensor | None:
    """Σ_k c_k ∂ℓ_k/∂λ for one hyperparameter; None where no candidate's loss depends on it.

    In float64, where the device has it: the c_k sum to zero, and what is left may be a thousandth of the terms.
    """
    total = None
    for c, g in zip(coefficients, grads):
        if g is not None:
            term = c.to(g.device, g.dtype if g.is_mps else torch.float64).view([1] * g.ndim) * g
            total = term if total is None else total.add_(term)
    return total


def _check(n_candidates, sigma, temperature, noise, strategy, inner_lr, lookahead, generator, group) -> None:
    if not isinstance(n_candidates, Integral) or n_candidates < 2:
        raise ValueError(
            f"n_candidates={n_candidates!r} must be an integer of at least 2: with one candidate the softmax is constant"
        )
    check_positive("sigma", sigma)
    check_positive("temperature", temperature)
    if inner_lr is not None:
        check_positive("inner_lr", inner_lr)
    accepted = [*NOISES, "guided"]
    if not callable(noise) and noise not in accepted:
        raise ValueError(
            f"noise={noise!r} is unknown; accepted are {', '.join(map(repr, accepted))} or a function of (tensor, generator)"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; accepted are {', '.join(map(repr, STRATEGIES))}")
    if lookahead is not None and noise != "guided":
        raise ValueError(f"lookahead is where noise='guided' takes its gradient; it has no meaning with noise={noise!r}")
    if generator is not None:
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            given = f"on {generator.device}" if isinstance(generator, torch.Generator) else type(generator).__name__
            raise ValueError(
                f"generator is {given}; it must be a torch.Generator on the CPU, since seeds are drawn on the host"
            )
        if noise == "guided" and group is None:
            raise ValueError("generator is what random noise draws from; noise='guided' draws nothing")
