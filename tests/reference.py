"""EvoGrad written the obvious way: all candidates at once, plain differentiation through softmax and combination."""

import torch
from torch.func import functional_call

from evograd.noise import NOISES, SeededNoise


class Caller:
    """Called like the model, with other tensors in it."""

    def __init__(self, model, tensors):
        self.model, self.tensors = model, tensors

    def __call__(self, *args, **kwargs):
        return functional_call(self.model, self.tensors, args, kwargs)

    def parameters(self):
        return list(self.tensors.values())

    def eval(self):
        self.model.eval()
        return self


def evograd_reference(
    problem, n_candidates=2, sigma=1e-3, temperature=0.05, noise="sign", common_random_numbers=False, generator=None, radius=None
):
    """Gradients for each hyperparameter, with the random numbers that the library draws from the same seed.

    Guided: pairs θ ± r G/‖G‖ with the softmax linearised where all weights are equal, at the scale of random noise.
    """
    train_loss, val_loss, model, hyperparameters = problem.args()
    own = dict(model.named_parameters())
    hyper = {id(h) for h in hyperparameters}
    names = problem.parameters or [n for n, p in own.items() if p.requires_grad and id(p) not in hyper]
    theta = {n: own[n].detach() for n in names}

    def loss(closure, parameters):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        value = closure(Caller(model, {**parameters, **buffers}))
        model.train()
        return value

    if noise == "guided":
        at = {n: p.clone().requires_grad_() for n, p in theta.items()}
        value = loss(val_loss, at)
        gradient = dict(zip(at, torch.autograd.grad(value, list(at.values()), retain_graph=True)))
        flat = torch.cat([g.flatten() for g in gradient.values()])
        signs = [1.0 if k % 2 == 0 else -1.0 for k in range(n_candidates)]
        if n_candidates % 2 == 1:
            signs[-1] = 0.0
        eta, sigma = sigma**2 * (n_candidates - 1) / (n_candidates * temperature), radius
        epsilon = [{n: s * g / flat.norm() for n, g in gradient.items()} for s in signs]
    else:
        draw = SeededNoise(NOISES.get(noise, noise), theta, n_candidates, generator)
        epsilon = [{n: draw(k, n) for n in theta} for k in range(n_candidates)]

    losses, states = [], {}
    for k in range(n_candidates):
        group = 0 if common_random_numbers else min(k // 2, n_candidates // 2 - 1) if noise == "guided" else k
        if group in states:
            torch.set_rng_state(states[group])
        states[group] = torch.get_rng_state()
        losses.append(loss(train_loss, {n: theta[n] + sigma * epsilon[k][n] for n in theta}))
    if noise == "guided":
        pairs = sum(s * ell for s, ell in zip(signs, losses)) / (2 * radius * (n_candidates // 2))
        return torch.autograd.grad(value - eta * flat.norm() * pairs, hyperparameters)
    weights = torch.softmax(-torch.stack(losses) / temperature, dim=0)
    merged = {n: sum(w * (theta[n] + sigma * e[n]) for w, e in zip(weights, epsilon)) for n in theta}
    return torch.autograd.grad(loss(val_loss, merged), hyperparameters)


def second_order_reference(problem, inner_lr):
    """T1–T2 by double backward: gradients for each hyperparameter."""
    train_loss, val_loss, model, hyperparameters = problem.args()
    hyper = {id(h) for h in hyperparameters}
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in hyper}
    theta = {n: p.detach().clone().requires_grad_() for n, p in own.items()}

    def loss(closure, parameters):
        return closure(Caller(model, {**parameters, **{n: b.clone() for n, b in model.named_buffers()}}))

    slopes = torch.autograd.grad(loss(train_loss, theta), list(theta.values()), create_graph=True)
    ahead = {n: p - inner_lr * g for (n, p), g in zip(theta.items(), slopes)}
    return torch.autograd.grad(loss(val_loss, ahead), hyperparameters)
