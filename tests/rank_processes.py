"""Runs a function in several processes that form one gloo group."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any


def run(context: Any, function: Callable[..., Any], *args: Any, size: int = 2, timeout: float = 90) -> list[Any]:
    """What ``function(*args)`` returns on each rank, in rank order.

    Args:
        context: of multiprocessing.
        function: of a module, so that a process can find it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        places = [(function, args, rank, size, folder, timeout, pipes[rank][1]) for rank in range(size)]
        processes = [context.Process(target=_rank, args=place) for place in places]
        try:
            for process in processes:
                process.start()
            return _answers([pipe for pipe, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(pipes: list[Any], until: float) -> list[Any]:
    """Fails with the first rank that fails: the others may wait for it in vain."""
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(left, max(0.0, until - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(answers))} did not answer in time"
        for pipe in ready:
            good, answers[pipes.index(pipe)] = pipe.recv()
            assert good, f"rank {pipes.index(pipe)}: {answers[pipes.index(pipe)]}"
    return [answers[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, folder: str, timeout: float, pipe: Any
) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=size,
            timeout=timedelta(seconds=timeout),
        )  # fmt: skip
        pipe.send((True, function(*args)))
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:  # the test shows it
        pipe.send((False, traceback.format_exc()))
