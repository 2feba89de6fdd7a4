"""All that travels between the actors: transitions, their structure, and errors.

Transitions are numpy arrays, which Ray ships without pickling their content: it puts the bytes of
an array into its object store as they are, and a reader on the same machine gets a read-only view
of them. `tensor` makes such a view a tensor without a copy; the storage of the shard, or the
learner's join, then makes the only one.

Nested batch sizes and names travel as JSON, which shards read and their files keep. Tensorclasses
travel beside it as a pickle, which only the learner opens: shards need not have the classes, and
their files hold no code.
"""

import pickle
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor

from per_td.errors import PerTdError, SchemaError
from per_td.storage.leaves import Key, Leaves, named
from per_td.storage.structure import Structure

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


def nbytes(packed: Packed) -> int:
    """Bytes of all numbers."""
    return sum(values.nbytes for _, _, values in packed)


class Told(NamedTuple):
    """A `Structure` for the wire."""

    nodes: str  # JSON: see `Structure.state`
    name: str  # the nodes and the names of the tensorclasses; equal for equal structures
    classes: bytes  # a pickle of the tensorclasses by key; empty if there are none


def tell(structure: Structure) -> Told:
    """Make a structure ready for the wire; SchemaError if a tensorclass cannot be pickled."""
    kinds = {key: node.kind for key, node in structure.nodes.items() if node.kind is not None}
    nodes = structure.state()
    names = [f"{key}: {kind.__module__}.{kind.__qualname__}" for key, kind in kinds.items()]
    try:
        classes = cloudpickle.dumps(kinds) if kinds else b""
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        keys = ", ".join(map(named, kinds))
        raise SchemaError(f"{keys}: expected a tensorclass that can be pickled: {error}") from error
    return Told(nodes, "; ".join([nodes, *names]), classes)


PLAIN = tell(Structure())


def understood(told: Told) -> Structure:
    """Read what `tell` made; tensorclasses that this process lacks become TensorDicts."""
    structure = Structure.from_state(told.nodes)
    try:
        kinds = pickle.loads(told.classes) if told.classes else {}
    except (ImportError, AttributeError):
        kinds = {}
    for key, kind in kinds.items():
        structure.nodes[key] = structure.nodes[key]._replace(kind=kind)
    return structure


class ShardError(PerTdError, RuntimeError):
    """Shards do not answer, or did not start."""


def get(answers: Any, **options: Any) -> Any:
    """Call `ray.get`; an error of per_td that a shard raised comes without Ray's traceback."""
    try:
        return ray.get(answers, **options)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, PerTdError) else error) from None
