"""Prefetcher: batches drawn ahead of their use, by a thread in the background."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from tensordict import TensorDict

__all__ = ["Prefetcher"]


class Prefetcher:
    """Keeps up to `ahead` batches ready.

    The thread is started by the first `next`, holds the buffer weakly, and ends with `close`, with
    this object, or with an error, which the `next` that would have got the batch raises; one more
    `next` starts another. `draw` is called with the owner, and gives a batch.
    """

    def __init__(self, owner: Any, draw: Callable[[Any], TensorDict], ahead: int) -> None:
        self._owner, self._draw, self.ahead = weakref.ref(owner), draw, ahead
        self._starting = threading.Lock()
        self._work: _Work | None = None
        self._begun: list[_Work] = []  # whose threads may be running
        weakref.finalize(self, _end, self._begun)

    def next(self) -> TensorDict:
        """Wait for the oldest batch drawn ahead; raises whatever drawing it raised."""
        batch = None
        while batch is None:
            batch = self._working().take()
        return batch

    def _working(self) -> "_Work":
        with self._starting:
            work = self._work
            if work is None or work.ended.is_set():
                work = _Work(self.ahead)
                self._begun[:] = filter(_Work.is_running, self._begun)
                start(work, self._owner, self._draw)
                self._begun.append(work)
                self._work = work  # last: nobody waits for a thread that could not be started
            return work

    def drop(self) -> None:
        """Drop the batches drawn ahead; the thread ends, but is not waited for."""
        with self._starting:
            if self._work is not None:
                self._work.stop()
                self._work = None

    def forget(self) -> None:
        """Forget the threads in the child of a fork, where they do not run."""
        self._begun.clear()
        self._work = None

    def close(self) -> None:
        """`drop`, and wait for the end of the thread."""
        with self._starting:
            _end(self._begun)
            self._work = None


class _Work:
    """The state that the thread and its owner share."""

    def __init__(self, ahead: int) -> None:
        self.ended = threading.Event()
        self.permits = threading.Semaphore(ahead)  # one for each batch that may be drawn ahead
        self.ready: queue.SimpleQueue[TensorDict | BaseException | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def take(self) -> TensorDict | None:
        """Wait for the next batch; None if there will not be any more."""
        item = self.ready.get()
        if isinstance(item, TensorDict):
            self.permits.release()
            return item
        self.stop()  # for others who wait here
        if item is not None:
            raise item
        return None

    def stop(self) -> None:
        """Tell the thread, and who waits for it, that this is the end."""
        self.ended.set()
        self.permits.release()
        self.ready.put(None)

    def is_running(self) -> bool:
        """True until the thread has ended."""
        return self.thread is not None and self.thread.is_alive()


def _end(begun: list[_Work]) -> None:
    """Stop all of these, wait for their threads, and forget them."""
    while begun:
        work = begun.pop()
        work.stop()
        if work.thread is not None and work.thread is not threading.current_thread():
            work.thread.join()


def start(work: _Work, owner: "weakref.ref[Any]", draw: Callable[[Any], TensorDict]) -> None:
    """Start the thread, which knows of its owner only weakly."""
    run = (work, owner, draw)
    work.thread = threading.Thread(target=_run, args=run, name="per_td prefetch", daemon=True)
    work.thread.start()


def _run(work: _Work, owner: "weakref.ref[Any]", draw: Callable[[Any], TensorDict]) -> None:
    while True:
        work.permits.acquire()
        buffer = owner()
        if work.ended.is_set() or buffer is None:
            return
        try:
            work.ready.put(draw(buffer))
        except BaseException as error:
            work.ready.put(error)
            return
        del buffer
