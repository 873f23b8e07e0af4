"""Work on many files at once: processes that tell how far they are, stop at the next image, and end with their parent. No torch.

With one worker everything happens in this process.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import Array, c_longlong
from functools import partial
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import TypeVar

from eit_lab.command import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_ASKING = (signal.SIGINT, signal.SIGTERM)

_count: Callable[[int], None] = lambda num: None  # noqa: E731  (of this process, while it works)
_working = _asked_to_end = False  # in a worker


class _Stopped(BaseException):
    """In a worker: the command ends. BaseException, so that nothing takes it for a failure of its own."""


def count(num_images: int = 1) -> None:
    """Called by the work after each image: tells the command, and is where a worker stops when it is asked to."""
    _count(num_images)


def run_all(
    work: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int,
    on_progress: Callable[[int], None],
) -> Generator[Result, None, None]:
    """Results of ``work``, a module's own function, as they come; ``on_progress`` gets the number of images so far.

    What a worker raises is raised here, after the others have stopped; close the generator to stop them before the end.
    Raises RunError when a worker is killed.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from _run_here(work, tasks, on_progress)
        return
    context = multiprocessing.get_context("spawn")  # the command may have threads
    workers = min(workers, len(tasks))
    # No locks, which a killed worker may hold: each counts in a place of its own, and the last one asks all to stop.
    counts: Array[c_longlong] = context.RawArray(c_longlong, workers + 1)
    places: SimpleQueue[int] = context.SimpleQueue()
    for place in range(workers):
        places.put(place)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(counts, places, os.getpid()))
    try:
        # The processes begin here, and are to hear nothing until they have handlers of their own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
        try:
            left = {pool.submit(partial(_in_worker, work), task) for task in tasks}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while left:
            finished, left = wait(left, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            on_progress(sum(counts[:workers]))
            for future in finished:
                yield future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed (out of memory?): run the same command again, with --workers N for fewer"
        ) from None
    finally:
        counts[workers] = 1
        pool.shutdown(wait=True, cancel_futures=True)
        places.close()


def _run_here(
    work: Callable[[Task], Result], tasks: Sequence[Task], on_progress: Callable[[int], None]
) -> Generator[Result, None, None]:
    global _count
    total = 0

    def add(num_images: int) -> None:
        nonlocal total
        total += num_images
        on_progress(total)

    before, _count = _count, add
    try:
        for task in tasks:
            yield work(task)
    finally:
        _count = before


def _begin(counts: Array[c_longlong], places: SimpleQueue[int], parent: int) -> None:
    """In a worker: Ctrl-C is the parent's, and when that ends, however it does, this ends with it (Linux)."""
    global _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_term)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(128 + signal.SIGTERM)
    place = places.get()

    def add(num_images: int) -> None:
        counts[place] += num_images
        if _asked_to_end:  # where the exception was lost, as in a destructor
            raise SystemExit
        if counts[-1]:
            raise _Stopped

    _count = add


def _in_worker(work: Callable[[Task], Result], task: Task) -> Result:
    global _working
    try:
        _working = True
        result = work(task)
        _working = False
        if _asked_to_end:
            raise SystemExit
    except SystemExit:
        os._exit(128 + signal.SIGTERM)  # an executor takes it for a failure of the task, and waits for the next one
    except BaseException:
        _working = False
        raise
    return result


def _on_term(signum: int, frame: FrameType | None) -> None:
    """End through every ``with`` of the work, so that nothing half-written remains; at once where there is none."""
    global _asked_to_end
    if not _working:
        os._exit(128 + signum)
    if not _asked_to_end:
        _asked_to_end = True
        raise SystemExit
