"""`run_ranks` calls a function in several real processes that share a gloo process group.

The processes are forked from a server that has imported the heavy libraries once, so starting them costs little.
"""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "mtedit_fast.training.sharding",
        "mtedit_fast.training.rebalance",
        "diffusers.models.transformers.transformer_flux",
        "torch._dynamo",
        "torch.optim",
    ]
)


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, backend: str | None = "gloo", timeout: float = 240
) -> list[Any]:
    """[function(rank, *arguments) of every rank]; None for a rank that ended without returning (`os._exit`, a kill).

    `function` is a module's own (it travels by name). backend: None leaves the process group to it; the environment is
    torchrun's. An exception of any rank is raised here with its traceback; after `timeout` seconds, all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(world):
        mine, theirs = _context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        process = _context.Process(target=_main, args=(theirs, environment, backend, function, arguments), daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    results: list[Any] = [None] * world
    failures, deadline, pending = [], time.monotonic() + timeout, dict(zip(ends, range(world), strict=True))
    while pending and time.monotonic() < deadline:
        ready = multiprocessing.connection.wait(list(pending), timeout=deadline - time.monotonic())
        for end in [end for end in pending if end in ready]:
            rank = pending.pop(end)
            try:
                results[rank], failure = pickle.loads(end.recv_bytes())
            except EOFError:
                continue  # gone without a word: what some tests are about
            if failure:
                failures.append(f"rank {rank}: {failure}")
                deadline = min(deadline, time.monotonic() + 3)  # the others may wait for it in vain
    failures += [f"rank {rank}: no result" for rank in pending.values()]
    for process in processes:
        process.join(0 if failures else 10)
        process.kill()
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def _main(
    end: Connection,
    environment: dict[str, str],
    backend: str | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)
    torch.set_num_threads(1)
    answer: tuple[Any, str | None]
    try:
        if backend:
            dist.init_process_group(backend)
        answer = function(int(environment["RANK"]), *arguments), None
    except BaseException:
        answer = None, traceback.format_exc()
    end.send_bytes(pickle.dumps(answer))  # by value: shared memory would go with this process
    end.close()
    os._exit(0)  # no waiting for peers that a test has killed
