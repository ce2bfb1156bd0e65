"""How good an estimate of a hypergradient is: against exact T1–T2, over all hyperparameters as one vector."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .baselines import conjugate_gradient, finite_difference, neumann, unrolled
from .hypergradient import hypergradient
from .mixed_mode import mixed_mode
from .problem import Closure, Hypergradient, Parameters

Estimate = Callable[[], Hypergradient]


def agreement(estimate: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """cosine: of the angle between them.  sign: share of the elements with the same sign.  norm: ‖estimate‖ / ‖exact‖.

    Both are lists of tensors of the same shapes. Where a norm is zero the cosine is zero.
    """
    if [g.shape for g in estimate] != [g.shape for g in exact]:
        raise ValueError(f"shapes differ: {[tuple(g.shape) for g in estimate]} and {[tuple(g.shape) for g in exact]}")
    a, b = (torch.cat([g.detach().double().reshape(-1) for g in gradient]) for gradient in (estimate, exact))
    norms = a.norm() * b.norm()
    return {
        "cosine": ((a @ b) / norms).item() if norms > 0 else 0.0,
        "sign": (a.sign() == b.sign()).double().mean().item(),
        "norm": (a.norm() / b.norm()).item() if b.norm() > 0 else float("inf"),
    }


def estimates(
    train_loss: Closure,
    val_loss: Closure,
    model: nn.Module,
    hyperparameters: Sequence[Tensor],
    *,
    inner_lr: float,
    generator: torch.Generator,
    sigma: float = 1e-3,
    parameters: Parameters = None,
    made: Parameters = None,
) -> dict[str, Estimate]:
    """Estimators of one problem, each a function without arguments, all at the scale of `inner_lr`; "exact" is T1–T2.

    evograd_k*: the paper's, over K; at K = 10 also over σ, τ and kinds of noise; with common random numbers. guided, mixed:
    with G at θ, after one SGD step (…_sgd), and after the step that was made (…_made), where its parameters `made` are given.
    generator: EvoGrad's directions are drawn from it, so that they take nothing from what the losses draw (dropout, say).
    sigma: of the guided perturbation.
    """
    problem = (train_loss, val_loss, model, hyperparameters)
    common = dict(inner_lr=inner_lr, parameters=parameters)
    evograd = partial(hypergradient, *problem, generator=generator, **common)
    guided = partial(hypergradient, *problem, noise="guided", temperature=1.0, **common)
    result = {"exact": partial(unrolled, *problem, **common)}
    for k in (2, 10, 50):
        result[f"evograd_k{k}"] = partial(evograd, n_candidates=k)
        result[f"evograd_k{k}_common"] = partial(evograd, n_candidates=k, common_random_numbers=True)
    result["evograd_k10_normal"] = partial(evograd, n_candidates=10, noise="normal")
    for value in (1e-4, 1e-2):
        result[f"evograd_k10_sigma{value:g}"] = partial(evograd, n_candidates=10, sigma=value)
    for value in (0.005, 0.5):
        result[f"evograd_k10_temperature{value:g}"] = partial(evograd, n_candidates=10, temperature=value)
    places = {"": None, "_sgd": "sgd"} | ({"_made": made} if made is not None else {})
    for place, lookahead in places.items():
        result[f"guided{place}"] = partial(guided, sigma=sigma, lookahead=lookahead)
        result[f"mixed{place}"] = partial(mixed_mode, *problem, lookahead=lookahead, **common)
    for factor in (0.1, 0.3, 3, 10):
        result[f"guided_sgd_sigma_x{factor:g}"] = partial(guided, sigma=factor * sigma, lookahead="sgd")
    result["finite_difference"] = partial(finite_difference, *problem, **common)
    result["neumann"] = partial(neumann, *problem, **common)
    result["conjugate_gradient"] = partial(conjugate_gradient, *problem, damping=0.1, parameters=parameters)
    return result


class QualityLog:
    """Agreement with exact T1–T2 over the steps of a training."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.entries: list[dict] = []
        self.flops: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}

    def add(self, step: int, estimates: Mapping[str, Estimate], device: torch.device) -> None:
        """Take every estimate, each from the same state of torch's generators, which are afterwards as before."""
        grads = {}
        for name, estimate in estimates.items():
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                if name in self.flops:
                    start = time.perf_counter()
                    grads[name] = [g.cpu() for g in estimate().grads]
                    self.seconds.setdefault(name, []).append(time.perf_counter() - start)
                else:  # once: counting takes time
                    with FlopCounterMode(display=False) as counter:
                        grads[name] = [g.cpu() for g in estimate().grads]
                    self.flops[name] = counter.get_total_flops()
        exact = grads.pop("exact")
        self.entries.append({"step": step, **{name: agreement(g, exact) for name, g in grads.items()}})

    def metrics(self) -> dict:
        """For the record of the run: the mean of each measure by estimator, the cosines themselves, and what each cost."""
        names = [name for name in self.entries[0] if name != "step"]
        result = {
            measure: {name: statistics.fmean(entry[name][measure] for entry in self.entries) for name in names}
            for measure in ("cosine", "sign", "norm")
        }
        result["quality_steps"] = [entry["step"] for entry in self.entries]
        result["quality_cosines"] = {name: [round(entry[name]["cosine"], 4) for entry in self.entries] for name in names}
        result["quality_flops"] = self.flops
        result["quality_seconds"] = {name: statistics.median(values) for name, values in self.seconds.items()}
        return result

    def state_dict(self) -> dict:
        logged = {"entries": list(self.entries), "flops": self.flops, "seconds": self.seconds}
        return {"generator": self.generator.get_state(), **logged}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        self.entries, self.flops, self.seconds = state["entries"], state["flops"], state["seconds"]
