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

from .evaluation import STRATEGIES, evaluation_by, in_place
from .host import processes
from .host.checks import Closure, Parameters, check_choice, check_count, check_differences, check_positive, check_rate
from .host.draws import unseeded
from .host.problem import Problem
from .host.result import Hypergradient, estimator, looked_at
from .noise import NOISES, NoiseFunction, Perturbed, SeededNoise


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
    common_random_numbers: bool = False,
    inner_lr: float | None = None,
    strategy: str | None = None,
    chunk_size: int | None = None,
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

    The last line is the chain rule written out: the same number as differentiating through steps 3 and 4, from first-order
    gradients of one candidate at a time. The model, its buffers, gradients, modes and flags are afterwards as before.

    Args:
        train_loss: ℓ_T, a function of the model that returns a scalar. It is called once for each candidate, with `model`, in
            which the candidate's parameters stand in for its own; whatever depends on λ is computed inside of it.
        val_loss: ℓ_V, likewise.
        model: any torch.nn.Module; one that FSDP2 has sharded too, see "Sharded models" in evograd/README.md.
        hyperparameters: tensors of any shape that require grad. They may be parameters of the model; they are not perturbed.
        parameters: the parameters to perturb: names, (name, tensor) pairs or a mapping. Tensors that are not the model's own
            are taken as θ in their place. Default: all that require grad and are no hyperparameters.
        n_candidates: K ≥ 2.
        sigma: σ > 0, the standard deviation of the perturbation of each parameter.
        temperature: τ > 0.
        noise: "sign" (the paper's, sign of N(0, 1)), "normal" (N(0, 1), the paper's 1-D illustration), or a function of
            (tensor, generator) that returns independent noise of the tensor's shape and unit variance, and the same again for
            the same state of the generator.
        common_random_numbers: every candidate draws the same random numbers from torch's generators (dropout, say).
        inner_lr: rescale the estimate to the inner learning rate η of T1–T2. For small σ its expectation is T1–T2's
            hypergradient at η = σ² (K − 1) / (K τ), 1e-5 at the defaults. Default: that scale, the paper's.
        strategy: "stream" keeps one candidate at a time; "in_place" does so in the model's own tensors (compiled, wrapped,
            held by the closure itself), the default and only one of a sharded model; "retain" keeps K graphs for one
            backward pass, faster where λ is large; "vmap" batches all candidates, faster where the model is small.
            Default: "stream".
        chunk_size: how many candidates "vmap" batches at a time. Fewer than K bound its memory, and evaluate train_loss twice.
        generator: a CPU generator for the seeds of the noise. Default: torch's global one.
        group: a torch.distributed process group whose processes share the work. Each calls with the same θ, λ and settings,
            and gets the same result. K losses, K slopes and one gradient of λ's size cross the network.
        share: "candidates" (the default): all have the same batches, and each evaluates its part of the candidates. "batch":
            each closure is a mean over the process's own part of the batch, of equal size.

    Returns:
        Hypergradient: `grads` (aligned with `hyperparameters`), `val_loss` (), `candidate_losses` (K,), `weights` (K,).

    Raises:
        ValueError, TypeError: an argument out of its range, or a loss that is not a scalar.
        RuntimeError: no loss depends on a hyperparameter; a loss or gradient is not finite; a loss writes into parameters, or
            goes back to the model's own; a process of the group failed, or drew other noise; a CUDA graph is being captured.

    Candidates differ in loss by about σ‖∇ℓ_T‖: evaluate them in float32, see "Lower precision" in evograd/README.md. A warning
    tells where the difference is rounding.
    """
    _check(n_candidates, sigma, temperature, noise, strategy, chunk_size, inner_lr, generator)
    problem = Problem(train_loss, val_loss, model, hyperparameters, parameters, in_place(strategy))
    check_differences(problem.theta)
    processes.check(problem, group, share)
    processes.check_candidates(problem, group, share, n_candidates)
    scale = 1 if inner_lr is None else inner_lr / inner_learning_rate(n_candidates, sigma, temperature)

    sharing = processes.team(problem, group, share, n_candidates, [("gather", n_candidates), ("slopes", n_candidates)])
    with problem.undisturbed(), problem.precision.watched(), sharing as team, unseeded(model, generator) as seeds:
        epsilon = SeededNoise(noise, problem.layout, n_candidates, seeds, problem.shard)
        occasions = team.occasions(lambda: epsilon.first)

        candidates = Perturbed(epsilon, sigma, common_random_numbers)  # 1. perturb: θ_k = θ + σ ε_k
        evaluation = evaluation_by(strategy, chunk_size)(problem, candidates, team.candidates, occasions)
        losses = team.gather(evaluation.losses())  # 2. evaluate: ℓ_k = ℓ_T(θ_k, λ)
        weights = candidate_weights(losses, temperature)  # 3. softmax: w = softmax(−ℓ / τ)
        with occasions.of("validation"):  # 4. combine: θ* = Σ_k w_k θ_k, and there the slopes s_k = σ⟨∂ℓ_V/∂θ*, ε_k⟩
            val, direct, slopes = _validate(problem, candidates, weights, team.candidates)

        # the chain rule: dℓ_V/dλ = ∂ℓ_V/∂λ + Σ_k c_k ∂ℓ_k/∂λ
        coefficients = scale * loss_coefficients(weights, team.slopes(slopes), temperature)
        val, total = team.total(val, problem.lam.flat(direct), evaluation.gradient(team.of(coefficients)))
        return looked_at(Hypergradient(problem.grads(total), val, losses, weights), problem, evaluation, candidates)


def candidate_weights(losses: Tensor, temperature: float) -> Tensor:
    """w = softmax(−ℓ / τ) over the candidates, dimension 0 of `losses` (K, …)."""
    return torch.softmax(-losses / temperature, dim=0)


def loss_coefficients(weights: Tensor, slopes: Tensor, temperature: float) -> Tensor:
    """c_k = dℓ_V(θ*)/dℓ_k = −(w_k / τ) (s_k − Σ_j w_j s_j), with w `weights` and s `slopes`, both (K, …). They sum to zero.

    s_k = dℓ_V/dw_k = ⟨∂ℓ_V/∂θ*, θ_k − θ⟩; what is common to all candidates cancels.
    """
    return -(weights / temperature) * (slopes - (weights * slopes).sum(0))


def inner_learning_rate(n_candidates: int, sigma: float, temperature: float) -> float:
    """η = σ² (K − 1) / (K τ): the T1–T2 hypergradient of one SGD step of this rate is the estimate's expectation, for small σ."""
    return sigma**2 * (n_candidates - 1) / (n_candidates * temperature)


def _validate(
    problem: Problem, candidates: Perturbed, weights: Tensor, of: Sequence[int]
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """(ℓ_V, ∂ℓ_V/∂λ, s_k of `of`) at θ*.

    The gradient by θ* never exists whole: its part of every s_k is taken bucket by bucket, as the backward pass comes to it.
    """
    terms: list[list[Tensor]] = [[] for _ in of]

    def take(b: int, gradient: Tensor) -> None:
        for own, k in zip(terms, of):
            own += [term.to(weights) for term in candidates.slope(k, b, gradient)]

    val, direct = problem.gradient(problem.val_loss, candidates.merged(weights), take)
    problem.check_validation(terms[0] or [None], direct)
    if not terms[0]:
        return val, direct, weights.new_zeros(len(of))
    flat = torch.stack([term for own in terms for term in own])
    return val, direct, candidates.sigma * (flat if len(flat) == len(of) else flat.view(len(of), -1).sum(1))


def _check(n_candidates, sigma, temperature, noise, strategy, chunk_size, inner_lr, generator) -> None:
    if not isinstance(n_candidates, Integral) or n_candidates < 2:
        raise ValueError(
            f"n_candidates={n_candidates!r} must be an integer of at least 2: with one candidate the softmax is constant"
        )
    check_positive("sigma", sigma)
    check_positive("temperature", temperature)
    if inner_lr is not None:
        check_rate(inner_lr)
    if not callable(noise) and noise not in NOISES:
        hint = "; evograd.guided is a function of its own" if noise == "guided" else ""
        raise ValueError(
            f"noise={noise!r} is unknown; accepted are {', '.join(map(repr, NOISES))} or a function of (tensor, generator){hint}"
        )
    check_choice("strategy", strategy, STRATEGIES)
    if chunk_size is not None:
        if strategy != "vmap":
            raise ValueError(f"chunk_size is of strategy='vmap'; it has no meaning with strategy={strategy!r}")
        check_count("chunk_size", chunk_size)
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
        given = f"on {generator.device}" if isinstance(generator, torch.Generator) else type(generator).__name__
        raise ValueError(f"generator is {given}; it must be a torch.Generator on the CPU, since seeds are drawn on the host")
