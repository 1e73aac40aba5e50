"""Lets one quantization at a time be at work in a process; those in other threads wait for it.

transformers sets torch's default dtype for the whole process while it builds a model, and replaces its initializers; a
memory limit (`max_memory`) holds for the whole process as well. Two quantizations would change each other's results.

A forked process has none of the threads of the one that it was forked from, neither ours nor those of OpenMP, which a
parallel operation of torch would wait for without end. There, the lock is a new one, and if
there were such threads, torch works with one meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..logs import get_logger

logger = get_logger(__name__)

_lock = threading.RLock()
_has_threads = False
"""Whether the process had several threads when it was last forked."""
_lacks_threads = False
"""Whether this process was forked from one that had several threads."""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other thread is inside such a context."""
    if not _lock.acquire(blocking=False):
        logger.warning("Another quantization is running in this process; this one begins when it is done.")
        _lock.acquire()
    try:
        with _without_lost_threads():
            yield
    finally:
        _lock.release()


def warn_of_loading_meanwhile() -> None:
    """Warns if a model is loaded in this thread while a quantization is at work in another one.

    It is not made to wait: the quantization may itself be waiting for that model's texts.
    """
    if _lock.acquire(blocking=False):
        _lock.release()
        return
    logger.warning(
        "A model is loaded while another thread quantizes one. transformers sets torch's default dtype for the whole "
        "process meanwhile, which can change the quantized model or make it fail: load in another process, or before."
    )


@contextmanager
def _without_lost_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    if not _lacks_threads or threads == 1:
        yield
        return
    logger.warning(
        "This process was forked from one that had threads, perhaps torch's, which do not exist here: the quantization "
        "works with one thread. Start processes with multiprocessing's 'spawn' or 'forkserver' for more."
    )
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _before_fork() -> None:
    global _has_threads
    try:
        _has_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:  # not Linux
        _has_threads = True


def _after_fork() -> None:
    global _lock, _lacks_threads
    _lock, _lacks_threads = threading.RLock(), _lacks_threads or _has_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
