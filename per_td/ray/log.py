"""WriteAheadLog: checkpoints of one shard, and a log of all changes after the last of them.

A folder holds `000007.pt`, the checkpoint number 7, and `000007.log`, the changes after it. A
checkpoint is taken in an order that a crash may cut anywhere: a new, empty log; the checkpoint,
whole or not at all; then the old files go. Restoring reads the newest checkpoint and every log from
its number on.

A record is a head (magic, CRC-32 and length of the rest, CRC-32 of the head), a JSON description
and the raw bytes of arrays; nothing in it is executed. A record that the file's end cuts off was
never acknowledged: it is dropped. Damage elsewhere raises: later records were acknowledged.
"""

import fcntl
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from per_td.checkpoint.atomic import sync_folder
from per_td.errors import CheckpointError
from per_td.ray.wire import Packed

_HEAD = struct.Struct("<4sIQI")
_LENGTH = struct.Struct("<I")
_MAGIC = b"PTDL"
_LOCK_WAIT_S = 10.0


class Record(NamedTuple):
    """One change: its kind, plain values, and arrays."""

    kind: str
    values: dict[str, Any]
    arrays: Packed


class WriteAheadLog:
    """The files of one shard; one process at a time may use their folder.

    With `fsync`, `append` waits until the disk has the record. Without it an acknowledged record
    survives the death of the process, but not that of the machine.
    """

    def __init__(self, folder: str | os.PathLike[str], *, fsync: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fsync = fsync
        self._lock = _locked(self.folder / "lock")
        self._file: BinaryIO | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return max(self.folder.glob("*.pt"), default=None)

    def replay(self) -> Iterator[Record]:
        """All records since the newest checkpoint; then the log is ready for `append`."""
        first = 0 if self.checkpoint is None else int(self.checkpoint.stem)
        logs = sorted(p for p in self.folder.glob("*.log") if int(p.stem) >= first)
        for path in logs:
            with path.open("r+b") as file:
                yield from _records(file)
        self._open(logs[-1] if logs else self.folder / f"{first:06d}.log")

    def append(self, record: Record) -> None:
        """Write a record; when this returns, it is in the file."""
        if self._file is None:
            raise CheckpointError("expected replay() before the first append()")
        parts = _encoded(record)
        length, crc = 0, 0
        for part in parts:
            length += len(part)
            crc = zlib.crc32(part, crc)
        start = self._file.tell()
        try:
            head = _HEAD.pack(_MAGIC, crc, length, 0)[:-4]
            for part in (head, zlib.crc32(head).to_bytes(4, "little"), *parts):
                _write(self._file, part)
            if self.fsync:
                os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), start)  # later records must follow a whole one
            self._file.seek(start)
            raise

    def rotate(self, save: Callable[[Path], None]) -> None:
        """Take a checkpoint with `save`, which brings a whole file to the disk or does nothing."""
        old = [*self.folder.glob("*.pt"), *self.folder.glob("*.log")]
        number = 1 + max((int(path.stem) for path in old), default=0)
        self._open(self.folder / f"{number:06d}.log")
        save(self.folder / f"{number:06d}.pt")
        for path in old:
            path.unlink()

    def close(self) -> None:
        """Close the files, and let others use the folder."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    def _open(self, path: Path) -> None:
        if self._file is not None:
            self._file.close()
        self._file = path.open("ab", buffering=0)
        if self.fsync:
            sync_folder(self.folder)  # without the folder's entries, a file is lost


def _locked(path: Path) -> BinaryIO:
    """The open file `path`, locked; a process that just died may take a moment to let go."""
    file = path.open("ab")
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() > until:
                file.close()
                raise CheckpointError(
                    f"{path.parent}: expected a folder for this shard alone, got one in use"
                ) from error
            time.sleep(0.05)
        else:
            return file


def _write(file: BinaryIO, part: bytes | memoryview) -> None:
    """Write all of it: an unbuffered file may take less at a time, as where the disk is full."""
    left = memoryview(part)
    while left:
        left = left[file.write(left) :]


def _encoded(record: Record) -> list[bytes | memoryview]:
    arrays = [
        {"key": key, "dtype": dtype, "numpy": values.dtype.str, "shape": values.shape}
        for key, dtype, values in record.arrays
    ]
    head = {"kind": record.kind, "values": record.values, "arrays": arrays}
    text = json.dumps(head).encode()
    content = [
        np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        for _, _, values in record.arrays
    ]
    return [_LENGTH.pack(len(text)), text, *content]


def _decoded(payload: bytes) -> Record:
    (length,) = _LENGTH.unpack_from(payload)
    at = _LENGTH.size + length
    head = json.loads(payload[_LENGTH.size : at])
    arrays: Packed = []
    for entry in head["arrays"]:
        dtype, shape = np.dtype(entry["numpy"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(payload, dtype, count, at).reshape(shape)
        arrays.append((tuple(entry["key"]), entry["dtype"], values))
        at += values.nbytes
    return Record(head["kind"], head["values"], arrays)


def _records(file: BinaryIO) -> Iterator[Record]:
    """The whole records of a log; cuts off a torn one at its end, refuses damage before it."""
    at, size = 0, os.fstat(file.fileno()).st_size
    damage = f"{file.name}: expected a whole record at byte {{}}"
    while at < size:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            break
        magic, crc, length, crc_of_head = _HEAD.unpack(head)
        if (magic, crc_of_head) != (_MAGIC, zlib.crc32(head[:-4])):
            if not (head + file.read()).strip(b"\0"):
                break  # a file system may leave zeros
            raise CheckpointError(damage.format(at))
        end = at + _HEAD.size + length
        if end > size:
            break
        payload = file.read(length)
        if zlib.crc32(payload) != crc:
            if end == size:
                break
            raise CheckpointError(damage.format(at))
        yield _decoded(payload)
        at = end
    file.truncate(at)
