"""Memory layouts of transitions: a column per field, or one record per transition.

Reading a transition from columns touches a place in memory per field, a record only one or two.
Every field is a tensor [capacity, ...] either way, a view into one block.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("auto", "columns", "records")

# layout="auto" takes records, on the CPU with compiled kernels, up to this many bytes each: larger
# rows of columns are several cache lines anyway, and writing records costs more than reading them
# gains. Medians on one core of an AMD EPYC, microseconds, columns / records:
#   bytes of a transition             45        77       269     1,037     4,109    14,125
#   read 256 at random           30 / 26   30 / 25   53 / 35   63 / 51  153 / 134  434 / 386
#   write 1,000                  10 / 14   10 / 12   16 / 23   41 / 58  172 / 238  882 / 1,025
# In plain torch, where a batch has to be taken apart, records lose: 50 / 69 for 77 bytes.
RECORDS_UP_TO = 1024

SHARED_FROM = 2**20
"""Bytes from which torch's threads copy columns faster than one thread with a kernel."""

_ALIGNMENT = 16
_CACHE_LINE = 64


@dataclass(frozen=True)
class Field:
    """One tensor of a transition.

    Args:
        key: its names in the TensorDict, from the outside in.
        shape: shape without the batch dimension.
        dtype: dtype of its elements.
    """

    key: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes per transition."""
        return math.prod(self.shape) * self.dtype.itemsize


def resolve_layout(
    layout: str, fields: list[Field], *, compiled: bool, mapped: bool = False
) -> str:
    """Choose the layout for "auto"; return any other `layout` as it is.

    In `mapped` files, each place touched costs a page read from the disk.
    """
    if layout != "auto":
        return layout
    small = sum(field.bytes for field in fields) <= RECORDS_UP_TO
    return "records" if compiled and (small or mapped) else "columns"


def _offsets(fields: list[Field]) -> tuple[list[int], int]:
    """Offset of each field in a record, and the length of the record, in bytes.

    The largest elements come first, so that each is aligned without gaps.
    """
    offsets, end = [0] * len(fields), 0
    for i in sorted(range(len(fields)), key=lambda i: -fields[i].dtype.itemsize):
        offsets[i] = end
        end += fields[i].bytes
    return offsets, max(1, -(-end // _ALIGNMENT)) * _ALIGNMENT


def _starts(fields: list[Field], rows: int) -> list[int]:
    """Offset of each column of `rows` rows in the block, and the end, in bytes."""
    starts = [0]
    for field in fields:
        starts.append(starts[-1] + -(-rows * field.bytes // _CACHE_LINE) * _CACHE_LINE)
    return starts


def bytes_of(layout: str, fields: list[Field], rows: int) -> int:
    """Length of the block for `rows` transitions, in bytes."""
    if layout == "records":
        return rows * _offsets(fields)[1]
    return max(_starts(fields, rows)[-1], 1)


def views_of(layout: str, fields: list[Field], block: Tensor, rows: int) -> list[Tensor]:
    """View the fields of `rows` transitions, [rows, ...] each, in a block of bytes.

    The block is uint8 [bytes_of(layout, fields, rows)].
    """
    if layout == "columns":
        return [
            block[start : start + rows * field.bytes].view(field.dtype).view(rows, *field.shape)
            for field, start in zip(fields, _starts(fields, rows)[:-1], strict=True)
        ]
    offsets, length = _offsets(fields)
    records = block.view(rows, length)
    return [
        records[:, start : start + field.bytes].view(field.dtype).view(rows, *field.shape)
        for field, start in zip(fields, offsets, strict=True)
    ]
