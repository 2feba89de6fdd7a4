"""Structure: the nested nodes of a transition, so that batches come out as data went in."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor

from per_td.storage.leaves import Key, nested, tensordict_of


class Node(NamedTuple):
    """A TensorDict, a tensorclass or a dict inside a transition.

    Attributes:
        batch: its batch dimensions after those of the transitions.
        names: the names of these dimensions, if they have any.
        kind: its tensorclass; None for a TensorDict.
    """

    batch: tuple[int, ...] = ()
    names: tuple[str | None, ...] | None = None
    kind: Any = None


class Structure:
    """The nodes of a transition that nested keys alone do not tell: all but plain, filled ones.

    Args:
        nodes: by key, parents before children.
    """

    def __init__(self, nodes: Mapping[Key, Node] | None = None) -> None:
        self.nodes = dict(nodes or {})

    @classmethod
    def of(cls, transitions: Any, dims: int) -> "Structure":
        """Read the structure of transitions that have `dims` dimensions of their own."""
        nodes: dict[Key, Node] = {}
        _collect(transitions, (), dims, nodes)
        return cls(nodes)

    def assembled(
        self,
        leaves: Iterable[tuple[Key, Tensor]],
        beside: dict[str, Tensor],
        size: torch.Size,
        device: torch.device,
    ) -> TensorDict:
        """A TensorDict of leaves [*size, ...], with the tensors `beside` at its root."""
        tree = nested(leaves)
        if self.nodes:
            for key, node in reversed(self.nodes.items()):  # children before parents
                at = tree
                for name in key[:-1]:
                    at = at.setdefault(name, {})
                at[key[-1]] = _made(node, at.get(key[-1], {}), size, device)
        tree.update(beside)
        return tensordict_of(tree, size, device)

    def state(self) -> str:
        """JSON for a file: key, batch and names of each node. A file holds no code, so no class."""
        return json.dumps([[key, node.batch, node.names] for key, node in self.nodes.items()])

    @classmethod
    def from_state(cls, state: str) -> "Structure":
        """Read what `state` gave, or raise ValueError; tensorclasses are TensorDicts now."""
        nodes: dict[Key, Node] = {}
        try:
            for key, batch, names in json.loads(state):
                sizes = all(type(size) is int and size >= 0 for size in batch)
                named = names is None or (
                    len(names) == len(batch) and all(isinstance(n, str | None) for n in names)
                )
                if not (key and all(isinstance(name, str) for name in key) and sizes and named):
                    raise ValueError(f"expected key, sizes and names, got {key, batch, names}")
                nodes[tuple(key)] = Node(tuple(batch), None if names is None else tuple(names))
        except TypeError as error:
            raise ValueError(f"expected a list of nodes: {error}") from error
        return cls(nodes)


def _collect(source: Any, key: Key, dims: int, nodes: dict[Key, Node]) -> None:
    if key:
        nodes[key] = Node()
    kind = None
    if is_tensorclass(source):
        kind, source = type(source), source._tensordict
    if isinstance(source, TensorDictBase) and key:
        names = tuple(source.names[dims:])
        named = names if any(name is not None for name in names) else None
        nodes[key] = Node(tuple(source.batch_size[dims:]), named, kind)
    filled = False
    for name in source.keys():  # noqa: SIM118  of a TensorDict
        value, filled = source.get(name), True
        if not isinstance(value, Tensor) and (is_tensorclass(value) or isinstance(value, Mapping)):
            _collect(value, (*key, name), dims, nodes)
    if key and filled and nodes[key] == Node():
        del nodes[key]


def _made(node: Node, entries: dict[str, Any], size: torch.Size, device: torch.device) -> Any:
    made = tensordict_of(entries, torch.Size([*size, *node.batch]), device)
    if node.names is not None:
        made.names = [*[None] * len(size), *node.names]
    return made if node.kind is None else node.kind.from_tensordict(made)
