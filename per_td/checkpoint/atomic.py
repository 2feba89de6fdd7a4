"""Files replaced whole or not at all, even if the process is killed."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows, which does not remove open files: no lock is needed
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


def _lock(file: IO[bytes], *, wait: bool) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(path: Path) -> None:
    """Remove partial files of killed processes; those of live ones are locked."""
    for leftover in path.parent.glob(f"*{_SUFFIX}"):
        if leftover.name.startswith(f".{path.name}."):
            with suppress(OSError), leftover.open("rb") as file:
                _lock(file, wait=False)
                leftover.unlink()


def _create(path: Path) -> tuple[Path, IO[bytes]]:
    """Create a locked file beside `path`; errors name `path` or its folder."""
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "expected the name of a file, got a folder", str(path)
        )
    if path.exists() and not path.is_file():  # a device, say, whose name nothing may take
        raise OSError(errno.EINVAL, "expected the name of a file, got what is none", str(path))
    while True:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_SUFFIX}")
        try:
            file = partial.open("xb")
        except OSError as error:  # it names the partial file, which no user knows
            expected = f"expected a folder that {path.name!r} can be written to"
            raise OSError(
                error.errno, f"{expected}, got: {error.strerror}", str(path.parent)
            ) from error
        _lock(file, wait=True)
        if partial.exists():  # else another process removed it before it was locked
            return partial, file
        file.close()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure, where the system can."""
    if fcntl is None:
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that becomes `path` at the end; after an error, `path` is unchanged.

    It is written under another name in the same folder, synced to the disk, and renamed. Of several
    processes that do so at the same time, the last one to end wins. The new file has the
    permissions of the old one. A symbolic link stays: the file that it leads to is replaced.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    partial, file = _create(path)
    try:
        with file:
            if path.exists():
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            partial.replace(path)  # before closing, which gives up the lock
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
