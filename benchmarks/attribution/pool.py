"""Independent jobs on several processes of one thread each, with a progress bar."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when its parent is killed; it would otherwise wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run_all(
    function: Callable[..., None], arguments: list[tuple[Any, ...]], jobs: int, description: str, finished: int
) -> None:
    """Call a function with each tuple of arguments; the first failure stops the rest and is raised.

    Args:
        function: importable by name; it writes its result to a file, atomically.
        arguments: for each call.
        jobs: number of processes; 1 runs in this process.
        what: for the progress bar.
        done: pieces of the same work that were finished before.
    """
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(description, total=len(arguments) + finished, completed=finished)
        if jobs == 1:
            for call_arguments in arguments:
                function(*call_arguments)
                progress.advance(bar)
            return
        with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_one_thread) as pool:
            futures = [pool.submit(function, *call_arguments) for call_arguments in arguments]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
