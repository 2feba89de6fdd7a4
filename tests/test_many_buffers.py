"""Many buffers in one set of tensors, beside as many separate ones."""

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from tensordict import TensorDict

from per_td import (
    CheckpointError,
    ConfigurationError,
    EmptyBufferError,
    IndexRangeError,
    PrioritizedReplayBuffer,
    PriorityError,
    SchemaError,
    kernels,
    validation,
)
from tests.support.model import Ring
from tests.support.oracle import S, assert_drawn_from, data, numbered
from tests.support.parameters import few_of_all, slow_but

DRAWS = ("independent", "stratified", "without_replacement")
WAYS = [(draw, method) for draw in DRAWS for method in ("tree", "multinomial")]
WAYS.remove(("stratified", "multinomial"))


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


def agree(many: PrioritizedReplayBuffer, singles: list[PrioritizedReplayBuffer]) -> None:
    """Everything that S separate buffers hold, the many hold too."""
    many.check_valid()
    ever_max = many.state_dict()["ever_max"]
    assert len(many) == min(map(len, singles))
    assert many.lengths.tolist() == list(map(len, singles))
    assert many.write_count == sum(single.write_count for single in singles)
    assert many.stats()["stale_updates"] == sum(s.stats()["stale_updates"] for s in singles)
    for s, single in enumerate(singles):
        n = len(single)
        assert torch.equal(many.priority[s, :n], single.priority)
        assert (many.priority[s, n:] == 0).all()
        assert torch.equal(many.mass[s, :n], single.mass)
        torch.testing.assert_close(many.total_mass[s], single.total_mass, rtol=1e-14, atol=0)
        assert many.smallest_mass[s] == single.smallest_mass
        assert ever_max[s] == single.state_dict()["ever_max"]
        if n:
            assert (many.transitions[s, :n] == single.transitions).all()
    slots = torch.arange(many.capacity, device=many.device)
    expected = torch.stack([single.generation_of(slots) for single in singles])
    assert torch.equal(many.generation_of(slots.expand(len(singles), -1)), expected)


def pick(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=random) < 0.6


class Lockstep:
    """The same random operations on many buffers in one and on separate ones."""

    def __init__(self, capacity, device, **settings):
        settings |= {"alpha": 0.37, "eps": 0.01, "device": device}
        self.random = torch.Generator().manual_seed(capacity)
        self.many = PrioritizedReplayBuffer(capacity, num_buffers=S, **settings)
        self.singles = [PrioritizedReplayBuffer(capacity, **settings) for _ in range(S)]
        self.batches = []
        self.next = 0

    def below(self, high: int) -> int:
        return int(torch.randint(high, (), generator=self.random))

    def extend(self, n, *, masked, rated):
        td = numbered(self.next, n, self.many.device)
        self.next += n
        mask = pick(self.random, S, n) if masked else torch.ones(S, n, dtype=torch.bool)
        priority = torch.rand(S, n, generator=self.random) ** 6 if rated else None
        given = torch.where(mask, priority, math.nan) if rated else None
        index = self.many.extend(td, given, mask if masked else None)
        for s, single in enumerate(self.singles):
            own = mask[s].nonzero().flatten()
            if len(own):
                rated_own = None if priority is None else priority[s, own]
                slots = single.extend(td[s][own.to(td.device)], rated_own)
                assert index[s, own].tolist() == slots.tolist()
        assert (index.cpu()[~mask] == -1).all()

    def add(self):
        td = numbered(self.next, 1, self.many.device)[:, 0]
        self.next += 1
        mask = pick(self.random, S)
        index = self.many.add(td, mask=mask)
        for s, single in enumerate(self.singles):
            expected = single.add(td[s]).item() if mask[s] else -1
            assert index[s] == expected

    def sample(self, n):
        if len(self.many):
            self.batches.append(self.many.sample(n))

    def update(self, *, masked):
        if not self.batches:
            return
        batch = self.batches.pop(self.below(len(self.batches)))
        td_error = torch.randn(batch.shape, generator=self.random)
        mask = pick(self.random, *batch.shape) if masked else None
        index = batch["index"].cpu()
        given, where = td_error, index
        if masked:  # what is masked may be anything
            given, where = torch.where(mask, td_error, math.nan), torch.where(mask, index, -7)
        self.many.update_priority(where, given, batch["generation"], mask)
        for s, single in enumerate(self.singles):
            own = slice(None) if mask is None else mask[s]
            generation = batch["generation"].cpu()[s, own]
            single.update_priority(index[s, own], td_error[s, own], generation)

    def step(self):
        n = 1 + self.below(self.many.capacity + 3)
        action = self.below(6)
        if action < 2:
            self.extend(n, masked=bool(action), rated=bool(self.below(2)))
        elif action == 2:
            self.add()
        elif action == 3:
            self.sample(n)
        elif action == 4:
            self.update(masked=bool(self.below(2)))
        else:
            alpha = (0.0, 0.37, 1.0)[self.below(3)]
            for buffer in (self.many, *self.singles):
                buffer.alpha = alpha


@pytest.mark.parametrize(
    ("new_priority", "choice"),
    few_of_all(["buffer_max", "ever_max"], kernels.CHOICES),
    indirect=["choice"],
)
@pytest.mark.parametrize("capacity", slow_but([1, 7, 17, 257], [1, 7, 16, 17, 50, 256, 257]))
def test_many_buffers_do_what_as_many_separate_ones_do(capacity, new_priority, choice, device):
    both = Lockstep(capacity, device, new_priority=new_priority, weight_normalization="buffer")
    for _ in range(60):
        both.step()
        agree(both.many, both.singles)
    assert both.many.write_count > capacity * S, "they never wrapped"


@pytest.mark.parametrize("layout", ["columns", "records"])
def test_batches_hold_what_was_stored_in_their_own_buffer(layout, choice, device):
    both = Lockstep(50, device, layout=layout)
    for _ in range(5):
        both.extend(20, masked=True, rated=True)
    batch = both.many.sample(40)
    assert batch.batch_size == (S, 40)
    assert batch["generation"].dtype == batch["index"].dtype == torch.int64
    for s, single in enumerate(both.singles):
        index = batch["index"][s]
        stored = single.transitions[index]
        assert (batch[s].select(*stored.keys()) == stored).all()
        assert torch.equal(batch["generation"][s], single.generation_of(index))
    batch["observation"].fill_(-1)
    assert (both.many.transitions["observation"] >= 0).all()


def uneven(draw="independent", method="auto", **settings):
    """Three buffers of 30, 40 and 45 transitions with priorities of many sizes, and oracles."""
    buffer = PrioritizedReplayBuffer(
        45, alpha=0.6, draw=draw, method=method, num_buffers=S, **settings
    )
    mask = torch.arange(45) < torch.tensor([[30], [40], [45]])
    buffer.extend(numbered(0, 45, buffer.device), mask=mask)
    td_error = torch.randn(S, 45, generator=torch.Generator().manual_seed(0)).mul(1.5).exp()
    buffer.update_priority(torch.arange(45).expand(S, -1), td_error, mask=mask)
    naives = []
    for s, n in enumerate((30, 40, 45)):
        naive = Ring(45)
        naive.extend(range(n))
        naive.update(range(n), td_error[s, :n].tolist())
        naives.append(naive)
    return buffer, naives


@pytest.mark.parametrize(("draw", "method"), [way for way in WAYS if way[0] != DRAWS[2]])
def test_draws_follow_the_priorities_of_each_buffer(draw, method, choice, device, generator):
    buffer, naives = uneven(draw, method, device=device, generator=generator)
    index = buffer.sample(20_000)["index"]
    for s, naive in enumerate(naives):
        assert_drawn_from(index[s], naive.probabilities())


@pytest.mark.parametrize(
    ("method", "choice"),
    slow_but(
        [("tree", "auto"), ("multinomial", "off")],
        product(["tree", "multinomial"], kernels.CHOICES),
    ),
    indirect=["choice"],
)
def test_first_draws_without_replacement_follow_the_priorities(method, choice, device, generator):
    buffer, naives = uneven(DRAWS[2], method, device=device, generator=generator)
    index = torch.stack([buffer.sample(3)["index"][:, 0] for _ in range(4000)], 1)
    for s, naive in enumerate(naives):
        assert_drawn_from(index[s], naive.probabilities())


@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_without_replacement_a_row_has_no_transition_twice(method, choice, device):
    buffer, _ = uneven(DRAWS[2], method, device=device)
    for n in (1, 20, 30):
        assert all(len(set(row)) == n for row in buffer.sample(n)["index"].tolist())


@pytest.mark.parametrize("normalization", ["batch", "buffer", "none"])
@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_weights_are_those_of_each_buffer_on_its_own(draw, method, normalization, choice, device):
    buffer, naives = uneven(
        draw, method, weight_normalization=normalization, beta=0.83, device=device
    )
    batch = buffer.sample(25)
    assert batch["priority_weight"].dtype == torch.float32
    for s, naive in enumerate(naives):
        expected = naive.weights(batch["index"][s].tolist(), 0.83, normalization)
        assert batch["priority_weight"][s].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_with_kernels_and_without_the_same_is_drawn(draw, monkeypatch):
    drawn = []
    for choice in kernels.CHOICES:
        monkeypatch.setenv(kernels.VARIABLE, choice)
        generator = torch.Generator().manual_seed(1)
        drawn.append(uneven(draw, "tree", generator=generator)[0].sample(500))
    assert torch.equal(drawn[0]["index"], drawn[1]["index"])
    assert torch.equal(drawn[0]["generation"], drawn[1]["generation"])
    torch.testing.assert_close(drawn[0]["priority_weight"], drawn[1]["priority_weight"])


@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_a_priority_of_zero_is_never_drawn(draw, method, choice, device):
    buffer = PrioritizedReplayBuffer(40, draw=draw, method=method, num_buffers=2, device=device)
    priority = torch.zeros(2, 40)
    priority[0, 3::4] = 1e-3
    priority[1, 0::2] = 1e3
    buffer.extend(numbered(0, 40, device, 2), priority)
    index = buffer.sample(10)["index"]
    assert (index[0] % 4 == 3).all()
    assert (index[1] % 2 == 0).all()


def test_a_huge_priority_beside_tiny_ones_takes_nothing_from_the_other_buffers(choice, device):
    buffer = PrioritizedReplayBuffer(300, alpha=1.0, num_buffers=2, device=device)
    priority = torch.stack([torch.full((300,), 1e30), torch.full((300,), 1e-30)])
    buffer.extend(numbered(0, 300, device, 2), priority)
    index = buffer.sample(30_000)["index"]
    for s in range(2):
        assert_drawn_from(index[s], [1 / 300] * 300)


def test_late_updates_and_masked_ones_are_told_apart(choice, device):
    buffer = PrioritizedReplayBuffer(4, num_buffers=2, device=device)
    buffer.extend(numbered(0, 4, device, 2))
    batch = buffer.sample(8)
    buffer.extend(numbered(4, 4, device, 2), mask=torch.tensor([[True] * 4, [False] * 4]))
    batch["td_error"] = torch.full((2, 8, 1), 50.0, device=device)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = mask[1, :] = False
    buffer.update_priority(batch["index"], batch["td_error"], batch["generation"], mask)
    assert buffer.stats()["stale_updates"] == 5
    assert (buffer.priority == 1).all()
    buffer.update_tensordict_priority(batch)
    assert buffer.stats() == {"written": 12, "stale_updates": 13, "refused_priorities": 0}
    assert (buffer.priority[0] == 1).all()
    assert buffer.priority[1].max().item() == pytest.approx(50)


@pytest.mark.parametrize(("draw", "method"), WAYS)
def test_sampling_names_the_buffers_with_nothing_to_draw(draw, method, choice):
    buffer = PrioritizedReplayBuffer(4, num_buffers=S, draw=draw, method=method)
    mask = torch.tensor([[False], [True], [False]])
    buffer.extend(numbered(0, 1), mask=mask)
    with pytest.raises(EmptyBufferError, match="got empty ones in 2 of 3: 0, 2"):
        buffer.sample(1)
    buffer.extend(numbered(0, 1), torch.tensor([[0.0], [1.0], [1.0]]))
    with pytest.raises(EmptyBufferError, match="masses of 0 in 1 of 3: 0"):
        buffer.sample(1)


@pytest.mark.parametrize("method", ["tree", "multinomial"])
def test_more_than_a_buffer_has_cannot_be_drawn_without_replacement(method, choice):
    buffer, _ = uneven(DRAWS[2], method)
    with pytest.raises(EmptyBufferError, match=r"at least 35 .* got 30 in 1 of 3: 0"):
        buffer.sample(35)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"td": numbered(0, 2, count=2)}, SchemaError, r"batch size \[3, n\], got \[2, 2\]"),
        ({"td": numbered(0, 2)[:, 0]}, SchemaError, r"got \[3\]: use add\(\)"),
        ({"td": numbered(0, 2).exclude("action")}, SchemaError, "missing: 'action'"),
        ({"td": numbered(0, 2)["action"]}, SchemaError, "expected a TensorDict or .*, got Tensor"),
        ({"priority": torch.ones(3)}, PriorityError, r"expected shape \[3, 2\], .* got \[3\]"),
        (
            {"priority": [[1.0, 1], [1, math.nan], [1, 1]]},
            PriorityError,
            r"got nan at position \[1, 1\]",
        ),
        ({"priority": [[1.0, 1], [1, -1], [1, 1]]}, PriorityError, "at least 0 .* got -1"),
        ({"mask": torch.ones(3, 1, dtype=torch.bool)}, SchemaError, r"bool of shape \[3, 2\]"),
        ({"mask": torch.ones(3, 2)}, SchemaError, "mask: expected bool .* got torch.float32"),
    ],
)
def test_wrong_writes_are_refused_before_anything_is_written(change, error, message, choice):
    buffer = PrioritizedReplayBuffer(4, num_buffers=S)
    buffer.extend(numbered(0, 3))
    before = buffer.transitions.clone()
    arguments = {"td": numbered(5, 2), "priority": None, "mask": None} | change
    with pytest.raises(error, match=message):
        buffer.extend(*arguments.values())
    assert buffer.write_count == 9
    assert (buffer.transitions == before).all()
    assert buffer.priority.sum() == 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"index": [[0, 4], [0, 1]]}, IndexRangeError, r"index < 4, .* of buffer 0, got 4 .* 1\]"),
        ({"index": [[0, 1], [2, 0]]}, IndexRangeError, r"< 2, the filled slots of buffer 1, got 2"),
        ({"index": [[0, 1], [-1, 0]]}, IndexRangeError, "got -1 at position"),
        ({"index": [0, 1]}, IndexRangeError, r"expected shape \[2, B\], got \[2\]"),
        ({"index": [[0.5, 1], [0, 1]]}, IndexRangeError, "integer dtype"),
        ({"td_error": [[1.0, 2], [math.nan, 1]]}, PriorityError, "td_error: .* got nan"),
        ({"td_error": [[1.0, 2], [math.inf, 1]]}, PriorityError, "got inf"),
        ({"td_error": [1.0, 2]}, PriorityError, r"expected shape \[2, 2\]"),
        ({"generation": [[0], [0]]}, PriorityError, r"generation: expected shape \[2, 2\]"),
        ({"mask": [[True], [True]]}, SchemaError, r"mask: expected bool of shape \[2, 2\]"),
    ],
)
def test_wrong_updates_are_refused_before_anything_is_written(change, error, message, choice):
    buffer = PrioritizedReplayBuffer(4, num_buffers=2)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    buffer.extend(numbered(0, 4, count=2), mask=mask)
    arguments = {
        "index": [[0, 1], [0, 1]],
        "td_error": [[5.0, 6], [7, 8]],
        "generation": None,
        "mask": None,
    } | change
    with pytest.raises(error, match=message):
        buffer.update_priority(**arguments)
    assert buffer.priority.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_stale_update_that_is_nan_is_refused_as_in_a_single_buffer(choice):
    buffer = PrioritizedReplayBuffer(2, num_buffers=1)
    buffer.extend(numbered(0, 4, count=1))
    with pytest.raises(PriorityError, match="got nan"):
        buffer.update_priority([[0]], [[math.nan]], generation=[[0]])


def test_where_values_cannot_be_looked_at_wrong_ones_are_refused_and_counted(monkeypatch):
    """As on CUDA, where looking at them would stop the host."""
    monkeypatch.setenv(kernels.VARIABLE, "off")
    monkeypatch.setattr(validation, "can_raise", lambda tensor: False)
    buffer = PrioritizedReplayBuffer(4, alpha=1.0, eps=0.0, num_buffers=2)
    priority = torch.tensor([[math.nan, 2.0, math.nan], [-1.0, math.inf, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    buffer.extend(numbered(0, 3, count=2), priority, mask)
    assert buffer.priority.tolist() == [[1, 2, 0, 0], [1, 1, 3, 0]]
    assert buffer.stats()["refused_priorities"] == 3
    td_error = [[math.nan, 7.0, 1.0], [5.0, 1.0, math.nan]]
    mask = torch.tensor([[True, True, True], [True, True, False]])
    buffer.update_priority([[0, 1, 2], [1, -1, 9]], td_error, mask=mask)
    assert buffer.priority.tolist() == [[1, 7, 0, 0], [1, 5, 3, 0]]
    assert buffer.stats()["refused_priorities"] == 6
    assert buffer.total_mass.tolist() == [8, 9]


@pytest.mark.parametrize("given", [True, False])
def test_masked_rows_at_the_end_of_more_than_fit_take_no_place_from_others(given, device):
    buffers = PrioritizedReplayBuffer(5, num_buffers=2, device=device)
    mask = torch.tensor([[True] * 3 + [False] * 9, [True] * 7 + [False] * 5], device=device)
    rows = {"x": torch.arange(24, device=device).view(2, 12)}
    priority = torch.arange(1.0, 25.0, device=device).view(2, 12) if given else None
    buffers.extend(rows, priority, mask)
    assert buffers.lengths.tolist() == [3, 5]
    expected = [[1, 2, 3, 0, 0], [18, 19, 15, 16, 17]] if given else [[1] * 3 + [0] * 2, [1] * 5]
    assert buffers.priority.tolist() == expected
    buffers.check_valid()


def test_a_mask_goes_with_many_buffers_only():
    buffer = PrioritizedReplayBuffer(4)
    td, mask = data(0, 2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="a mask goes with num_buffers"):
        buffer.extend(td, mask=mask)
    with pytest.raises(ConfigurationError, match="a mask goes with num_buffers"):
        buffer.add(td[0], mask=mask[0])
    buffer.extend(td)
    with pytest.raises(ConfigurationError, match="a mask goes with num_buffers"):
        buffer.update_priority([0, 1], [1.0, 1.0], mask=mask)
    assert buffer.priority.tolist() == [1, 1]


@pytest.mark.parametrize("num_buffers", [0, -1, 2.0, True])
def test_the_number_of_buffers_is_a_positive_integer(num_buffers):
    with pytest.raises(ConfigurationError, match="num_buffers: expected an integer of at least 1"):
        PrioritizedReplayBuffer(4, num_buffers=num_buffers)


def test_stratified_draws_need_the_tree():
    with pytest.raises(ConfigurationError, match="cannot draw stratified"):
        PrioritizedReplayBuffer(4, num_buffers=2, draw="stratified", method="multinomial")


def test_a_class_derived_from_the_buffer_may_be_many():
    class Own(PrioritizedReplayBuffer):
        pass

    buffer = Own(4, num_buffers=2)
    index = buffer.extend(numbered(0, 3, count=2))
    assert (type(buffer), buffer.num_buffers, index.shape) == (Own, 2, (2, 3))
    batch = buffer.sample(5)
    buffer.update_priority(batch["index"], torch.ones(2, 5), batch["generation"])
    buffer.check_valid()


def test_a_single_buffer_knows_its_length_as_a_tensor_too(device):
    buffer = PrioritizedReplayBuffer(4, device=device)
    buffer.extend(data(0, 3, device))
    assert buffer.num_buffers is None
    assert (buffer.lengths.shape, buffer.lengths.item()) == ((), 3)


def test_an_example_allocates_before_there_is_data(device):
    buffer = PrioritizedReplayBuffer(4, num_buffers=2, example=data(0, 1)[0], device=device)
    assert buffer.transitions.batch_size == (2, 4)
    assert len(buffer) == 0
    with pytest.raises(SchemaError, match="missing"):
        buffer.extend(TensorDict({"action": torch.zeros(2, 1)}, batch_size=[2, 1]))
    buffer.extend(numbered(0, 2, device, 2))
    assert len(buffer) == 2


@pytest.mark.parametrize("layout", ["columns", "records"])
def test_copies_are_on_their_own(layout, choice):
    buffer = PrioritizedReplayBuffer(4, num_buffers=2, layout=layout)
    buffer.extend(numbered(0, 3, count=2))
    for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert_same(buffer, other)
        other.extend(numbered(3, 1, count=2))
        other.update_priority([[0], [1]], [[5.0], [6.0]])
        assert len(other) == 4
        assert buffer.lengths.tolist() == [3, 3]
        assert buffer.priority.sum() == 6
        assert other.sample(5).shape == (2, 5)


def test_leaves_may_come_and_go_without_a_tensordict(choice):
    buffer = PrioritizedReplayBuffer(4, num_buffers=2)
    x = torch.arange(6.0).view(2, 3)
    assert buffer.extend_leaves({("x",): x}).tolist() == [[0, 1, 2]] * 2
    leaves, index, weight = buffer.sample_leaves(5)
    assert torch.equal(leaves["x",], x.gather(1, index))
    assert weight.shape == (2, 5)
    with pytest.raises(SchemaError, match=r"'x': expected shape \[2, 3, ...\], got \[3, 3\]"):
        buffer.extend_leaves({("x",): torch.zeros(3, 3)})


def used(**settings) -> PrioritizedReplayBuffer:
    """Three buffers that have wrapped at different places, with a stale update."""
    settings = {"alpha": 0.37, "beta": 0.5, "eps": 0.01, "beta_increment": 0.125} | settings
    buffer = PrioritizedReplayBuffer(20, 8, num_buffers=S, **settings)
    buffer.extend(numbered(0, 15))
    batch = buffer.sample()
    buffer.extend(numbered(15, 15), mask=torch.arange(15) < torch.tensor([[2], [9], [15]]))
    buffer.update_priority(batch["index"], torch.rand(S, 8) * 9, batch["generation"])
    buffer.update_priority(torch.zeros(S, 1).long(), torch.tensor([[100.0], [50], [25]]))
    buffer.update_priority(torch.zeros(S, 1).long(), torch.full((S, 1), 0.5))
    buffer.increase_beta()
    return buffer


def assert_same(a: PrioritizedReplayBuffer, b: PrioritizedReplayBuffer) -> None:
    assert (a.transitions == b.transitions).all()
    assert torch.equal(a.priority, b.priority)
    assert torch.equal(a.lengths, b.lengths)
    assert a.stats() == b.stats()
    for name in ("alpha", "beta", "eps", "beta_increment", "capacity", "batch_size", "num_buffers"):
        assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize(
    ("normalization", "new_priority"), [("batch", "buffer_max"), ("buffer", "ever_max")]
)
@pytest.mark.parametrize("draw", DRAWS)
def test_loaded_buffers_go_on_as_the_saved_ones_do(
    draw, normalization, new_priority, tmp_path, choice
):
    buffer = used(
        draw=draw,
        weight_normalization=normalization,
        new_priority=new_priority,
        generator=torch.Generator().manual_seed(3),
    )
    buffer.save(tmp_path / "buffers.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffers.pt")
    assert_same(buffer, loaded)
    for one in (buffer, loaded):
        one.extend(numbered(30, 3))
    assert_same(buffer, loaded)
    for _ in range(3):
        batch, other = buffer.sample(), loaded.sample()
        assert (batch == other).all()
        for one in (buffer, loaded):
            one.update_priority(batch["index"], batch["action"].float(), batch["generation"])
    assert_same(buffer, loaded)


def test_empty_buffers_can_be_saved(tmp_path):
    PrioritizedReplayBuffer(5, num_buffers=2).save(tmp_path / "empty.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "empty.pt")
    assert (len(loaded), loaded.num_buffers) == (0, 2)
    loaded.extend(numbered(0, 2, count=2))
    assert len(loaded) == 2


def test_a_state_does_not_load_into_another_number_of_buffers():
    state = used().state_dict()
    for num_buffers in (None, 2):
        other = PrioritizedReplayBuffer(20, num_buffers=num_buffers)
        with pytest.raises(CheckpointError, match=f"num_buffers={num_buffers}, got 3"):
            other.load_state_dict(state)
    single = PrioritizedReplayBuffer(20)
    single.extend(data(0, 3))
    with pytest.raises(CheckpointError, match="num_buffers=3, got None"):
        used().load_state_dict(single.state_dict())
    old = single.state_dict()
    del old["settings"]["num_buffers"]  # as saved before there was such a setting
    PrioritizedReplayBuffer(20).load_state_dict(old)


def test_ranks_are_for_one_buffer():
    with pytest.raises(ConfigurationError, match="num_buffers=3"):
        PrioritizedReplayBuffer(8, num_buffers=3, prioritization="rank")
