"""EvoGrad written the obvious way: all candidates at once, plain differentiation through softmax and combination."""

import torch
from torch.func import functional_call

from evograd.host.vectors import Layout
from evograd.noise import SeededNoise


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


def bare(problem):
    """(θ by name, a function of a closure and parameters): what the references need of a problem."""
    model, own = problem.model, dict(problem.model.named_parameters())
    hyper = {id(h) for h in problem.hyperparameters}
    names = problem.parameters or [n for n, p in own.items() if p.requires_grad and id(p) not in hyper]

    def loss(closure, parameters):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        value = closure(Caller(model, {**parameters, **buffers}))
        model.train()
        return value

    return {n: own[n].detach() for n in names}, loss


def guided_reference(problem, inner_lr, radius):
    """∂ℓ_V/∂λ − η ‖G‖ (∂ℓ_T(θ⁺)/∂λ − ∂ℓ_T(θ⁻)/∂λ) / 2r, both losses with the same random numbers."""
    theta, loss = bare(problem)
    at = {n: p.clone().requires_grad_() for n, p in theta.items()}
    state = torch.get_rng_state()
    value = loss(problem.val_loss, at)
    gradient = dict(zip(at, torch.autograd.grad(value, list(at.values()), retain_graph=True)))
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
    losses = []
    for sign in (1, -1):
        torch.set_rng_state(state)
        losses.append(loss(problem.train_loss, {n: theta[n] + sign * radius * g / norm for n, g in gradient.items()}))
    return torch.autograd.grad(value - inner_lr * norm * (losses[0] - losses[1]) / (2 * radius), problem.hyperparameters)


def evograd_reference(
    problem, n_candidates=2, sigma=1e-3, temperature=0.05, noise="sign", common_random_numbers=False, generator=None
):
    """Gradients for each hyperparameter, with the random numbers that the library draws from the same seed."""
    train_loss, val_loss, hyperparameters = problem.train_loss, problem.val_loss, problem.hyperparameters
    theta, loss = bare(problem)
    draw = SeededNoise(noise, Layout(theta), n_candidates, generator)
    epsilon = [{n: draw(k, n) for n in theta} for k in range(n_candidates)]

    losses, states = [], {}
    for k in range(n_candidates):
        group = 0 if common_random_numbers else k
        if group in states:
            torch.set_rng_state(states[group])
        states[group] = torch.get_rng_state()
        losses.append(loss(train_loss, {n: theta[n] + sigma * epsilon[k][n] for n in theta}))
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
