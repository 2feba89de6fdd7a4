"""Settings: numbers of every kind are taken, changes take effect or are refused by name."""

import threading

import numpy as np
import pytest
import torch

from per_td import ConfigurationError, PrioritizedReplayBuffer, TransitionReplayBuffer
from tests.support.oracle import data
from tests.support.processes import deadline, shared, transitions

KINDS = {
    "one": {},
    "many": {"num_buffers": 2},
    "threads": {"threads": True},
    "prefetch": {"prefetch": 2},
}


def make(kind, **settings):
    if kind == "shared":
        return shared(20, batch_size=4, **settings)
    return PrioritizedReplayBuffer(20, 4, **KINDS[kind], **settings)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
@pytest.mark.parametrize("real", [np.float32, np.float64, np.float16, torch.tensor])
@pytest.mark.parametrize("kind", [{}, {"num_buffers": 2}, {"prioritization": "rank"}])
def test_numbers_of_every_kind_are_kept_as_pythons_own_and_can_be_saved(
    kind, real, number, tmp_path
):
    made = {"sort_interval": number(50)} if "prioritization" in kind else {}
    made |= {key: number(n) if isinstance(n, int) else n for key, n in kind.items()}
    buffer = PrioritizedReplayBuffer(
        number(20),
        number(4),
        alpha=real(0.5),
        beta=real(0.25),
        eps=real(0.125),
        beta_increment=real(0.0625),
        draw=np.str_("stratified"),
        **made,
    )
    buffer.batch_size, buffer.beta_increment = number(5), real(0.03125)
    buffer.alpha, buffer.eps = real(0.75), real(0.5)
    settings = buffer.state_dict()["settings"]
    assert {type(value) for value in settings.values()} <= {int, float, str, bool, type(None)}
    buffer.save(tmp_path / "buffer.pt")
    loaded = PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")
    assert loaded.state_dict()["settings"] == settings
    assert (loaded.alpha, loaded.eps, loaded.beta_increment) == (0.75, 0.5, 0.03125)
    assert (loaded.capacity, loaded.batch_size) == (20, 5)


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("beta_increment", -1),
        ("beta_increment", "x"),
        ("beta_increment", float("nan")),
        ("generator", 5),
        ("draw", "random"),
        ("draw", None),
        ("method", "guess"),
        ("weight_normalization", "garbage"),
        ("weight_normalization", None),
        ("new_priority", 1.0),
        ("prioritization", "rank"),
        ("sort_interval", 50),
        ("capacity", 30),
        ("device", "cpu"),
        ("num_buffers", 4),
        ("layout", "records"),
        ("alpha", -1.0),
        ("beta", 2.0),
        ("eps", -1e-3),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_changes_nothing(kind, name, value):
    buffer = make(kind)
    before, settings = getattr(buffer, name), buffer.state_dict()["settings"]
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected"):
        setattr(buffer, name, value)
    assert getattr(buffer, name) == before
    assert buffer.state_dict()["settings"] == settings
    assert buffer.generator is None


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
def test_a_misspelt_eps_is_refused_by_its_right_name(kind):
    buffer = make(kind)
    with pytest.raises(ConfigurationError, match=r"epsilon: expected .* expected eps"):
        buffer.epsilon = 0.5
    assert not hasattr(buffer, "epsilon")


def test_a_generator_on_another_device_is_refused():
    class Elsewhere(torch.Generator):
        device = torch.device("cuda:0")

    buffer, own = PrioritizedReplayBuffer(3), torch.Generator()
    buffer.generator = own
    with pytest.raises(ConfigurationError, match="generator: expected one on cpu"):
        buffer.generator = Elsewhere()
    assert buffer.generator is own


def test_two_ways_of_drawing_that_do_not_go_together_are_refused_and_neither_is_taken():
    buffer = PrioritizedReplayBuffer(20, 4, method="multinomial")
    with pytest.raises(ConfigurationError, match="cannot draw stratified"):
        buffer.draw = "stratified"
    assert (buffer.draw, buffer.method) == ("independent", "multinomial")
    buffer.method = "tree"
    buffer.draw = "stratified"
    with pytest.raises(ConfigurationError, match="cannot draw stratified"):
        buffer.method = "multinomial"
    assert (buffer.draw, buffer.method) == ("stratified", "tree")


CHANGES = [
    {"draw": "stratified"},
    {"draw": "without_replacement"},
    {"method": "multinomial"},
    {"method": "tree"},
    {"weight_normalization": "none"},
    {"weight_normalization": "buffer"},
    {"new_priority": "ever_max"},
]


def filled(kind, **settings):
    """A buffer whose largest priority is not the largest that it ever had."""
    buffer, rows = make(kind, beta=0.5, **settings), (2,) if kind == "many" else ()

    def transitions_each(start, n):
        td = transitions(range(start, start + n))
        return td.expand(2, n).clone() if rows else td

    buffer.extend(transitions_each(0, 15))
    index = torch.arange(15).expand(*rows, 15)
    generation = torch.zeros_like(index)
    buffer.update_priority(index, (index == 3) * 99.0, generation)
    return buffer, index, generation, transitions_each


def outcome(buffer, index, generation, transitions_each):
    """What follows from settings: draws, weights, priorities of new transitions."""
    close = getattr(buffer, "close", lambda: None)  # a thread that draws takes random numbers too
    buffer.update_priority(index, 1.0 + index.float(), generation)
    close()
    buffer.generator = torch.Generator().manual_seed(3)
    drawn = [buffer.sample() for _ in range(3)]
    close()
    buffer.extend(transitions_each(15, 3))
    buffer.generator = torch.Generator().manual_seed(4)
    return torch.stack(drawn), buffer.sample(6), buffer.priority


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_change_of_settings_takes_effect_as_if_the_buffer_had_been_made_with_it(kind, change):
    ((name, value),) = change.items()
    made, changed = filled(kind, **change), filled(kind)
    if kind == "shared" and name in ("weight_normalization", "new_priority"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected no change once a shared"):
            setattr(changed[0], name, value)
        return
    setattr(changed[0], name, value)
    assert getattr(changed[0], name) == value
    for one, other in zip(outcome(*made), outcome(*changed), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_normalization_may_come_and_go_while_priorities_change(kind):
    buffer, index, generation, _ = filled(kind)
    for normalization in ("buffer", "none", "buffer", "batch", "buffer"):
        buffer.weight_normalization = normalization
        buffer.update_priority(index, torch.rand(index.shape), generation)
    other = make(kind, weight_normalization="buffer")
    other.load_state_dict(buffer.state_dict())
    for each in (buffer, other):
        each.generator = torch.Generator().manual_seed(5)
    assert (buffer.sample(50) == other.sample(50)).all()


def test_what_was_drawn_ahead_with_other_settings_is_not_returned():
    with deadline(60):
        buffer, *_ = filled("prefetch")
        buffer.sample()
        buffer.weight_normalization = "none"
        weights = torch.stack([buffer.sample()["priority_weight"] for _ in range(4)])
        assert not (weights == 1).any()  # of each batch, the largest was
        buffer.generator = torch.Generator().manual_seed(1)
        buffer.close()


@pytest.mark.parametrize("ahead", [1, 3])
def test_after_a_change_of_the_batch_size_no_batch_is_of_the_old_one(ahead):
    with deadline(60):
        buffer = PrioritizedReplayBuffer(20, 4, prefetch=ahead)
        buffer.extend(data(0, 20))
        for size in (4, 7, 2, 9):
            buffer.batch_size = size
            assert [len(buffer.sample()) for _ in range(ahead + 2)] == [size] * (ahead + 2)
        with pytest.raises(ConfigurationError, match="batch_size: expected one beside prefetch"):
            buffer.batch_size = None
        assert len(buffer.sample()) == 9
        buffer.close()


def test_a_batch_size_that_is_asked_for_comes_while_another_thread_sets_the_default():
    with deadline(60):
        buffer, stop = PrioritizedReplayBuffer(20, 4, prefetch=2), threading.Event()
        buffer.extend(data(0, 20))

        def change():
            while not stop.is_set():
                for size in (4, 5):
                    buffer.batch_size = size

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert {len(buffer.sample(4)) for _ in range(200)} == {4}
        finally:
            stop.set()
            thread.join()
            buffer.close()


def test_the_courses_settings_are_those_underneath():
    buffer = TransitionReplayBuffer(10)
    for name, value in {
        "alpha": 0.25,
        "beta": 0.5,
        "beta_increment": 0.125,
        "draw": "stratified",
        "method": "tree",
        "weight_normalization": "none",
        "new_priority": "ever_max",
        "generator": torch.Generator(),
    }.items():
        setattr(buffer, name, value)
        assert getattr(buffer, name) == getattr(buffer.buffer, name) == value
    buffer.epsilon = 0.0625
    assert buffer.epsilon == buffer.buffer.eps == 0.0625
    buffer.increase_beta()
    assert buffer.beta == 0.625


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 5),
        ("device", "cpu"),
        ("prioritization", "rank"),
        ("alpha", "x"),
        ("beta", 1.5),
        ("beta_increment", -0.5),
        ("draw", "all"),
        ("generator", 5),
        ("eps", 0.1),
    ],
)
def test_wrong_settings_of_the_courses_buffer_are_refused_by_name(name, value):
    buffer = TransitionReplayBuffer(10)
    with pytest.raises(ConfigurationError, match=rf"^{name}: expected"):
        setattr(buffer, name, value)
    with pytest.raises(ConfigurationError, match=r"^epsilon: expected"):
        buffer.epsilon = -1.0
    assert buffer.epsilon == 0.001


@pytest.mark.parametrize(("prioritization", "alpha"), [("proportional", 0.6), ("rank", 0.7)])
def test_the_course_takes_the_papers_alpha_unless_told_another(prioritization, alpha):
    settings = {"prioritization": prioritization}
    assert TransitionReplayBuffer(10, **settings).alpha == alpha
    assert TransitionReplayBuffer(10, 0.5, **settings).alpha == 0.5
    assert TransitionReplayBuffer(10, alpha=0.6, **settings).alpha == 0.6


def test_sums_of_steps_that_end_a_rounding_beyond_a_bound_are_that_bound():
    beta = 0.1 + 100 * ((1.0 - 0.1) / 100)
    assert beta > 1
    for buffer in (PrioritizedReplayBuffer(10), TransitionReplayBuffer(10)):
        buffer.beta = beta
        assert buffer.beta == 1.0
        buffer.alpha = 0.3 - 0.1 - 0.1 - 0.1
        assert buffer.alpha == 0.0
    assert PrioritizedReplayBuffer(10, beta=beta, eps=-1e-17).beta == 1.0
    for wrong in (1.0 + 1e-9, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match=r"beta: expected a finite number in \[0, 1\]"):
            PrioritizedReplayBuffer(10, beta=wrong)
    for wrong in (-1e-9, float("inf")):
        with pytest.raises(ConfigurationError, match=r"alpha: expected a finite number"):
            PrioritizedReplayBuffer(10, alpha=wrong)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shared": "False"}, "shared: expected True or False, got 'False'"),
        ({"threads": 1}, "threads: expected True or False, got 1"),
        ({"threads": torch.zeros(2)}, "threads: expected True or False"),
        ({"prefetch": torch.ones(2)}, "prefetch: expected an integer of at least 0"),
        ({"prefetch": -1}, "prefetch: expected an integer of at least 0"),
    ],
)
def test_ways_to_share_that_are_no_flags_are_refused(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        PrioritizedReplayBuffer(8, 4, **settings)


def test_a_way_to_draw_that_is_no_name_is_refused():
    buffer = PrioritizedReplayBuffer(8, 4, latest=1)
    with pytest.raises(ConfigurationError, match="draw: expected one of"):
        buffer.draw = torch.zeros(2)
    assert buffer.draw == "independent"
