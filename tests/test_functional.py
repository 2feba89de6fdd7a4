"""`per_td.functional`: draws, probabilities and weights against closed forms in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from per_td import (
    ConfigurationError,
    EmptyBufferError,
    PrioritizedReplayBuffer,
    PriorityError,
    draws,
    functional,
)
from tests.support.oracle import assert_drawn_from, data
from tests.support.pretended_cuda import WAITS, HostWaitError

P = [0.0, 0.1, 2.0, 0.0, 30.0, 0.7, 5.0, 0.0]
MIXES = [0.0, 0.3, 1.0]
ALPHAS = [0.0, 0.6, 1.0, 2.5]


def closed_form(priority, alpha=1.0, mix=0.0) -> torch.Tensor:
    """P(i) = (1 - u) p_i^alpha / sum + u / drawable, number by number."""
    masses = [p**alpha if p else 0.0 for p in map(float, priority)]
    drawable = sum(p > 0 for p in priority)
    each = [(1 - mix) * m / math.fsum(masses) + mix * (m > 0) / drawable for m in masses]
    return torch.tensor(each, dtype=torch.float64)


def cpu(n: int = 8) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n))


# --- draw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_draws_follow_the_closed_form_and_zeros_are_never_drawn(alpha, mix, device, generator):
    priority = torch.tensor(P, device=device)
    index, probability = functional.draw(
        priority, 20_000, alpha=alpha, uniform_mix=mix, generator=generator
    )
    expected = closed_form(P, alpha, mix)
    assert index.dtype == torch.int64
    assert probability.dtype == torch.float64
    assert_drawn_from(index, expected)
    torch.testing.assert_close(probability.cpu(), expected[index.cpu()], rtol=1e-6, atol=0)


def test_probabilities_are_exact_to_double_precision():
    priority = torch.tensor(P, dtype=torch.float64)
    index, probability = functional.draw(priority, 1000, alpha=0.7, uniform_mix=0.2)
    expected = closed_form(P, 0.7, 0.2)
    torch.testing.assert_close(probability, expected[index], rtol=1e-14, atol=0)


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_draws_of_many_follow_the_closed_form(mix, device, generator):
    n, buckets = 100_000, 200
    priority = torch.rand(n, generator=torch.Generator().manual_seed(3)) ** 3
    priority[1::4] = 0.0
    index, _ = functional.draw(
        priority.to(device), 200_000, alpha=0.6, uniform_mix=mix, generator=generator
    )
    index = index.cpu()
    assert (priority[index] > 0).all()
    mass = torch.where(priority > 0, priority.double() ** 0.6, 0.0)
    positive = (priority > 0).double()
    probability = (1 - mix) * mass / mass.sum() + mix * positive / positive.sum()
    assert_drawn_from(index * buckets // n, probability.view(buckets, -1).sum(-1))
    assert_drawn_from(index % buckets, probability.view(-1, buckets).sum(0))


def test_a_float32_sum_would_not_reach_what_comes_after_a_large_priority(device, generator):
    """In float32, 2^26 + 1 = 2^26."""
    n, large = 1_000_000, 2.0**26
    priority = torch.ones(n, device=device)
    priority[0] = large
    index, _ = functional.draw(priority, 400_000, generator=generator)
    part = torch.where(index == 0, 0, 1 + (index - 1) * 4 // (n - 1))
    total = large + n - 1
    assert_drawn_from(part, [large / total, *[(n - 1) / 4 / total] * 4])


@pytest.mark.parametrize("replacement", [True, False])
def test_each_row_is_drawn_from_on_its_own(replacement, device, generator):
    rows = [P, [1.0] * 8, [0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 1e-3]]
    priority = torch.tensor(rows, device=device)
    n = 20_000 if replacement else 2
    index, probability = functional.draw(
        priority, n, alpha=0.5, uniform_mix=0.1, replacement=replacement, generator=generator
    )
    assert index.shape == probability.shape == (3, n)
    for row, drawn, p in zip(rows, index.cpu(), probability.cpu(), strict=True):
        expected = closed_form(row, 0.5, 0.1)
        torch.testing.assert_close(p, expected[drawn], rtol=1e-6, atol=0)
        if replacement:
            assert_drawn_from(drawn, expected)
        else:
            assert drawn[0] != drawn[1]


@pytest.mark.parametrize(("alpha", "mix"), [(1.0, 0.0), (0.0, 0.0), (0.6, 0.3), (1.0, 1.0)])
def test_draws_without_replacement_are_sequential_draws(alpha, mix, device, generator):
    """P(i first, j second) = P(i) P(j) / (1 - P(i)); each row of many is one trial."""
    p = [5.0, 0.0, 1.0, 3.0, 0.2]
    trials = torch.tensor(p, device=device).expand(20_000, 5)
    index, probability = functional.draw(
        trials, 2, alpha=alpha, uniform_mix=mix, replacement=False, generator=generator
    )
    q = closed_form(p, alpha, mix)
    pairs = torch.zeros(5, 5, dtype=torch.float64)
    for i, j in itertools.permutations(range(5), 2):
        pairs[i, j] = q[i] * q[j] / (1 - q[i])
    assert_drawn_from(index[:, 0] * 5 + index[:, 1], pairs.flatten())
    torch.testing.assert_close(probability.cpu(), q[index.cpu()], rtol=1e-6, atol=0)


def test_without_replacement_everything_drawable_is_drawn_once(device, generator):
    index, _ = functional.draw(
        torch.tensor(P, device=device), 5, replacement=False, generator=generator
    )
    assert sorted(index.tolist()) == [1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
def test_any_real_dtype_will_do(dtype, device, generator):
    priority = torch.tensor([0, 1, 2, 5], device=device).to(dtype)
    index, probability = functional.draw(priority, 5000, generator=generator)
    expected = torch.tensor([0, 1, 2, 5], dtype=torch.float64) / 8
    assert_drawn_from(index, expected)
    assert torch.equal(probability.cpu(), expected[index.cpu()])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("replacement", [True, False])
def test_extreme_priorities_keep_positive_finite_probabilities(alpha, replacement, device):
    priority = torch.tensor([1e-310, 0.0, 1e-200, 1.0, 1e300], dtype=torch.float64, device=device)
    for _ in range(20):
        index, probability = functional.draw(priority, 4, alpha=alpha, replacement=replacement)
        assert not (index == 1).any()
        assert ((probability > 0) & (probability <= 1)).all()
        if not replacement:
            assert sorted(index.tolist()) == [0, 2, 3, 4]


def test_rounding_at_either_end_reaches_no_zero(device, monkeypatch):
    priority = torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0], device=device)
    for point, expected in ((0.0, 2), (1.0, 3)):
        monkeypatch.setattr(
            draws, "uniform_like", lambda like, _, point=point: torch.full_like(like, point)
        )
        index, _ = functional.draw(priority, 3)
        assert index.tolist() == [expected] * 3


def test_sums_that_fall_or_rise_at_a_zero_do_not_make_it_drawable(device, generator, monkeypatch):
    """As those of a parallel sum do, where values are not looked at."""
    monkeypatch.setattr("per_td.validation.can_raise", lambda tensor: False)
    plain = torch.Tensor.cumsum

    def parallel(tensor, dim):
        total = plain(tensor, dim)
        noise = torch.rand(total.shape, dtype=total.dtype, device=device, generator=generator)
        return total + 1e-3 * noise

    monkeypatch.setattr(torch.Tensor, "cumsum", parallel)
    priority = torch.rand(1000, device=device, generator=generator)
    priority[::2] = 0.0
    index, _ = functional.draw(priority, 20_000, generator=generator)
    assert (index % 2 == 1).all()


def test_a_generator_fixes_the_draws(device):
    def drawn(seed, **settings):
        generator = torch.Generator(device).manual_seed(seed)
        return functional.draw(
            torch.rand(50, device=device) * 0 + 1, 20, generator=generator, **settings
        )[0].tolist()

    for settings in ({}, {"replacement": False}):
        assert drawn(1, **settings) == drawn(1, **settings)
        assert drawn(1, **settings) != drawn(2, **settings)
    one, two = (
        functional.resample(torch.ones(50, device=device), 20, generator=generator)[0].tolist()
        for generator in (torch.Generator(device).manual_seed(1) for _ in range(2))
    )
    assert one == two


def test_no_gradient_flows_and_none_is_needed(device):
    priority = torch.tensor(P, device=device, requires_grad=True)
    _, probability = functional.draw(priority, 3)
    weight = functional.importance_weights(probability, 8, 0.5)
    assert not probability.requires_grad
    assert not weight.requires_grad
    assert not functional.resample(priority, 3)[1].requires_grad
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert functional.draw(priority, 3)[0].shape == (3,)


def test_the_layout_of_memory_makes_no_difference(device, generator):
    rows = torch.tensor([P, [1.0] * 8], device=device)
    odd = rows.t().contiguous().t()
    assert not odd.is_contiguous()
    state = generator.get_state()
    expected = functional.draw(rows, 50, generator=generator)
    generator.set_state(state)
    for ours, theirs in zip(functional.draw(odd, 50, generator=generator), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_priorities_that_cannot_be_are_refused(wrong):
    priority = cpu()
    priority[3] = wrong
    for call in (functional.draw, functional.resample):
        with pytest.raises(
            PriorityError, match=r"expected finite values of at least 0.*position 3"
        ):
            call(priority, 4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_where_values_are_not_looked_at_wrong_priorities_count_as_zero(wrong, monkeypatch):
    monkeypatch.setattr("per_td.validation.can_raise", lambda tensor: False)
    priority = torch.tensor([wrong, 1.0, 3.0, wrong])
    index, probability = functional.draw(priority, 5000, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([0, 0.25, 0.75, 0], dtype=torch.float64)
    assert_drawn_from(index, expected)
    assert torch.equal(probability, expected[index])


@pytest.mark.parametrize(
    ("priority", "match"),
    [
        (torch.ones(3, dtype=torch.bool), "expected a real dtype, got torch.bool"),
        (torch.ones(3, dtype=torch.complex64), "expected a real dtype"),
        (torch.ones(()), r"expected shape \[N\] or \[S, N\], got \[\]"),
        (torch.ones(2, 2, 2), r"expected shape \[N\] or \[S, N\], got \[2, 2, 2\]"),
        (torch.ones(3, device="meta"), "expected values"),
        (torch.eye(3).to_sparse(), "dense"),
        ("abc", "expected a tensor"),
    ],
)
def test_what_is_no_row_of_numbers_is_refused(priority, match):
    with pytest.raises(PriorityError, match=match):
        functional.draw(priority, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "n: expected an integer of at least 1"),
        ({"n": 1.5}, "n: expected an integer"),
        ({"alpha": -0.1}, "alpha: expected a finite number in"),
        ({"alpha": torch.tensor(math.nan)}, "alpha: expected a finite number in"),
        ({"uniform_mix": 1.1}, "uniform_mix: expected a finite number in"),
        ({"uniform_mix": -0.1}, "uniform_mix: expected a finite number in"),
        ({"replacement": "no"}, "replacement: expected True or False, got 'no'"),
        ({"alpha": torch.ones((), device="meta")}, "alpha: expected a real number, or a tensor"),
        ({"uniform_mix": torch.zeros((), device="meta")}, "uniform_mix: expected a real number"),
        ({"generator": 3}, "generator: expected a torch.Generator"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        functional.draw(cpu(), **{"n": 2, **arguments})


def test_settings_may_be_tensors(device, generator):
    alpha, mix = (torch.tensor(value, device=device) for value in (0.5, 0.25))
    index, probability = functional.draw(
        torch.tensor(P, device=device), 5000, alpha=alpha, uniform_mix=mix, generator=generator
    )
    expected = closed_form(P, 0.5, 0.25)
    assert_drawn_from(index, expected)
    torch.testing.assert_close(probability.cpu(), expected[index.cpu()], rtol=1e-6, atol=0)


def test_too_few_that_can_be_drawn_are_an_error_on_the_cpu():
    for nothing in (torch.zeros(4), torch.tensor([[1.0, 1.0], [0.0, 0.0]])):
        with pytest.raises(EmptyBufferError, match="got only 0"):
            functional.draw(nothing, 2)
    with pytest.raises(EmptyBufferError, match=r"at least 3 .* got 2"):
        functional.draw(torch.tensor([1.0, 0.0, 1.0]), 3, replacement=False)
    with pytest.raises(EmptyBufferError, match=r"at least 2 .* got 1"):
        functional.draw(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 2, replacement=False)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_nothing_to_draw_from_is_an_error_everywhere(shape, device):
    for replacement in (True, False):
        with pytest.raises(EmptyBufferError):
            functional.draw(torch.ones(shape, device=device), 2, replacement=replacement)


def test_more_than_there_are_is_an_error_everywhere(device):
    with pytest.raises(EmptyBufferError, match=r"at least 4 .* got 3"):
        functional.draw(torch.ones(3, device=device), 4, replacement=False)


def test_where_values_are_not_looked_at_too_few_stay_in_range(monkeypatch):
    monkeypatch.setattr("per_td.validation.can_raise", lambda tensor: False)
    for replacement in (True, False):
        index, probability = functional.draw(torch.zeros(2, 4), 3, replacement=replacement)
        assert ((index >= 0) & (index < 4)).all()
        assert (probability == 0).all()
    index, probability = functional.draw(torch.tensor([0.0, 1.0, 0.0, 3.0]), 4, replacement=False)
    assert set(index.tolist()) == {1, 3}
    assert index.tolist()[2:] == [index[0].item()] * 2
    assert torch.equal(probability, torch.tensor([0, 0.25, 0, 0.75]).double()[index])


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_weights_follow_the_papers_formula(beta, mix, device, generator):
    priority = torch.tensor(P, device=device)
    index, probability = functional.draw(
        priority, 64, alpha=0.6, uniform_mix=mix, generator=generator
    )
    p = closed_form(P, 0.6, mix)[index.cpu()]
    expected = [(len(P) * float(q)) ** -beta for q in p]
    plain = functional.importance_weights(probability, len(P), beta, normalization="none")
    assert plain.dtype == torch.float32
    assert plain.tolist() == pytest.approx(expected, rel=1e-6)
    batch = functional.importance_weights(probability, len(P), beta)
    assert batch.tolist() == pytest.approx([w / max(expected) for w in expected], rel=1e-6)


def test_each_row_is_divided_by_its_own_largest_weight(device):
    probability = torch.tensor([[0.5, 0.25], [0.1, 0.4]], device=device)
    weight = functional.importance_weights(probability, 4, 1.0)
    torch.testing.assert_close(weight.cpu(), torch.tensor([[0.5, 1.0], [1.0, 0.25]]))


@pytest.mark.parametrize("normalization", ["batch", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_weights_and_draws_agree_with_the_buffers(normalization, alpha, device, generator):
    n = 300
    priority = torch.rand(n, generator=torch.Generator().manual_seed(0)).to(device) * 5
    priority[::7] = 0.0
    buffer = PrioritizedReplayBuffer(
        n,
        alpha=alpha,
        beta=0.7,
        weight_normalization=normalization,
        device=device,
        generator=generator,
    )
    buffer.extend(data(0, n, device), priority)
    drawable = int((priority > 0).sum())
    index, probability = functional.draw(  # all of them, for the probability of each
        buffer.priority, drawable, alpha=alpha, replacement=False, generator=generator
    )
    each = torch.zeros(n, dtype=torch.float64, device=device).index_put_((index,), probability)
    batch = buffer.sample(256)
    ours = functional.importance_weights(
        each[batch["index"]], len(buffer), buffer.beta, normalization=normalization
    )
    torch.testing.assert_close(ours, batch["priority_weight"], rtol=1e-6, atol=0)


def test_a_weight_of_what_is_no_probability_is_refused():
    for wrong in (0.0, -0.1, math.nan, 1.5, math.inf):
        with pytest.raises(PriorityError, match=r"probability: expected values in \(0, 1\], got"):
            functional.importance_weights(torch.tensor([0.5, wrong]), 4, 0.5)
    for shape in ((), (0,), (3, 0)):
        with pytest.raises(PriorityError, match="at least one draw"):
            functional.importance_weights(torch.ones(shape), 4, 0.5)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"normalization": "buffer"}, "needs the smallest probability"),
        ({"normalization": "max"}, "expected one of batch, none"),
        ({"size": 0}, "size: expected an integer of at least 1"),
        ({"size": torch.tensor(0)}, "size: expected numbers of at least 1, got 0"),
        ({"size": torch.tensor([-3])}, "size: expected numbers of at least 1, got -3"),
        ({"size": torch.tensor(math.nan)}, "size: expected numbers of at least 1, got nan"),
        ({"size": torch.tensor([2, 3])}, r"shape \[1\], got shape \[2\]"),
        ({"size": torch.tensor(2j)}, "size: expected a real number, .* got torch.complex64"),
        ({"size": torch.ones((), device="meta")}, "size: expected a real number, .* on meta"),
        ({"normalization": np.array(["batch", "none"])}, "expected one of batch, none"),
        ({"beta": -1.0}, "beta: expected a finite number"),
        ({"beta": "1"}, "beta: expected a finite number"),
    ],
)
def test_settings_of_weights_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        functional.importance_weights(torch.tensor([0.5]), **{"size": 4, "beta": 0.5, **arguments})


def test_each_row_may_have_its_own_number_of_items():
    p = torch.tensor([[0.5, 0.25], [0.2, 0.1]])
    weight = functional.importance_weights(p, torch.tensor([[4], [7]]), 1.0, normalization="none")
    expected = [
        functional.importance_weights(row, n, 1.0, normalization="none")
        for row, n in zip(p, (4, 7), strict=True)
    ]
    assert torch.equal(weight, torch.stack(expected))
    with pytest.raises(ConfigurationError, match=r"shape \[2, 1\], got shape \[2\]"):
        functional.importance_weights(p, torch.tensor([4, 7]), 1.0)


def test_size_and_beta_may_be_tensors(device):
    probability = torch.tensor([0.5, 0.25], device=device)
    weight = functional.importance_weights(
        probability,
        torch.tensor(8, device=device),
        torch.tensor(0.5, device=device),
        normalization="none",
    )
    torch.testing.assert_close(weight.cpu(), torch.tensor([0.5, 2**-0.5]))


# --- resample -------------------------------------------------------------------------------------


def test_resampled_batches_follow_the_scores_and_weigh_mean_over_score(device, generator):
    score = torch.tensor(P, device=device)
    index, weight = functional.resample(score, 20_000, generator=generator)
    assert_drawn_from(index, closed_form(P))
    assert weight.dtype == torch.float32
    expected = score.double().mean() / score.double()[index]
    torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=0)


def test_resampled_means_are_those_of_the_large_batch(device, generator):
    """E[w g] = mean(g), by the probabilities: sum_i P(i) w_i g_i."""
    score = torch.rand(40, device=device, generator=generator).double() + 0.01
    value = torch.randn(40, device=device, generator=generator).double()
    index, weight = functional.resample(score, 5000, generator=generator)
    w = torch.zeros_like(score).index_put_((index,), weight.double())
    drawn = w > 0
    expectation = (score / score.sum() * w * value)[drawn].sum()
    torch.testing.assert_close(expectation, value[drawn].sum() / 40, rtol=1e-6, atol=1e-9)


def test_rows_of_scores_are_resampled_on_their_own(device, generator):
    score = torch.tensor([P, [1.0] * 8], device=device)
    index, weight = functional.resample(score, 16, generator=generator)
    assert index.shape == weight.shape == (2, 16)
    assert weight[1].tolist() == [1.0] * 16


# --- devices and the compiler ---------------------------------------------------------------------


def step(priority, n, alpha, mix, beta, replacement):
    index, probability = functional.draw(
        priority, n, alpha=alpha, uniform_mix=mix, replacement=replacement
    )
    weight = functional.importance_weights(probability, priority.shape[-1], beta)
    return index, probability, weight, *functional.resample(priority, n)


def check_compiled(backend, device, replacement):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    priority = torch.tensor(P, device=device)
    for alpha, mix, beta in ((0.5, 0.1, 0.4), (0.7, 0.2, 0.5), (0.9, 0.3, 0.6)):
        index, probability, weight, again, mean = compiled(
            priority, 4, alpha, mix, beta, replacement
        )
        p = closed_form(P, alpha, mix)[index.cpu()]
        torch.testing.assert_close(probability.cpu(), p, rtol=1e-6, atol=0)
        expected = (8 * p) ** -beta
        torch.testing.assert_close(
            weight.cpu(), (expected / expected.max()).float(), rtol=1e-6, atol=0
        )
        expected = (priority.double().mean() / priority.double()[again]).float()
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)
        if not replacement:
            assert len(index.unique()) == 4


@pytest.mark.parametrize("replacement", [True, False])
def test_calls_are_one_graph_whose_settings_may_change(replacement):
    check_compiled("eager", "cpu", replacement)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("replacement", [True, False])
def test_calls_work_with_the_compilers_own_kernels(replacement, device):
    check_compiled("inductor", device, replacement)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_draws_follow_the_closed_form(backend):
    torch._dynamo.reset()
    draw = torch.compile(functional.draw, fullgraph=True, backend=backend)
    index, _ = draw(torch.tensor(P), 20_000, alpha=0.6, uniform_mix=0.3)
    assert_drawn_from(index, closed_form(P, 0.6, 0.3))
    priority = torch.tensor([5.0, math.nan, 1.0, 3.0, 0.2]).expand(20_000, 5)
    index, _ = draw(priority, 1, replacement=False)
    assert_drawn_from(index.flatten(), torch.tensor([5.0, 0.0, 1.0, 3.0, 0.2]).double() / 9.2)


def test_a_generator_is_drawn_from_under_the_compiler():
    torch._dynamo.reset()
    draw = torch.compile(functional.draw, backend="eager")
    one, two = (
        draw(cpu(), 20, generator=torch.Generator().manual_seed(1))[0].tolist() for _ in range(2)
    )
    assert one == two


def calls(device):
    priority = torch.ones(3, 20, device=device)
    for replacement in (True, False):
        _, probability = functional.draw(
            priority, 4, alpha=0.5, uniform_mix=0.1, replacement=replacement
        )
    functional.importance_weights(probability, 20, 0.5)
    functional.importance_weights(probability, 20, 0.5, normalization="none")
    functional.resample(priority, 4)


def test_the_host_never_waits_on_a_pretended_device(pretended):
    with pytest.raises(WAITS):
        torch.ones(3, device=pretended.device).sum().item()
    assert HostWaitError in WAITS
    calls(pretended.device)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_never_waits_on_cuda():
    calls("cuda")  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
