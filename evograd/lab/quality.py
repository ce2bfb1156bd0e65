"""How good the estimates of a hypergradient are over a training, against exact T1–T2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from ..comparison import Estimate, agreement
from ..measuring import flop_counter


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
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)  # the step before is still at work there
                    start = time.perf_counter()
                    grads[name] = [g.cpu() for g in estimate().grads]
                    self.seconds.setdefault(name, []).append(time.perf_counter() - start)
                else:  # once: counting takes time
                    with flop_counter() as counter:
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
