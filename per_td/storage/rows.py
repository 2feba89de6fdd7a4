"""Rows of several tensors of one length on the CPU, copied by the compiled kernels.

Addresses are read anew in each call, since tensors may be moved to shared memory in between.
"""

from array import array
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import SchemaError

__all__ = [
    "gather",
    "gather_each",
    "indexable",
    "likes",
    "plain",
    "require_memory",
    "scatter",
    "scatter_at",
    "select",
    "steps",
]


def _addresses(tensors: Iterable[Tensor]) -> "array[int]":
    return array("q", map(Tensor.data_ptr, tensors))


def _sources(new: Sequence[Tensor]) -> "array[int]":
    """Addresses of rows that came from outside.

    Raises:
        SchemaError: one has no memory of its own.
    """
    try:
        found = _addresses(new)
    except RuntimeError:  # torch refuses to tell
        require_memory(new)
        raise
    if 0 in found:
        require_memory(new)
    return found


def require_memory(new: Iterable[Tensor]) -> None:
    """Refuse with a SchemaError rows without memory of their own: see `validation`."""
    for leaf in new:
        validation.require_memory("transitions", leaf, SchemaError)


def plain(leaf: Tensor, device: torch.device) -> Tensor:
    """`leaf` on `device`, with its numbers as they are, one after the other in memory.

    Raises:
        SchemaError: it has no values, or not in memory.
    """
    if leaf.layout is torch.strided and leaf.is_contiguous() and leaf.device == device:
        if not (leaf.is_neg() or leaf.is_conj()):
            return leaf
    else:
        validation.require_plain("transitions", leaf, SchemaError)
    leaf = validation.to_device(leaf, device)
    if leaf.is_neg() or leaf.is_conj():
        leaf = leaf.resolve_neg().resolve_conj()
    return leaf if leaf.is_contiguous() else leaf.contiguous()


_AS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}
"""What torch stores and copies, but does not index: numbers of the same size that it does."""


def indexable(column: Tensor) -> Tensor:
    """The same memory in a dtype whose rows torch can gather and scatter."""
    dtype = _AS.get(column.dtype)
    return column if dtype is None else column.view(dtype)


def select(column: Tensor, index: Tensor) -> Tensor:
    """Copies of the rows `index` [B] of a column, in plain torch."""
    found = indexable(column).index_select(0, index)
    return found if found.dtype is column.dtype else found.view(column.dtype)


def steps(columns: Iterable[Tensor]) -> Tensor:
    """Distance between rows and length of a row in bytes, int64 [columns, 2], for the kernels.

    Args:
        columns: [capacity, ...]; the numbers of a row lie one after the other.
    """
    sizes = [
        [column.stride(0) * column.itemsize, column.shape[1:].numel() * column.itemsize]
        for column in columns
    ]
    return torch.tensor(sizes, dtype=torch.int64, device="cpu").reshape(-1, 2)


def likes(columns: Iterable[Tensor], *n: int) -> list[Tensor]:
    """Tensors like n (or [S, B]) rows of each column: `empty_like` is twice as fast as `empty`."""
    return [
        torch.empty(*n, *column.shape[1:], dtype=column.dtype, device=column.device)
        for column in columns
    ]


def _copies(
    columns: Iterable[Tensor], like: Sequence[Tensor]
) -> tuple[list[Tensor], "array[int]", "array[int]"]:
    """Tensors for copies of rows; addresses of the columns, and of these."""
    out = list(map(torch.empty_like, like))
    return out, _addresses(columns), _addresses(out)


def scatter(
    kernel: ModuleType,
    columns: Iterable[Tensor],
    sizes: Tensor,
    new: Sequence[Tensor],
    *,
    capacity: int,
    start: int,
    n: int,
    generation: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """Copy `n` rows to the slots from `start` on, and from slot 0 on past the end.

    Args:
        kernel: the compiled kernels.
        columns: [capacity, ...].
        sizes: `steps` of the columns.
        new: the rows, [n, ...], or [...] for one; `plain`, of the columns' dtypes.
        capacity: number of slots.
        start: the first slot.
        n: at most `capacity`.
        generation: how often each slot was written, int64 [capacity], to be counted up.
        index: for the slots, int64 [n], if `generation` is given; may be one of the `new`.
    """
    first, source = _addresses(columns), _sources(new)
    ring = first.buffer_info()[0], sizes.data_ptr(), len(new), capacity, start, n
    if generation is None or index is None:
        kernel.scatter(*ring, source.buffer_info()[0])
    else:
        stamps = generation.data_ptr(), index.data_ptr()
        kernel.append(*ring, source.buffer_info()[0], *stamps)


def gather(
    kernel: ModuleType,
    columns: Iterable[Tensor],
    sizes: Tensor,
    like: Sequence[Tensor],
    index: Tensor,
    *,
    generation: Tensor | None = None,
    written: int = 0,
    capacity: int = 1,
) -> list[Tensor]:
    """Copies of the rows `index`, and the generations of a ring.

    Args:
        kernel: the compiled kernels.
        columns: [capacity, ...].
        sizes: `steps` of the columns.
        like: `likes` of the columns for so many rows.
        index: slots that exist, int64 [B], contiguous.
        generation: for the `generation_of` the rows, int64 [B], if that is wanted.
        written: how many rows were ever written to the ring.
        capacity: of the ring.

    Returns:
        Contiguous tensors [B, ...].
    """
    out, first, to = _copies(columns, like)
    kernel.gather(
        first.buffer_info()[0],
        sizes.data_ptr(),
        len(out),
        index.data_ptr(),
        index.numel(),
        to.buffer_info()[0],
        written,
        capacity,
        0 if generation is None else generation.data_ptr(),
    )
    return out


def scatter_at(
    kernel: ModuleType,
    columns: Iterable[Tensor],
    sizes: Tensor,
    new: Sequence[Tensor],
    row: Tensor,
) -> None:
    """Copy rows to the rows `row`, int64 [n]; the other arguments are those of `scatter`.

    The kernels are those for many buffers, here and in `gather_each`.
    """
    first, source = _addresses(columns), _sources(new)
    kernel.scatter(
        first.buffer_info()[0],
        sizes.data_ptr(),
        len(new),
        row.data_ptr(),
        len(row),
        source.buffer_info()[0],
    )


def gather_each(
    kernel: ModuleType,
    columns: Iterable[Tensor],
    sizes: Tensor,
    like: Sequence[Tensor],
    index: Tensor,
    *,
    written: Tensor,
    capacity: int,
) -> tuple[list[Tensor], Tensor]:
    """`gather` from S rings, one after the other: `index` [S, B], `written` int64 [S].

    Returns:
        Contiguous tensors [S, B, ...], and generations, int64 [S, B].
    """
    out, first, to = _copies(columns, like)
    generation = torch.empty_like(index)
    kernel.gather(
        first.buffer_info()[0],
        sizes.data_ptr(),
        len(out),
        index.data_ptr(),
        *index.shape,
        capacity,
        to.buffer_info()[0],
        written.data_ptr(),
        generation.data_ptr(),
    )
    return out, generation
