"""The structure of transitions on its way from a writer through the shards to the learner.

Nested batch sizes and names travel as JSON, which shards read and their files keep. Tensorclasses
travel beside it as a pickle, which only the learner opens: shards need not have the classes, and
their files hold no code.
"""

import pickle
from typing import NamedTuple

from ray import cloudpickle

from per_td.errors import SchemaError
from per_td.storage.leaves import named
from per_td.storage.structure import Structure


class Told(NamedTuple):
    """A `Structure` for the wire."""

    nodes: str
    """JSON: see `Structure.state`."""
    name: str
    """The nodes and the names of the tensorclasses; equal for equal structures."""
    classes: bytes
    """A pickle of the tensorclasses by key; empty if there are none."""


def tell(structure: Structure) -> Told:
    """Make a structure ready for the wire.

    Raises:
        SchemaError: a tensorclass cannot be pickled.
    """
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
