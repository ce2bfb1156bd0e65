"""Weights of classes, learned through five steps of AdamW in a model that fully_shard (FSDP2) has sharded.

    python -m resources.examples.fsdp2                                  one process
    torchrun --nproc-per-node 2 -m resources.examples.fsdp2             two, each with its own part of the batch
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import evograd


def main(n_hypergradients=4):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", **alone)
    rank, size = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    for module in (model[0], model):
        fully_shard(module, mesh=init_device_mesh(device, (size,)))
    x, y = torch.randn(64, 8, device=device)[rank::size], torch.randint(3, (64,)).to(device)[rank::size]
    weights = torch.zeros(3, device=device, requires_grad=True)  # of the classes, alike in all processes
    optimizer, meta_optimizer = torch.optim.AdamW(model.parameters(), lr=0.01), torch.optim.Adam([weights], lr=0.1)
    trajectory = evograd.Trajectory(model, optimizer, [weights])
    for step in range(5 * n_hypergradients):
        trajectory.step(lambda m: (weights.exp()[y] * F.cross_entropy(m(x), y, reduction="none")).mean())
        if len(trajectory) == 5:
            result = trajectory.hypergradient(lambda m: F.cross_entropy(m(x), y))
            weights.grad = result.grads[0]
            meta_optimizer.step()
            print(f"step {step + 1}: loss {result.val_loss:.4f}, weights {[round(w, 3) for w in weights.exp().tolist()]}")
    dist.destroy_process_group()
    return weights.detach().cpu()


if __name__ == "__main__":
    main()
