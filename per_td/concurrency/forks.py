"""Forks: a fork waits for the calls of other threads, which do not go on in the child.

Else the child could find a lock taken for ever, and a change half made.
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

_watched: "weakref.WeakKeyDictionary[Any, tuple[Any, Callable[[Any], None]]]"
_watched = weakref.WeakKeyDictionary()
_held: list[tuple[Any, Any, Callable[[Any], None]]] = []


def watch(owner: Any, lock: Any, renew: Callable[[Any], None]) -> None:
    """Hold `lock` while the process forks, and call `renew` with `owner` in the child."""
    _watched[owner] = lock, renew


def _before() -> None:
    for owner, (lock, renew) in list(_watched.items()):
        lock.acquire()
        _held.append((owner, lock, renew))


def _in_parent() -> None:
    while _held:
        _held.pop()[1].release()


def _in_child() -> None:
    while _held:
        owner, lock, renew = _held.pop()
        lock.release()
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
