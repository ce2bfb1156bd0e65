"""Weights of classes in a model that fully_shard (FSDP2) has sharded.

    python resources/examples/fsdp2.py                                  one process
    torchrun --nproc-per-node 2 resources/examples/fsdp2.py             two
"""

import os
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import evograd
device = "cuda" if torch.cuda.is_available() else "cpu"
alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
dist.init_process_group("nccl" if device == "cuda" else "gloo", **alone)
rank, size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).to(device)
for module in (model[0], model):
    fully_shard(module, mesh=init_device_mesh(device, (size,)))
x, y = torch.randn(64, 8, device=device)[rank::size], torch.randint(3, (64,)).to(device)[rank::size]
weights = torch.zeros(3, device=device, requires_grad=True)  # of the classes, alike in all processes
train_loss = lambda m: (weights.exp()[y] * F.cross_entropy(m(x), y, reduction="none")).mean()
val_loss = lambda m: F.cross_entropy(m(x), y)
result = evograd.guided(train_loss, val_loss, model, [weights], inner_lr=0.1)
print(result.val_loss, result.grads[0])
dist.destroy_process_group()
