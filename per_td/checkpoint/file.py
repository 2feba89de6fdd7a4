"""Saved states: tensors and plain values in one file, written whole or not at all.

A file is a prefix (`_PREFIX`), a header in JSON, and the bytes of the tensors in little-endian
order. A CRC-32 covers everything, so that damage is found; it takes 27 ms for 100 MB that take 98
to write (zlib's; adler32 33, sha256 60, blake2b 127). Versions of files and states:

1. `torch.save` of the state; still read.
2. This format; states also hold masses, and counts for changes of capacity.
3. The same; states also hold the structure of transitions.

Later versions keep the prefix, so that this one can name the version of a later file.
"""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from per_td.checkpoint.atomic import replacing
from per_td.errors import CheckpointError, DiskAllocationError
from per_td.memory import mapped_zeros

VERSION = 3
_MAGIC = b"per_td\r\n"
_ZIP = b"PK\x03\x04"  # begins a file of torch.save, version 1
_PREFIX = struct.Struct("<8sIQII")
"""Magic, version, length and CRC of the header, CRC of the prefix before it."""

_IN_MEMORY = 2**26
"""Bytes of a file that is read into memory, not copied to another file."""

_SENSELESS = (
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NO_ARCHIVE = (EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)

_ALIGNMENT = 64
_CHUNK = 2**20
_MOST_GAPS = 1.5
"""Most bytes that views of one memory may span to be written as one block, in their own bytes."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class _Block:
    """Adjacent bytes of the file, `at` an offset after the header."""

    def __init__(self, source: Tensor, at: int) -> None:
        self.source = source
        self.bytes = source.numel() * source.itemsize
        self.at, self.end = at, at + _padded(self.bytes)
        self.crc = 0

    def entry(self) -> dict[str, Any]:
        """Entry in the header, whose length does not depend on the checksum."""
        return {"at": self.at, "bytes": self.bytes, "crc32": f"{self.crc:08x}"}

    def write(self, put: Callable[[int, Any], Any]) -> None:
        """Write the bytes in pieces, which stay in the cache from copy to checksum to file."""
        at = self.at
        for piece in _pieces(self.source):
            data = _raw(piece)
            put(at, data)
            self.crc = zlib.crc32(data, self.crc)
            at += len(data)
        padding = bytes(self.end - at)
        put(at, padding)
        self.crc = zlib.crc32(padding, self.crc)


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor into parts of about `_CHUNK` bytes."""
    length = len(tensor) if tensor.ndim else 0
    if not length:
        return iter([tensor])
    rows = max(1, _CHUNK * length // max(1, tensor.numel() * tensor.itemsize))
    return (tensor[at : at + rows] for at in range(0, length, rows))


def _raw(tensor: Tensor) -> Any:
    """Bytes of a tensor on the CPU, without a copy if possible."""
    tensor = tensor.detach().cpu().resolve_neg().resolve_conj().contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # of one number, the stride may be any
    return flat.view(torch.uint8).numpy().data


class _Writer:
    """A state as blocks and a header."""

    def __init__(self, state: Any) -> None:
        self.blocks: list[_Block] = []
        self._shared: dict[int, int] = {}
        self._find_shared(list(_tensors_of(state)))
        self.state = self._described(state)

    def _add(self, source: Tensor) -> int:
        self.blocks.append(_Block(source, self.blocks[-1].end if self.blocks else 0))
        return len(self.blocks) - 1

    def _find_shared(self, tensors: list[Tensor]) -> None:
        """Make one block of each memory that several tensors nearly fill.

        Fields of records do: writing the gaps costs less than taking the records apart.
        """
        views: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            if not (tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()):
                views.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        for base, some in views.items():
            begin = min(_begin(tensor) for tensor in some) // _ALIGNMENT * _ALIGNMENT
            end = max(_begin(tensor) + _span(tensor) for tensor in some)
            used = sum(tensor.numel() * tensor.itemsize for tensor in some)
            if end - begin <= _MOST_GAPS * used:
                memory = torch.empty(0, dtype=torch.uint8, device=some[0].device)
                memory.set_(some[0].untyped_storage(), begin, (end - begin,))  # type: ignore[call-overload]
                self._shared[base] = self._add(memory)

    def _described(self, value: Any) -> Any:
        """Describe a value for the header."""
        if isinstance(value, Tensor):
            entry = {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "stride": list(value.stride()),
                "offset": 0,
            }
            block = self._shared.get(value.untyped_storage().data_ptr())
            if block is None or value.is_contiguous():
                entry["stride"] = list(
                    torch.empty(value.shape, dtype=value.dtype, device="meta").stride()
                )
                block = self._add(value)
            else:
                first = self.blocks[block].source
                entry["offset"] = _begin(value) - _begin(first)
            return {"tensor": entry | {"block": block}}
        if isinstance(value, dict):
            return {"dict": {key: self._described(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return [self._described(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise CheckpointError(
            f"expected tensors and plain values to save, got {type(value).__name__}"
        )

    def _header(self) -> bytes:
        blocks = [block.entry() for block in self.blocks]
        text = json.dumps({"blocks": blocks, "state": self.state}).encode()
        return text.ljust(_padded(_PREFIX.size + len(text)) - _PREFIX.size)

    def write(self, file: IO[bytes]) -> None:
        """Write the blocks, then the header with their checksums in front of them."""
        start = _PREFIX.size + len(self._header())

        def put(at: int, data: Any) -> None:
            file.seek(start + at)
            file.write(data)

        for block in self.blocks:
            block.write(put)
        header = self._header()
        prefix = _PREFIX.pack(_MAGIC, VERSION, len(header), zlib.crc32(header), 0)[:-4]
        file.seek(0)
        file.write(prefix + struct.pack("<I", zlib.crc32(prefix)) + header)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_of(item)


def _begin(tensor: Tensor) -> int:
    """Offset of a tensor in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _span(tensor: Tensor) -> int:
    """Bytes from the first to the last of a tensor."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * tensor.itemsize


def write(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state`, dicts of tensors and plain values, to `path`.

    If the process ends meanwhile, the old file stays. Tensors are copied piece by piece.

    Raises:
        CheckpointError: `state` holds anything else.
        OSError: the file cannot be written, as on a full disk; the old file stays.
    """
    writer = _Writer(state)
    with replacing(Path(path)) as file:
        writer.write(file)


@contextmanager
def _read_only() -> Iterator[None]:
    """Silence torch's warning about memory that may not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        yield


class _File:
    """The bytes of a file of version 2 or later."""

    def __init__(self, name: str, data: memoryview) -> None:
        self.name, self.data = name, data
        if data[:8] != _MAGIC[: len(data)]:
            raise self.error(f"a foreign file, which begins with {bytes(data[:8])!r}")
        if len(data) < _PREFIX.size:
            raise self.error(f"a truncated file of {len(data)} bytes")
        _, version, length, crc, own = _PREFIX.unpack(data[: _PREFIX.size])
        self._verify("prefix", data[: _PREFIX.size - 4], own)
        if version > VERSION:
            raise self.error(
                f"one of version {version}, made by a later version of per_td: this one reads"
                f" versions up to {VERSION}"
            )
        self.start = _PREFIX.size + length
        self._require(self.start)
        encoded = data[_PREFIX.size : self.start]
        self._verify("header", encoded, crc)
        header = json.loads(bytes(encoded))
        end = self.start + max((_end(block) for block in header["blocks"]), default=0)
        self._require(end)
        if len(data) > end:
            raise self.error(f"a damaged file: {len(data)} bytes instead of {end}")
        self.blocks = [self._block(k, block) for k, block in enumerate(header["blocks"])]
        self.described = header["state"]

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: expected a saved buffer, got {what}")

    def _require(self, length: int) -> None:
        if len(self.data) < length:
            raise self.error(f"a truncated file: {len(self.data)} of {length} bytes")

    def _verify(self, what: str, data: Any, crc: int) -> None:
        if zlib.crc32(data) != crc:
            raise self.error(f"a damaged file: the checksum of its {what} differs")

    def _block(self, number: int, entry: dict[str, Any]) -> Tensor:
        """Check a block; return its bytes, a view of the file."""
        begin = self.start + entry["at"]
        extent = self.data[begin : self.start + _end(entry)]
        self._verify(f"block {number}", extent, int(entry["crc32"], 16))
        if not entry["bytes"]:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        with _read_only():
            return torch.frombuffer(
                self.data, dtype=torch.uint8, count=entry["bytes"], offset=begin
            )

    def restored(self, value: Any) -> Any:
        """Invert `_described`; tuples come back as lists."""
        if isinstance(value, list):
            return [self.restored(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "dict" in value:
            return {key: self.restored(item) for key, item in value["dict"].items()}
        entry = value["tensor"]
        shape, dtype = torch.Size(entry["shape"]), _DTYPES[entry["dtype"]]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = self.blocks[entry["block"]][entry["offset"] :]
        whole = raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(shape, entry["stride"])


def _end(block: dict[str, Any]) -> int:
    return int(block["at"]) + _padded(block["bytes"])


def _restored(name: str, data: memoryview) -> Any:
    """Read a file of version 2 or later; CheckpointError if it is damaged or foreign."""
    try:
        found = _File(name, data)
        return found.restored(found.described)
    except CheckpointError:
        raise
    except _SENSELESS as error:
        raise CheckpointError(
            f"{name}: expected a saved buffer, got a header that makes no sense: {error!r}"
        ) from error


def _read_first_version(name: str, data: memoryview) -> Any:
    """Read an archive of torch.save, which checks no checksums itself."""
    archive = io.BytesIO(data)
    try:
        with zipfile.ZipFile(archive) as members:
            damaged = members.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} differs")
        archive.seek(0)
        return torch.load(archive, map_location="cpu", weights_only=True)
    except (*_SENSELESS, *_NO_ARCHIVE) as error:
        raise CheckpointError(
            f"{name}: expected a saved buffer, got a truncated, damaged or foreign archive: {error}"
        ) from error


def _own_copy(path: str | os.PathLike[str]) -> memoryview:
    """Copy a file, so that nobody changes what is checked: a large one to a file without a name."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _IN_MEMORY:
            return memoryview(file.read())
        try:
            copy = mapped_zeros((size,), torch.uint8, Path(path).parent)
        except DiskAllocationError:  # a folder for reading only, say
            copy = mapped_zeros((size,), torch.uint8)
        data, read = memoryview(copy.numpy().data), 0
        while done := file.readinto(data[read:]):
            read += done
        return data[:read]


def require(expected: str, state: Any, path: str | os.PathLike[str] | None = None) -> None:
    """Raise CheckpointError unless the "format" of a state, read from `path`, is `expected`."""
    known = state.get("format") if isinstance(state, dict) else None
    if isinstance(known, str) and known == expected:
        return
    if isinstance(known, str):
        got = f"that of {known!r}"
    elif isinstance(state, dict):
        keys = [*map(repr, state)]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        got = f"a dict with the keys {', '.join(keys[:3]) or '(none)'}{more}, such as of a network"
    else:
        got = f"{type(state).__name__}, no dict"
    place = "" if path is None else f"{os.fspath(path)}: "
    raise CheckpointError(f"{place}expected the state of a {expected.split('.')[-1]}, got {got}")


def read(path: str | os.PathLike[str], expected: str | None = None) -> Any:
    """Read a file to the CPU and check all checksums; no code in the file is run.

    Tensors are views of a copy of the file, which may be overwritten meanwhile; they are not to be
    written to. The copy of a large file is in a file, too: the system can take back its memory.

    Args:
        path: path of the file.
        expected: format of the state in it; None takes any.

    Raises:
        CheckpointError: the file is truncated, damaged, foreign or of a later version, or its state
            has another format.
        FileNotFoundError: there is no such file.
    """
    name, data = os.fspath(path), _own_copy(path)
    if not data:
        raise CheckpointError(f"{name}: expected a saved buffer, got a truncated file of 0 bytes")
    state = (_read_first_version if data[: len(_ZIP)] == _ZIP else _restored)(name, data)
    if expected is not None:
        require(expected, state, path)
    return state
