"""Accuracy on test episodes: what train.py and evaluate.py have in common."""

from __future__ import annotations

import torch

from evograd.lab.processes import ALONE

from .data import TestEpisodes, centred, stream
from .models import episode_targets

TEST_SEED = 0  # of the episodes that train.py tests on: the same for all methods and seeds


@torch.no_grad()
def score(model, images, settings, n_episodes, seed, n_workers, processes=ALONE, look=lambda: None):
    """Accuracy (%) of each test episode, (n_episodes,) on the CPU. settings: has n_way, n_shot, n_query, image_size.

    Several processes take turns, and each gets all accuracies, those of the first process first. look: called before each, equally
    often by all processes.
    """
    episodes = TestEpisodes(images, seed, settings.n_way, settings.n_shot + settings.n_query)
    device = next(model.parameters()).device
    model.eval()
    correct = []
    own = range(processes.rank, n_episodes, processes.size)
    loader = stream(episodes, own, n_workers, pin=device.type == "cuda")
    for episode in processes.progress(loader, total=len(own), desc=f"test on {images.domain}", unit="episode"):
        look()
        scores = model(centred(episode.to(device, non_blocking=True), settings.image_size), settings.n_shot)
        correct.append((scores.argmax(1) == episode_targets(scores)).float().mean())
    for _ in range(len(own), -(-n_episodes // processes.size)):
        look()
    correct = torch.stack(correct).cpu() if correct else torch.empty(0)  # fewer episodes than processes
    return torch.cat(processes.all(100 * correct))


def interval(values):
    """(mean, half width of its 95 % interval) of one number an episode."""
    return values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5
