"""Processes that tests start: forked from one server, which has imported what any of them needs."""

import contextlib
import functools
import io
import multiprocessing
import os
import socket
import time

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    "torch._dynamo torch._decomp.decompositions_for_jvp torch.utils.flop_counter torch.distributed.fsdp torch.distributed.tensor torch.distributed.checkpoint "
    "higher sklearn.datasets transformers.models.xlm_roberta.modeling_xlm_roberta seqeval.metrics cross_domain_fewshot.train "
    "label_noise_mwn.train metaxl.train rotation.train resources.examples.data_mixture tests.drawn tests.test_torchrun "
    "tests.test_sharded tests.test_matrix".split()
)


@functools.cache
def server():
    """Started, with all that it preloads, before a clock runs."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def worker(rank, size, port, folder, job, arguments):
    """What torchrun would start."""
    torch.set_num_threads(1)
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    out, err = io.StringIO(), io.StringIO()
    code, result = 0, None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            result = job(rank, *arguments)
        except SystemExit as end:
            code = end.code
    torch.save({"code": code, "result": result, "out": out.getvalue(), "err": err.getvalue()}, f"{folder}/{rank}.pt")


def run(folder, job, *arguments, size=2):
    """What each process returned, printed, and ended with."""
    server()
    port = free_port()
    processes = [CONTEXT.Process(target=worker, args=(rank, size, port, folder, job, arguments)) for rank in range(size)]
    [p.start() for p in processes]
    end = time.monotonic() + 60
    [p.join(max(0, end - time.monotonic())) for p in processes]
    waiting = [rank for rank, p in enumerate(processes) if p.is_alive()]
    [p.kill() for p in processes]
    assert not waiting, "nobody waits for ever"
    files = [f"{folder}/{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if os.path.exists(file) else None for file in files]
