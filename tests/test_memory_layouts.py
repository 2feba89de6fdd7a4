"""The same numbers in other memory layouts, dtypes and classes give the same results.

What cannot be read as numbers, one after the other, is refused by name, and nothing is written.
"""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from per_td import PerTdError, PrioritizedReplayBuffer, SumTree, kernels

CAPACITY, MANY = 8, 3


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions in the other order in memory; of one dimension, every third."""
    if x.ndim < 2:
        return torch.stack([x, x, x], -1)[..., 1]
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def first_two_swapped(x: Tensor) -> Tensor:
    return x if x.ndim < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def negated(x: Tensor) -> Tensor:
    """Lazily negated: in memory, the signs are wrong."""
    return x if x.dtype == torch.bool else torch._neg_view(-x)


def reversed_array(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy()[::-1])[::-1]


LAYOUTS = {
    "transposed": transposed,
    "first two swapped": first_two_swapped,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "expanded": lambda x: x[:1].expand_as(x),
    "all the same": lambda x: x.flatten()[0].expand_as(x) if x.numel() else x,
    "negated": negated,
    "negated and strided": lambda x: transposed(negated(x)),
    "parameter": lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    "result of a network": lambda x: 1 * x.requires_grad_() if x.is_floating_point() else x,
}
VALUES = {
    "reversed array": reversed_array,
    "list": Tensor.tolist,
    "other dtype": lambda x: {torch.float32: x.double(), torch.int64: x.int()}.get(x.dtype, x),
    "trailing dimension": lambda x: x.unsqueeze(-1) if x.is_floating_point() else x,
}
"""For what need not be a tensor of one dtype."""


def plain(laid, like: Tensor) -> Tensor:
    """The same numbers one after the other, of the shape and dtype that they were laid out from."""
    laid = torch.as_tensor(np.ascontiguousarray(laid) if isinstance(laid, np.ndarray) else laid)
    copy = laid.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return copy.to(like.dtype).view(like.shape)


def leading(many: int | None) -> tuple[int, ...]:
    return () if many is None else (many,)


def buffer(many: int | None, **settings) -> PrioritizedReplayBuffer:
    seeded = torch.Generator().manual_seed(5)
    return PrioritizedReplayBuffer(CAPACITY, 5, num_buffers=many, generator=seeded, **settings)


def leaves(many: int | None, n: int) -> dict[tuple[str, ...], Tensor]:
    shape = (*leading(many), n)
    return {
        ("x",): torch.rand(*shape, 2, 3) - 0.5,
        ("deep", "y"): torch.randint(-99, 99, shape),
        ("deep", "z"): torch.rand(shape) > 0.5,
    }


def tensordict(leaves: dict[tuple[str, ...], Tensor], *size: int) -> TensorDict:
    return TensorDict({}, batch_size=[*size]).update(dict(leaves.items()))


def assert_equal(one, other) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | TensorDict):
        assert set(one.keys()) == set(other.keys())
        for key, value in one.items():
            assert_equal(value, other[key])
    else:
        assert one == other


def run(many: int | None, laid, value) -> tuple[dict, TensorDict]:
    """The state after a few calls of all that writes, and a batch drawn then.

    Args:
        many: number of buffers.
        laid: applied to transitions.
        value: applied to all else.
    """
    torch.manual_seed(1)
    made, lead = buffer(many), leading(many)

    def mask(shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {} if many is None else {"mask": value(torch.rand(shape) > 0.3)}

    for write in ("extend", "extend_leaves", "extend"):
        new = {key: laid(leaf) for key, leaf in leaves(many, 5).items()}
        data = new if write == "extend_leaves" else tensordict(new, *lead, 5)
        priority = value(torch.rand(*lead, 5))
        getattr(made, write)(data, priority, **mask((*lead, 5)))
    for _ in range(3):
        one = {key: leaf.squeeze(len(lead)) for key, leaf in leaves(many, 1).items()}
        one = {key: laid(leaf) if leaf.ndim else leaf for key, leaf in one.items()}
        priority = torch.rand(lead)
        made.add(tensordict(one, *lead), value(priority) if lead else priority, **mask(lead))
    for _ in range(3):
        index = torch.randint(int(made.lengths.min()), (*lead, 6))
        error, generation = torch.randn(index.shape), torch.randint(3, index.shape)
        given = value(index), value(error), value(generation)
        made.update_priority(*given, **mask(index.shape))
        made.update_priority(value(index.flip(-1)), value(error))
    return made.state_dict(), made.sample()


@pytest.fixture(params=["auto", "off"])
def choice(request, monkeypatch) -> str:
    """Whether there are kernels."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("many", [None, MANY])
@pytest.mark.parametrize("name", [*LAYOUTS, *VALUES])
def test_a_buffer_reads_the_same_numbers_in_any_layout_alike(name, many, choice):
    laid = LAYOUTS.get(name, Tensor.clone)
    value = LAYOUTS.get(name) or VALUES[name]
    found = run(many, laid, value)
    expected = run(many, lambda x: plain(laid(x), x), lambda x: plain(value(x), x))
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("many", [None, MANY])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_state_is_taken_over_from_any_layout_alike(name, many, choice):
    made = buffer(many)
    made.extend_leaves(leaves(many, 7), torch.rand(*leading(many), 7))

    def laid(value, layout):
        if isinstance(value, dict):
            return {key: laid(part, layout) for key, part in value.items()}
        many_numbers = isinstance(value, Tensor) and value.ndim and value.dtype != torch.uint8
        return layout(value) if many_numbers else value

    state, twins = made.state_dict(), []
    for layout in (LAYOUTS[name], lambda x: plain(LAYOUTS[name](x), x)):
        twins.append(buffer(many))
        twins[-1].load_state_dict(laid(state, layout))
    assert_equal(twins[0].state_dict(), twins[1].state_dict())
    assert_equal(twins[0].sample(), twins[1].sample())


@pytest.mark.parametrize("trees", [None, MANY])
@pytest.mark.parametrize("name", [*LAYOUTS, *VALUES])
def test_a_tree_reads_the_same_numbers_in_any_layout_alike(name, trees, choice):
    value, lead = LAYOUTS.get(name) or VALUES[name], leading(trees)
    found = []
    for layout in (value, lambda x: plain(value(x), x)):
        torch.manual_seed(2)
        tree = SumTree(CAPACITY, num_trees=trees)
        mass = torch.rand(*lead, CAPACITY)
        tree.fill(mass if name == "trailing dimension" else layout(mass))
        index = torch.randint(CAPACITY, (*lead, 11))
        tree.update(layout(index), layout(torch.rand(index.shape)))
        target = torch.rand(index.shape)  # float32
        target = tree.find(target if name == "trailing dimension" else layout(target))
        found.append((tree[:], tree.nodes, target))
    assert all(map(torch.equal, *found))


def without_memory(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def refusing(call) -> None:
    with pytest.raises(PerTdError) as refused:
        call()
    assert str(refused.value)


WRONG = {
    "too short": lambda x: x[..., :-1],
    "too long": lambda x: torch.cat([x, x], -1),
    "one more dimension": lambda x: x.unsqueeze(0),
    "flat": lambda x: x.flatten()[:-1],
    "complex": lambda x: x + 0j,
    "on meta": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "without memory": without_memory,
    "words": lambda x: "words",
    "an object": lambda x: object(),
}


@pytest.mark.parametrize("many", [None, MANY])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_numbers_is_refused_before_anything_is_written(name, many, choice):
    made, lead, wrong = buffer(many), leading(many), WRONG[name]
    made.extend_leaves(leaves(many, 6))
    state = made.state_dict()
    arguments = {
        "index": torch.zeros(*lead, 4, dtype=torch.int64),
        "td_error": torch.rand(*lead, 4),
        "generation": torch.zeros(*lead, 4, dtype=torch.int64),
    }
    written = {"priority": torch.rand(*lead, 4)}
    if many is not None:
        arguments["mask"] = written["mask"] = torch.ones(*lead, 4, dtype=torch.bool)
    for argument, right in arguments.items():
        given = arguments | {argument: wrong(right)}
        refusing(lambda given=given: made.update_priority(**given))
    for argument, right in written.items():
        given = written | {argument: wrong(right)}
        refusing(lambda given=given: made.extend_leaves(leaves(many, 4), **given))
        data = tensordict(leaves(many, 4), *lead, 4)
        refusing(lambda given=given, data=data: made.extend(data, **given))
    assert_equal(made.state_dict(), state)


@pytest.mark.parametrize("many", [None, MANY])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", [name for name in WRONG if name != "flat"])
def test_leaves_that_are_no_rows_are_refused_before_anything_is_written(name, first, many, choice):
    made = buffer(many)
    if not first:
        made.extend_leaves(leaves(many, 6))
    state = made.state_dict()
    for key in leaves(many, 4):
        if first and name in ("too short", "too long", "one more dimension", "complex"):
            continue  # some other kind of transition
        given = leaves(many, 4)
        given[key] = WRONG[name](given[key])
        refusing(lambda given=given: made.extend_leaves(given))
    assert_equal(made.state_dict(), state)


@pytest.mark.parametrize("trees", [None, MANY])
@pytest.mark.parametrize("name", WRONG)
def test_a_tree_refuses_what_is_no_such_numbers_before_anything_is_written(name, trees, choice):
    tree, lead, wrong = SumTree(CAPACITY, num_trees=trees), leading(trees), WRONG[name]
    tree.fill(torch.rand(*lead, CAPACITY))
    before = tree[:].clone()
    index, value = torch.zeros(*lead, 4, dtype=torch.int64), torch.rand(*lead, 4)
    refusing(lambda: tree.update(wrong(index), value))
    refusing(lambda: tree.update(index, wrong(value)))
    refusing(lambda: tree.fill(wrong(torch.rand(*lead, CAPACITY))))
    if not (name.startswith("too") or (name == "flat" and trees is None)):  # any number of points
        refusing(lambda: tree.find(wrong(value.double())))
    assert torch.equal(tree[:], before)


@pytest.mark.parametrize("call", [torch.func.functionalize, torch.vmap])
@pytest.mark.parametrize("many", [None, MANY])
def test_tensors_of_a_functional_transform_are_refused(many, call, choice):
    made, lead = buffer(many), leading(many)
    made.extend_leaves(leaves(many, 6))
    state = made.state_dict()
    index, error = torch.zeros(*lead, 4, dtype=torch.int64), torch.rand(2, *lead, 4)
    new = leaves(many, 4)
    key = ("x",)

    def update(error: Tensor) -> Tensor:
        made.update_priority(index, error)
        return error

    def extend(x: Tensor) -> Tensor:
        made.extend_leaves(new | {key: x})
        return x

    for each, given in ((update, error), (extend, torch.stack([new[key]] * 2))):
        refusing(
            lambda each=each, given=given: call(each)(given if call is torch.vmap else given[0])
        )
    assert_equal(made.state_dict(), state)
