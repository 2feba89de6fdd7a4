"""Files that are replaced whole or not at all, whatever ends the process."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: no lock is needed
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


def _lock(file: IO[bytes], *, wait: bool) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(path: Path) -> None:
    """Remove what processes left that were killed while they wrote; others hold a lock."""
    for leftover in path.parent.glob(f"*{_SUFFIX}"):
        if leftover.name.startswith(f".{path.name}."):
            with suppress(OSError), leftover.open("rb") as file:
                _lock(file, wait=False)
                leftover.unlink()


def _create(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked, and of a name that no other writer has.

    Raises:
        OSError: there cannot be one; it names `path`, or its folder.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "expected the name of a file, got a folder", str(path)
        )
    while True:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_SUFFIX}")
        try:
            file = partial.open("xb")
        except OSError as error:  # which names a file that nobody has heard of
            expected = f"expected a folder that {path.name!r} can be written to"
            raise OSError(
                error.errno, f"{expected}, got: {error.strerror}", str(path.parent)
            ) from error
        _lock(file, wait=True)
        if partial.exists():  # else somebody took it for a leftover before it was locked
            return partial, file
        file.close()


def _sync_folder(folder: Path) -> None:
    """Make a change of names in `folder` survive a power failure, where that can be asked for."""
    if fcntl is None:
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `path` at the end; after an error, `path` is as it was.

    It is written under another name in the same folder, brought to the disk, and renamed. Several
    processes may do so at the same time: the last one to end wins.

    Raises:
        OSError: it cannot be written.
    """
    _remove_leftovers(path)
    partial, file = _create(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            partial.replace(path)  # before it is closed, which gives up the lock
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
