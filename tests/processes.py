"""Run a function in a process of its own. The server it is forked from has torch imported already, so that is quick."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["transfuse.core.trainer", "transfuse.distill", "transfuse.models", "accelerate", "torch._dynamo"]
)


def start(function: Callable[..., Any], *args: Any, environment: dict[str, str] | None = None) -> Any:
    """Start a process; `join()` it. The function is sent by name and file, since test files are no modules."""
    process = CONTEXT.Process(
        target=_call, args=(function.__code__.co_filename, function.__name__, args, environment or {}), daemon=False
    )
    process.start()
    return process


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, run in a process of its own."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(sender, function.__code__.co_filename, function.__name__, args))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def on_ranks(function: Callable[..., Any], folder: Path, world: int = 2) -> list[Any]:
    """What the function returns in each of several processes that a launcher would have started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(world)}
    processes = [
        start(function, folder, rank, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * world, f"exit codes {codes}"
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(world)]


def _call(file: str, name: str, args: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of workers, which could not import a test file
    _load(file, name)(*args)


def _answer(sender: Any, file: str, name: str, args: tuple[Any, ...]) -> None:
    sender.send(_load(file, name)(*args))


def _load(file: str, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"__name__": Path(file).stem, "__file__": file}
    exec(compile(Path(file).read_text(), file, "exec"), scope)
    return scope[name]
