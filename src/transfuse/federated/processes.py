"""Clients side by side, each in a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from transfuse.core import errors
from transfuse.core.errors import InputError, TransferError


def require_processes(device: torch.device) -> None:
    """Refuse to train clients in processes where a copy of this one could not run backward passes.

    Raises:
        InputError: there is an accelerator, which a copied process cannot use, or no way to copy a process.
    """
    if device.type != "cpu" or torch.accelerator.is_available():
        raise InputError("workers train clients on machines without an accelerator: leave workers=0 on this one")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise InputError("workers train clients in copies of this process, which this platform cannot make: workers=0")


def in_processes(work: Callable[[int], dict[str, Any]], items: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What `work` returns for each item, each in a copy of this process with global random numbers of its own.

    A copy has models and data without sending them, so only what it returns (tensors, numbers, strings, dicts) goes
    through a pipe. Each computes with one thread, so that results do not depend on how many there are.

    Raises:
        TransferError: what `work` raised.
        RuntimeError: any other error in a process, with its traceback, or that it died.
    """
    context: Any = multiprocessing.get_context("fork")
    running = []
    for item in items:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(work, item, sender))
        process.start()
        sender.close()
        running.append((item, process, receiver))
    try:
        return {item: _read(item, receiver) for item, _, receiver in running}
    finally:
        for _, process, receiver in running:
            receiver.close()
            process.terminate()  # after an error; otherwise it has ended
            process.join()


def _answer(work: Callable[[int], dict[str, Any]], item: int, sender: Any) -> None:
    torch.set_num_threads(1)
    answer: dict[str, Any]
    try:
        answer = {"found": work(item)}
    except TransferError as error:
        answer = {"kind": type(error).__name__, "text": str(error)}
    except Exception:
        answer = {"kind": "", "text": traceback.format_exc()}
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sender.send_bytes(buffer.getvalue())


def _read(item: int, receiver: Any) -> dict[str, Any]:
    try:
        answer = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=True)
    except EOFError:
        raise RuntimeError(f"the process of client {item} died; was there enough memory? Use fewer workers") from None
    if "found" in answer:
        found: dict[str, Any] = answer["found"]
        return found
    raise getattr(errors, answer["kind"], RuntimeError)(answer["text"])
