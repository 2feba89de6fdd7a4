"""The only door to compiled code: it takes tensors and passes on addresses.

The operations of `per_td.kernels.reference`, with the same arguments. Each checks device, dtype,
contiguity and length of every tensor before it passes the address on. A kernel checks the slots and
values that it reads before it writes. If it refuses, the reference raises the error.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from per_td.errors import PerTdError
from per_td.kernels import parts as option
from per_td.kernels import reference
from per_td.kernels.cpu import draw as draws
from per_td.kernels.cpu import frame_search, update
from per_td.kernels.cpu import rows as row_kernels
from per_td.kernels.cpu.compiling import Kernel
from per_td.kernels.cpu.memory import FRAMES, ROWS, TREES
from per_td.kernels.parts import Distribution, Frames, Rows, Trees
from per_td.kernels.reference import Runs, for_new, mark_replayed, weigh
from per_td.validation import plain_rows

__all__ = [
    "assign",
    "assign_new",
    "draw",
    "draw_distinct",
    "draw_rows",
    "find",
    "for_new",
    "gather",
    "mark_replayed",
    "refill",
    "set_masses",
    "store_frames",
    "weigh",
    "write_rows",
]

_CPU, _ONE = torch.device("cpu"), torch.Size([])
_NORMALIZATIONS = {"batch": 0, "buffer": option.BY_BUFFER, "none": option.BY_SIZE}


# --- addresses ------------------------------------------------------------------------------------


def _address(tensor: Tensor, dtype: torch.dtype, length: int) -> int:
    """Address of the numbers of a contiguous tensor on the CPU, or PerTdError."""
    if not (
        tensor.is_cpu
        and tensor.dtype is dtype
        and tensor.is_contiguous()
        and tensor.numel() == length
    ):
        raise PerTdError(
            f"expected contiguous memory of {length} {dtype} on the CPU, got {tensor.numel()}"
            f" {tensor.dtype} on {tensor.device}"
        )
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # so torch refuses in its transforms
        address = 0
    if not address and length:
        raise PerTdError(
            f"expected a tensor with memory of its own, got {type(tensor).__name__} without:"
            " such as results of collectives, of which clone() makes a plain one, and tensors"
            " inside of torch.func.grad and vmap"
        )
    return address


def _each(total: int, groups: int) -> int:
    """Divide `total` numbers by the groups, without a rest."""
    n, left = divmod(total, groups)
    if left:
        raise PerTdError(f"expected as many numbers for each of {groups} groups, got {total}")
    return n


def _numbers(written: Tensor | int, groups: int) -> tuple[int, Any]:
    """Address of one int64 per group, and the object that owns the memory."""
    if isinstance(written, Tensor):
        return _address(written, torch.int64, groups), written
    kept = array("q", [written]) * groups
    return kept.buffer_info()[0], kept


def _exponents(beta: Tensor | float, groups: int) -> tuple[float, int]:
    """Give one number for all groups and 0, or the address of one float64 per group."""
    if groups == 1 or not isinstance(beta, Tensor):
        return float(beta), 0
    return 0.0, _address(beta, torch.float64, groups)


def _trees_record(trees: Trees) -> int:
    """Address of the trees' record, which is made anew when their memory has moved."""
    block, base = trees.block, trees.leaves.data_ptr()
    if block.record is None or block.record[0] != base:
        block.record = base, *_new_trees_record(trees)
    address: int = block.record[1]
    return address


def _new_trees_record(trees: Trees) -> tuple[int, Any, Any]:
    layout = trees.layout
    levels = np.array([layout.offsets, layout.widths], np.int64)
    record = np.zeros(1, TREES)
    for name, view in trees.block.views.items():
        if name != "refused":  # kernels refuse by an error
            record[name] = view.data_ptr()
    for name in ("raw", "replayed", "snapshot"):
        record[f"{name}_length"] = len(trees.block[name])
    for name in ("leaf_slots", "node_slots", "groups", "capacity", "stride", "width", "height"):
        record[name] = getattr(layout, name)
    record["levels"], record["depth"] = levels.ctypes.data, len(layout.widths)
    return record.ctypes.data, record, levels


def _record_of(owner: Any, parts: Sequence[Tensor], make: Any) -> Any:
    """Find the record of rows or frames, which is made anew when a part has moved."""
    bases = list(map(Tensor.data_ptr, parts))
    record = owner.record
    if record is None or record.bases != bases:
        record = owner.record = make(owner, bases)
    return record


class _RowsRecord:
    """The record of rows for columns at the addresses `bases`.

    Attributes:
        kinds: dtype and numbers per row of each column.
        spans: first address of each column, and the one after its last.
        low, high: bounds of all spans; other memory may lie between columns.
        likes: templates of the last batch gathered, then of its generations, slots and weights.
        versions: columns whose version counters stand for all; views of one memory share theirs.
    """

    def __init__(self, rows: Rows, bases: list[int]) -> None:
        fields = np.empty((len(bases), 3), np.int64)
        self.spans: list[tuple[int, int]] = []
        for field, base, column in zip(fields, bases, rows.columns, strict=True):
            step = column.stride(0) * column.itemsize
            length = column.shape[1:].numel() * column.itemsize
            if not (column.is_cpu and column[:1].is_contiguous()):
                raise PerTdError(
                    "expected columns on the CPU whose rows lie in one piece of memory"
                )
            if len(column) < rows.groups * rows.capacity or (length and not base):
                raise PerTdError(
                    f"expected columns of {rows.groups * rows.capacity} rows, got {len(column)}"
                )
            field[:] = base, step, length
            self.spans.append((base, base + len(column) * step))
        record = np.zeros(1, ROWS)
        record["fields"], record["count"] = fields.ctypes.data, len(fields)
        record["groups"], record["capacity"] = rows.groups, rows.capacity
        self.bases, self.low, self.high = bases, min(bases), max(end for _, end in self.spans)
        self.address, self._memory = record.ctypes.data, (record, fields)
        self.kinds = [(column.dtype, column.shape[1:].numel()) for column in rows.columns]
        self.likes: list[Tensor] = []
        storages = {column.untyped_storage()._cdata for column in rows.columns}
        self.versions = rows.columns[:1] if len(storages) == 1 else rows.columns

    def holds(self, address: int) -> bool:
        """True if an address lies in a column."""
        return any(base <= address < end for base, end in self.spans)

    def empty(self, rows: Rows, shape: torch.Size, beside: int) -> list[Tensor]:
        """Empty rows of this shape, and the first `beside` of generations, slots and weights.

        `empty_like` takes half the time of `empty`.
        """
        likes = self.likes
        if not likes or likes[-1].shape != shape:
            kinds = [(column.shape[1:], column.dtype) for column in rows.columns]
            kinds += [(_ONE, dtype) for dtype in (torch.int64, torch.int64, torch.float32)]
            likes = self.likes = [
                torch.empty(*shape, *rest, dtype=dtype, device="cpu") for rest, dtype in kinds
            ]
        return list(map(torch.empty_like, likes[: len(likes) - 3 + beside]))


def prepare() -> None:
    """Compile the kernels of a buffer's usual calls."""
    for kernel in (update.assign, update.assign_new, row_kernels.write, draws.draw_rows):
        if isinstance(kernel, Kernel):
            kernel.ready()


# --- operations -----------------------------------------------------------------------------------


def refill(trees: Trees) -> None:
    """See `reference.refill`."""
    update.refill(_trees_record(trees))


def set_masses(trees: Trees, index: Tensor, value: Tensor) -> None:
    """See `reference.set_masses`."""
    index, value, total = index.contiguous(), value.contiguous(), index.numel()
    at, new = _address(index, torch.int64, total), _address(value, torch.float32, total)
    if not update.set_masses(_trees_record(trees), at, new, _each(total, trees.layout.groups)):
        reference.set_masses(trees, index, value)


def assign_new(trees: Trees, distribution: Distribution, runs: Runs, *, ever_max: bool) -> None:
    """See `reference.assign_new`."""
    if len(runs) != 2 * trees.layout.groups or runs.itemsize != 8:
        raise PerTdError(f"expected {trees.layout.groups} runs, got {len(runs) / 2:g}")
    where = runs.buffer_info()[0]
    if not update.assign_new(_trees_record(trees), where, option.EVER_MAX if ever_max else 0):
        reference.assign_new(trees, distribution, runs, ever_max=ever_max)


def assign(
    trees: Trees,
    distribution: Distribution,
    index: Tensor,
    value: Tensor | None,
    *,
    written: Tensor | int,
    limit: int,
    generation: Tensor | None = None,
    stamps: Tensor | None = None,
    mask: Tensor | None = None,
    add_eps: bool = False,
    squared: bool = False,
    new: bool = False,
    ever_max: bool = False,
) -> Tensor | int:
    """See `reference.assign`."""
    total, groups = index.numel(), trees.layout.groups
    options = (
        (add_eps and option.ADD_EPS)
        | (squared and option.SQUARED)
        | (new and option.NEW)
        | (ever_max and option.EVER_MAX)
    )
    index = index.contiguous()
    at, values, then, wanted, stamp = _address(index, torch.int64, total), 0, 0, 0, 0
    if value is not None:
        value = value.contiguous()
        values, options = _address(value, torch.float32, total), options | option.VALUE
    if generation is not None:
        generation = generation.contiguous()
        then, options = _address(generation, torch.int64, total), options | option.GENERATION
    if mask is not None:
        mask = mask.contiguous()
        wanted, options = _address(mask, torch.bool, total), options | option.MASK
    if stamps is not None:
        if groups != 1 or generation is None:
            raise PerTdError("expected one group and a generation beside stamps")
        stamp, options = _address(stamps, torch.int64, limit), options | option.STAMPS
    ever, _kept = _numbers(written, groups)
    if limit > trees.layout.capacity:
        raise PerTdError(f"expected a limit of at most {trees.layout.capacity}, got {limit}")
    record, n = _trees_record(trees), _each(total, groups)
    dropped: int = update.assign(record, at, values, then, wanted, ever, stamp, n, limit, options)
    if dropped >= 0:
        return dropped
    return reference.assign(
        trees,
        distribution,
        index,
        value,
        written=written,
        limit=limit,
        generation=generation,
        stamps=stamps,
        mask=mask,
        add_eps=add_eps,
        squared=squared,
        new=new,
        ever_max=ever_max,
    )


def find(trees: Trees, target: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.find`."""
    target = target.clone(memory_format=torch.contiguous_format)  # the kernel uses it up
    total = target.numel()
    points = _address(target, torch.float64, total), _each(total, trees.layout.groups)
    index, mass = torch.empty_like(target, dtype=torch.int64), target.float()
    to = _address(index, torch.int64, total), _address(mass, torch.float32, total)
    draws.find(_trees_record(trees), *points, *to)
    return index, mass


def draw(
    trees: Trees,
    point: Tensor,
    *,
    stratified: bool,
    beta: Tensor | float,
    normalization: str,
    written: Tensor | int,
) -> tuple[Tensor, Tensor] | None:
    """See `reference.draw`; overwrites `point`."""
    total, groups = point.numel(), trees.layout.groups
    points = _address(point, torch.float64, total), _each(total, groups)
    index = torch.empty_like(point, dtype=torch.int64)
    weight = torch.empty_like(point, dtype=torch.float32)
    ever, _kept = _numbers(written, groups)
    options = _NORMALIZATIONS[normalization] | (stratified and option.STRATIFIED)
    weighing = *_exponents(beta, groups), ever
    to = index.data_ptr(), weight.data_ptr()
    empty = draws.draw(_trees_record(trees), *points, *weighing, *to, options)
    return None if empty else (index, weight)


def draw_distinct(
    trees: Trees, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.draw_distinct`."""
    total = trees.layout.groups * n
    point = reference.distinct_points(trees, n, generator)
    points = _address(point, torch.float64, point.numel()), point.shape[1]
    index = torch.empty((trees.layout.groups, n), dtype=torch.int64, device=_CPU)
    mass = torch.empty_like(index, dtype=torch.float32)
    to = _address(index, torch.int64, total), _address(mass, torch.float32, total)
    if draws.draw_distinct(_trees_record(trees), *points, n, *to):
        return reference.first_distinct(trees, index, mass, n, generator)
    return index, mass, None


def _addresses(tensors: Sequence[Tensor]) -> "array[int]":
    try:
        return array("q", map(Tensor.data_ptr, tensors))
    except RuntimeError as error:
        raise PerTdError(f"expected tensors with memory of their own, got {error}") from error


def gather(rows: Rows, index: Tensor, *, written: Tensor | int | None) -> tuple[list[Tensor], Any]:
    """See `reference.gather`."""
    index, total = index.contiguous(), index.numel()
    at, n = _address(index, torch.int64, total), _each(total, rows.groups)
    record = _record_of(rows, rows.columns, _RowsRecord)
    wanted = written is not None
    out = record.empty(rows, index.shape, int(wanted))
    to, options = _addresses(out), wanted and option.GENERATION
    ever, _kept = _numbers(written if written is not None else 0, rows.groups)
    if not row_kernels.gather(record.address, at, n, to.buffer_info()[0], ever, to[-1], options):
        return reference.gather(rows, index, written=written)
    return out, out.pop() if wanted else None


def draw_rows(
    trees: Trees,
    rows: Rows,
    point: Tensor,
    *,
    stratified: bool,
    beta: Tensor | float,
    normalization: str,
    written: Tensor | int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor] | None:
    """Draw slots as `draw`, and copy their rows; overwrites `point`.

    Returns:
        Rows, slots, weights and generations; None if a tree has only masses of 0.
    """
    total, groups = point.numel(), trees.layout.groups
    if rows.groups != groups or rows.capacity != trees.layout.capacity:
        raise PerTdError(f"expected rows for the slots of {groups} trees, got other ones")
    points = _address(point, torch.float64, total), _each(total, groups)
    record = _record_of(rows, rows.columns, _RowsRecord)
    out = record.empty(rows, point.shape, 3)
    ever, _kept = _numbers(written, groups)
    options = _NORMALIZATIONS[normalization] | (stratified and option.STRATIFIED)
    weighing = *_exponents(beta, groups), ever
    to = _addresses(out)
    records = _trees_record(trees), record.address
    empty = draws.draw_rows(*records, *points, *weighing, to.buffer_info()[0], options)
    if empty:
        return None
    *found, generation, index, weight = out
    return found, index, weight, generation


def write_rows(
    rows: Rows,
    new: Sequence[Tensor],
    n: int,
    runs: Runs,
    *,
    mask: Tensor | None = None,
    stamps: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    """See `reference.write_rows`."""
    total, options, wanted, stamp, at = rows.groups * n, 0, 0, 0, 0
    if len(new) != len(rows.columns) or len(runs) != 2 * rows.groups or runs.itemsize != 8:
        raise PerTdError(f"expected {len(rows.columns)} columns and {rows.groups} runs")
    sources = array("q")
    record = _record_of(rows, rows.columns, _RowsRecord)
    low, high = record.low, record.high
    kept = []  # keeps clones until the kernel has read them
    for (dtype, numbers), leaf in zip(record.kinds, new, strict=True):
        usual = leaf.is_cpu and leaf.dtype is dtype and leaf.is_contiguous()
        usual = usual and leaf.numel() == total * numbers
        try:
            address = leaf.data_ptr() if usual and not (leaf.is_neg() or leaf.is_conj()) else 0
        except RuntimeError:  # so torch refuses in its transforms
            address = 0
        if not address:
            leaf = plain_rows(leaf, _CPU)
            kept.append(leaf)
            address = _address(leaf, dtype, total * numbers)
        # rows of the ring itself would be overwritten; the kernel fills `index` before it reads it
        if low <= address < high and leaf is not index and record.holds(address):
            kept.append(leaf.clone())
            address = kept[-1].data_ptr()
        sources.append(address)
    if mask is not None:
        mask = mask.contiguous()
        wanted, options = _address(mask, torch.bool, total), option.MASK
    if stamps is not None and index is not None:
        stamp = _address(stamps, torch.int64, rows.groups * rows.capacity)
        at, options = _address(index, torch.int64, total), options | option.STAMPS
    where = sources.buffer_info()[0], n, runs.buffer_info()[0]
    if not row_kernels.write(record.address, *where, wanted, stamp, at, options):
        reference.write_rows(rows, new, n, runs, mask=mask, stamps=stamps, index=index)
    increment_version(record.versions)  # autograd does not see these writes


class _FramesRecord:
    """The record of frames at the addresses `bases`; `likes` are templates of what was found."""

    def __init__(self, frames: Frames, bases: list[int]) -> None:
        rows, words, length = frames.envs + 1, len(frames.factors), frames.recent.shape[-1]
        sizes = {
            "lanes": (frames.size + 1) * words,
            "factors": words,
            "recent": 3 * rows * length,
            "counters": 4 * rows,
            "page": 2,
        }
        record = np.zeros(1, FRAMES)
        for name, size in sizes.items():
            record[name] = _address(getattr(frames, name), torch.int64, size)
        for name in ("size", "depth", "envs", "look_back"):
            record[name] = getattr(frames, name)
        record["words"], record["length"] = words, length
        self.bases, self.address, self._memory = bases, record.ctypes.data, record
        self.likes: list[Tensor] = []


def store_frames(
    frames: Frames, stacks: Sequence[Tensor], env: Tensor
) -> tuple[list[Tensor], Tensor]:
    """See `reference.store_frames`."""
    if frames.lanes.dtype is not torch.int64 or len(stacks) != 2:  # frames of 8 n bytes alone
        return reference.store_frames(frames, stacks, env)
    parts = frames.lanes, frames.factors, frames.recent, frames.counters, frames.page
    record = _record_of(frames, parts, _FramesRecord)
    env = env.contiguous()  # named, as it must live until the kernel has read it
    n, depth = env.numel(), frames.depth
    length = n * depth * frames.lanes.shape[1] * 8
    sources, kept = array("q"), []  # keeps copies until the kernel has read them
    for stack in stacks:
        rows = plain_rows(stack, _CPU)
        if rows.nbytes != length:
            raise PerTdError(f"expected stacks of {length} bytes, got {rows.nbytes}")
        address = rows.data_ptr()
        if address % 8:
            rows = rows.clone()
            address = rows.data_ptr()
        kept.append(rows)
        sources.append(address)
    if not record.likes or len(record.likes[1]) != n:
        record.likes = [
            torch.empty((n, depth), dtype=torch.int32, device=_CPU),
            torch.empty(n, dtype=torch.int64, device=_CPU),
        ]
    places, low = record.likes
    found, oldest = [torch.empty_like(places), torch.empty_like(places)], torch.empty_like(low)
    to = array("q", map(Tensor.data_ptr, found))
    where = sources.buffer_info()[0], _address(env, torch.int64, n), n
    if not frame_search.store(record.address, *where, to.buffer_info()[0], oldest.data_ptr()):
        raise PerTdError(f"env: expected numbers below {frames.envs}, got others")
    increment_version(frames.lanes)
    return found, oldest
