"""Processes that tests start: forked from one server, which has imported what any of them needs."""

import atexit
import contextlib
import functools
import io
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import threading
import time
import types
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    "torch._dynamo torch._decomp.decompositions_for_jvp torch.utils.flop_counter torch.distributed.fsdp "
    "torch.distributed.checkpoint higher sklearn.datasets transformers.models.xlm_roberta.modeling_xlm_roberta seqeval.metrics "
    "cross_domain_fewshot.train label_noise_mwn.train metaxl.train rotation.train resources.examples.data_mixture tests.drawn "
    "tests.test_torchrun tests.test_sharded tests.test_matrix".split()
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


# --- `python -m …` and `python -c …` for shell scripts -------------------------------------------------------------------

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b" "], [1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(99)))
"""


def as_main(arguments, folder, environment, ends):
    """What `python -m module …` or `python -c code …` does, there and so."""
    for number, end in enumerate(ends, 1):
        os.dup2(end.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    flag, *sys.argv = arguments[arguments[0] == "-u" :]  # torchrun's: not buffered
    assert flag in ("-m", "-c"), arguments
    if flag == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(sys.argv[0], vars(main))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # the server has imported it
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def answer(connection):
    with connection:
        _, ends, *_ = socket.recv_fds(connection, 1, 2)
        request = b"".join(iter(lambda: connection.recv(2**16), b""))
        ends = [Connection(end, readable=False) for end in ends]
        process = CONTEXT.Process(target=as_main, args=(*json.loads(request), ends))
        process.start()
        for end in ends:
            end.close()
        process.join()
        connection.sendall(str(process.exitcode).encode())


@functools.cache
def python():
    """The path of a Python that knows -m and -c alone, for PYTHON of a shell script: each call of it forks the server."""
    server()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen()

    def listen():
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    (folder / "python").write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    (folder / "python").chmod(0o755)
    return str(folder / "python")
