"""Transitions as numpy arrays, which Ray ships without pickling their content.

Ray puts the bytes of an array into its object store as they are, and a reader on the same machine
gets a read-only view of them. `tensor` makes such a view a tensor without a copy; the storage of
the shard, or the learner's join, then makes the only one.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from per_td.storage.leaves import Key, Leaves

Array = np.ndarray[Any, Any]

Packed = list[tuple[Key, str, Array]]
"""Key, torch dtype and numbers of each leaf."""

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class _Readable:
    """An array's memory, declared writable, as torch.from_numpy demands."""

    def __init__(self, kept: Array) -> None:
        self._kept = kept  # the memory lives as long as this object, the view's base
        interface = kept.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def tensor(values: Array) -> Tensor:
    """A tensor on the memory of an array, which may be read-only: never write to it."""
    if not values.flags.writeable:
        values = np.asarray(_Readable(values))
    return torch.from_numpy(values)


def array(values: Tensor) -> Array:
    """The numbers of a tensor on the CPU; those of dtypes that numpy lacks as integers."""
    values = values.detach().cpu().resolve_neg().resolve_conj().contiguous()
    try:
        found: Array = values.numpy()
    except TypeError:  # bfloat16, complex32 and the float8 kinds
        found = values.view(_AS_INTEGERS[values.itemsize]).numpy()
    return found


def pack(leaves: Leaves) -> Packed:
    """Leaves [n, ...] for the wire."""
    return [
        (key, str(leaf.dtype).removeprefix("torch."), array(leaf)) for key, leaf in leaves.items()
    ]


def unpack(packed: Packed) -> Leaves:
    """The leaves in `packed`, in its memory: never write to them."""
    leaves: Leaves = {}
    for key, dtype, values in packed:
        leaf = tensor(values)
        kind = getattr(torch, dtype)
        leaves[key] = leaf if leaf.dtype is kind else leaf.view(kind)
    return leaves


def joined(parts: list[Packed]) -> Packed:
    """The rows of all parts, which have the same keys, one after the other, in new memory."""
    columns = [{key: values for key, _, values in packed} for packed in parts]
    return [
        (key, dtype, np.concatenate([column[key] for column in columns]))
        for key, dtype, _ in parts[0]
    ]


def rows(packed: Packed, begin: int, end: int) -> Packed:
    """The rows from `begin` up to `end`, in the memory of `packed`."""
    return [(key, dtype, values[begin:end]) for key, dtype, values in packed]


def nbytes(packed: Packed) -> int:
    """Bytes of all numbers."""
    return sum(values.nbytes for _, _, values in packed)
