"""What each TorchRL loss writes under `td_error`, and whether it reads `priority_weight`.

Every loss is built from tiny networks and run. The transitions are terminal, so a target is its
reward and, with rewards far above what a fresh network answers, |delta| is the reward: how
`td_error` grows with it shows the unit. `docs/torchrl_losses.md` carries the same table, and the
last tests compare the two.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("torchrl")

from torchrl import objectives as o
from torchrl.data import Bounded, OneHot
from torchrl.modules import (
    DiffusionActor,
    DistributionalQValueActor,
    OneHotCategorical,
    ProbabilisticActor,
    QMixer,
    QValueActor,
    QValueModule,
    TanhDelta,
    TanhNormal,
    ValueOperator,
    WorldModel,
)
from torchrl.modules.models import ACTModel
from torchrl.objectives import deprecated

B, OBS, ACT, ATOMS, AGENTS = 16, 3, 2, 5, 2
DOCS = Path(__file__).parents[2] / "docs" / "torchrl_losses.md"

# --- networks -------------------------------------------------------------------------------------


class Join(nn.Linear):
    """A linear layer over its concatenated arguments."""

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat(args, -1))


def linear(n_in: int, n_out: int, in_keys: list, out_keys: list) -> TensorDictModule:
    return TensorDictModule(Join(n_in, n_out), in_keys=in_keys, out_keys=out_keys)


def policy() -> ProbabilisticActor:
    net = nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=Bounded(-1.0, 1.0, (ACT,)),
        return_log_prob=True,
    )


def deterministic_policy() -> TensorDictModule:
    return linear(OBS, ACT, ["observation"], ["action"])


def dirac_policy() -> ProbabilisticActor:
    return ProbabilisticActor(
        linear(OBS, ACT, ["observation"], ["param"]),
        in_keys=["param"],
        distribution_class=TanhDelta,
    )


def one_hot_policy() -> ProbabilisticActor:
    return ProbabilisticActor(
        linear(OBS, ACT, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        spec=OneHot(ACT),
        return_log_prob=True,
    )


def q_of_action(n_out: int = 1) -> ValueOperator:
    return ValueOperator(Join(OBS + ACT, n_out), in_keys=["observation", "action"])


def q_of_all_actions(out_key: str) -> TensorDictModule:
    return linear(OBS, ACT, ["observation"], [out_key])


def state_value() -> ValueOperator:
    return ValueOperator(nn.Linear(OBS, 1), in_keys=["observation"])


def q_actor() -> QValueActor:
    return QValueActor(nn.Linear(OBS, ACT), spec=OneHot(ACT))


def distributional_actor() -> DistributionalQValueActor:
    atoms = nn.Unflatten(-1, (ATOMS, ACT))
    net = nn.Sequential(nn.Linear(OBS, ATOMS * ACT), atoms, nn.LogSoftmax(-2))
    return DistributionalQValueActor(net, spec=OneHot(ACT), support=torch.linspace(-1, 1, ATOMS))


def qmixer() -> nn.Module:
    chosen = ("agents", "chosen_action_value")
    values, actions = ("agents", "action_value"), ("agents", "action")
    local = TensorDictSequential(
        linear(OBS, ACT, [("agents", "observation")], [values]),
        QValueModule(action_value_key=values, out_keys=[actions, values, chosen], spec=OneHot(ACT)),
    )
    mixer = TensorDictModule(
        QMixer(state_shape=(AGENTS, OBS), mixing_embed_dim=4, n_agents=AGENTS, device="cpu"),
        in_keys=[chosen, ("agents", "observation")],
        out_keys=["global"],
    )
    loss = o.QMixerLoss(local, mixer, action_space="one-hot")
    loss.set_keys(action=actions, action_value=values, local_value=chosen, global_value="global")
    return loss


def world_model() -> WorldModel:
    return WorldModel(
        linear(OBS, 4, ["observation"], ["latent"]),
        linear(4 + ACT, 4, ["latent", "action"], [("next", "latent")]),
        linear(4, 1, [("next", "latent")], [("next", "reward")]),
    )


def discriminator() -> TensorDictModule:
    return TensorDictSequential(
        linear(OBS + ACT, 1, ["observation", "action"], ["logit"]),
        TensorDictModule(nn.Sigmoid(), in_keys=["logit"], out_keys=["d_logits"]),
    )


def act_model() -> TensorDictModule:
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dropout": 0.0}
    net = ACTModel(OBS, ACT, chunk_size=2, hidden_dim=8, nheads=2, **layers)
    keys = ["action_pred", "mu", "log_var"]
    return TensorDictModule(net, in_keys=["observation", "action_chunk"], out_keys=keys)


# --- the table ------------------------------------------------------------------------------------

SQUARE, ABSOLUTE, ENTROPY = "delta^2", "|delta|", "cross-entropy"
ACTOR_AND_Q = ("loss_actor", "loss_qvalue")


@dataclass(frozen=True)
class Writer:
    """A loss that writes `td_error`: in which unit, and what `priority_weight` changes in it."""

    name: str
    build: Callable[[], nn.Module]
    unit: str
    shape: str = "[B]"
    weighted: tuple[str, ...] = ()
    detached: bool = True
    one_hot: bool = False

    def row(self) -> list[str]:
        weighted = ", ".join(f"`{key}`" for key in self.weighted) or "not read"
        return [self.name, self.unit, self.shape, "yes" if self.detached else "**no**", weighted]


def writers() -> list[Writer]:
    box = {"bounds": (-1.0, 1.0)}
    hot = {"action_space": "one-hot"}
    nets = {"num_qvalue_nets": 3}
    # an alpha of 1 makes the loss of log(alpha) zero, with weights and without
    alpha = {"alpha_init": 0.5}
    discrete = {"num_actions": ACT, **hot, **alpha}
    soft = (*ACTOR_AND_Q, "loss_alpha")
    return [
        Writer(
            "`DQNLoss`",
            lambda: o.DQNLoss(q_actor(), **hot),
            SQUARE,
            "[B, 1]",
            ("loss",),
            one_hot=True,
        ),
        Writer(
            "`DistributionalDQNLoss`",
            lambda: o.DistributionalDQNLoss(distributional_actor(), gamma=0.9),
            ENTROPY,
            "[B, 1]",
            ("loss",),
            one_hot=True,
        ),
        Writer("`QMixerLoss`", qmixer, SQUARE, "[B, 1]"),
        Writer(
            "`DDPGLoss`",
            lambda: o.DDPGLoss(deterministic_policy(), q_of_action()),
            SQUARE,
            weighted=("loss_actor", "loss_value"),
        ),
        Writer(
            "`TD3Loss`",
            lambda: o.TD3Loss(deterministic_policy(), q_of_action(), **box),
            SQUARE,
            weighted=ACTOR_AND_Q,
        ),
        Writer(
            "`TD3BCLoss`",
            lambda: o.TD3BCLoss(deterministic_policy(), q_of_action(), **box),
            SQUARE,
            weighted=ACTOR_AND_Q,
        ),
        Writer(
            "`SACLoss`",
            lambda: o.SACLoss(policy(), q_of_action(), **alpha),
            ABSOLUTE,
            weighted=soft,
        ),
        Writer(
            "`SACLoss` with a `value_network`",
            lambda: o.SACLoss(policy(), q_of_action(), state_value(), **alpha),
            SQUARE,
            weighted=(*soft, "loss_value"),
            detached=False,
        ),
        Writer(
            "`DiscreteSACLoss`",
            lambda: o.DiscreteSACLoss(
                one_hot_policy(), q_of_all_actions("action_value"), **discrete
            ),
            ABSOLUTE,
            weighted=soft,
            one_hot=True,
        ),
        Writer(
            "`TQCLoss`",
            lambda: o.TQCLoss(policy(), q_of_action(ATOMS), num_qvalue_nets=2, **alpha),
            ABSOLUTE,
            weighted=soft,
        ),
        Writer("`CrossQLoss`", lambda: o.CrossQLoss(policy(), q_of_action(), **alpha), ABSOLUTE),
        Writer("`REDQLoss`", lambda: o.REDQLoss(policy(), q_of_action(), **nets, **alpha), SQUARE),
        Writer("`IQLLoss`", lambda: o.IQLLoss(policy(), q_of_action(), state_value()), SQUARE),
        Writer(
            "`DiscreteIQLLoss`",
            lambda: o.DiscreteIQLLoss(
                one_hot_policy(), q_of_all_actions("state_action_value"), state_value(), **hot
            ),
            SQUARE,
            one_hot=True,
        ),
        Writer("`CQLLoss`", lambda: o.CQLLoss(policy(), q_of_action(), **alpha), SQUARE),
        Writer(
            "`DiscreteCQLLoss`",
            lambda: o.DiscreteCQLLoss(q_actor(), **hot),
            SQUARE,
            "[B, 1]",
            detached=False,
            one_hot=True,
        ),
        Writer(
            "`deprecated.REDQLoss_deprecated`",
            lambda: deprecated.REDQLoss_deprecated(policy(), q_of_action(), **nets, **alpha),
            ABSOLUTE,
        ),
        Writer(
            "`deprecated.DoubleREDQLoss_deprecated`",
            lambda: deprecated.DoubleREDQLoss_deprecated(policy(), q_of_action(), **nets, **alpha),
            ABSOLUTE,
        ),
    ]


SILENT: dict[str, Callable[[], nn.Module]] = {
    "A2CLoss": lambda: o.A2CLoss(policy(), state_value()),
    "PPOLoss": lambda: o.PPOLoss(policy(), state_value()),
    "ClipPPOLoss": lambda: o.ClipPPOLoss(policy(), state_value()),
    "KLPENPPOLoss": lambda: o.KLPENPPOLoss(policy(), state_value()),
    "MAPPOLoss": lambda: o.MAPPOLoss(policy(), state_value(), normalize_advantage_exclude_dims=()),
    "IPPOLoss": lambda: o.IPPOLoss(policy(), state_value(), normalize_advantage_exclude_dims=()),
    "ReinforceLoss": lambda: o.ReinforceLoss(policy(), state_value()),
    "BCLoss": lambda: o.BCLoss(deterministic_policy()),
    "DTLoss": lambda: o.DTLoss(dirac_policy()),
    "OnlineDTLoss": lambda: o.OnlineDTLoss(policy()),
    "GAILLoss": lambda: o.GAILLoss(discriminator()),
    "RNDLoss": lambda: o.RNDLoss(nn.Linear(OBS, 4), nn.Linear(OBS, 4)),
    "ACTLoss": lambda: o.ACTLoss(act_model()),
    "DiffusionBCLoss": lambda: o.DiffusionBCLoss(DiffusionActor(ACT, OBS, num_steps=4)),
    "WorldModelLoss": lambda: o.WorldModelLoss(world_model(), losses=["reward"]),
    "ExponentialQuadraticCost": lambda: o.ExponentialQuadraticCost(),
}

# They need a world model with imagined rollouts: judged by the keys they accept.
NOT_RUN = {
    "DreamerModelLoss",
    "DreamerActorLoss",
    "DreamerValueLoss",
    "DreamerV3ModelLoss",
    "DreamerV3ActorLoss",
    "DreamerV3ValueLoss",
    "DreamerV3Loss",
}

# --- running a loss -------------------------------------------------------------------------------


def transitions(reward: float, one_hot: bool = False) -> TensorDict:
    """Terminal transitions [B], rewards from `reward` up to its double, with all a loss reads."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(2, B, OBS, generator=generator)
    agents = torch.randn(2, B, AGENTS, OBS, generator=generator)
    action = torch.randn(B, ACT, generator=generator).clamp(-0.9, 0.9)
    hot = nn.functional.one_hot(torch.randint(ACT, (B,), generator=generator), ACT)
    end = torch.ones(B, 1, dtype=torch.bool)
    rewards = reward * (1 + torch.arange(B) / B).unsqueeze(-1)
    return TensorDict(
        {
            "observation": obs[0],
            "action": hot if one_hot else action,
            "agents": {"observation": agents[0], "action": hot.unsqueeze(1).repeat(1, AGENTS, 1)},
            "next": {
                "observation": obs[1],
                "reward": rewards,
                "done": end,
                "terminated": end.clone(),
                "agents": {"observation": agents[1]},
            },
            "action_log_prob": torch.zeros(B),
            "loc": torch.zeros(B, ACT),
            "scale": torch.ones(B, ACT),
            "advantage": rewards.clone(),
            "value_target": rewards.clone(),
            "collector_observation": obs[1],
            "collector_action": action.flip(0),
            "vla_action": {"chunk": action.unsqueeze(1).repeat(1, 2, 1)},
            "stats": {"mean": obs[0], "var": torch.eye(OBS).repeat(B, 1, 1)},
        },
        [B],
    )


def seeded_loss(build: Callable[[], nn.Module]) -> nn.Module:
    """The loss with always the same weights, and the target updater without which TorchRL warns."""
    torch.manual_seed(0)
    loss = build()
    if isinstance(loss, o.ExponentialQuadraticCost):
        loss.set_keys(loc=("stats", "mean"), scale=("stats", "var"))
    if any(re.fullmatch("target_.*_params", name) for name, _ in loss.named_children()):
        o.SoftUpdate(loss, eps=0.99)
    return loss


def run(
    loss: nn.Module, batch: TensorDict, weight: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The `loss*` entries that come out, for one and the same draw of noise."""
    if weight is not None:
        batch["priority_weight"] = weight
    torch.manual_seed(1)
    out = loss(batch)
    return {key: value.detach() for key, value in out.items() if key.startswith("loss")}


def td_error_of(writer: Writer, reward: float) -> torch.Tensor:
    batch = transitions(reward, writer.one_hot)
    run(seeded_loss(writer.build), batch)
    return batch["td_error"]


def unit_of(writer: Writer) -> str:
    """The unit, from the power of the reward that `td_error` grows with, and from its size."""
    reward = 1e4
    small, large = (td_error_of(writer, r).detach().reshape(B) for r in (reward, 10 * reward))
    delta = transitions(reward)["next", "reward"].reshape(B)
    for power, unit in ((0, ENTROPY), (1, ABSOLUTE), (2, SQUARE)):
        if torch.allclose(large / small, torch.tensor(10.0**power), rtol=1e-2):
            if power:
                torch.testing.assert_close(small, delta**power, rtol=1e-2, atol=0.0)
            return unit
    raise AssertionError(f"td_error grows by {large / small} when the rewards grow tenfold")


def shape_of(td_error: torch.Tensor) -> str:
    names = {B: "B"}
    return "[" + ", ".join(names.get(n, str(n)) for n in td_error.shape) + "]"


def changed_by(
    build: Callable[[], nn.Module], weight: torch.Tensor, one_hot: bool = False
) -> tuple[str, ...]:
    """The entries that `weight` [B] changes, against a weight of 1 everywhere."""
    # a loss each: some adapt with every call
    plain = run(seeded_loss(build), transitions(1.0, one_hot), torch.ones(B))
    weighted = run(seeded_loss(build), transitions(1.0, one_hot), weight)
    assert plain, "the loss returned no entry named loss*"
    return tuple(sorted(key for key in plain if not torch.allclose(plain[key], weighted[key])))


@pytest.fixture(autouse=True)
def keep_the_global_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


each_writer = pytest.mark.parametrize("writer", writers(), ids=lambda w: w.name.replace("`", ""))
each_silent = pytest.mark.parametrize("name", SILENT)
UNEVEN = torch.linspace(0.1, 1.0, B)

# --- tests ----------------------------------------------------------------------------------------


@each_writer
def test_td_error_has_the_unit_of_the_table(writer):
    assert unit_of(writer) == writer.unit


@each_writer
def test_td_error_has_the_shape_of_the_table_and_carries_a_graph_only_where_it_says_so(writer):
    td_error = td_error_of(writer, 1.0)
    assert shape_of(td_error) == writer.shape
    assert td_error.requires_grad is not writer.detached


@each_writer
def test_priority_weight_changes_exactly_the_entries_of_the_table(writer):
    assert changed_by(writer.build, UNEVEN, writer.one_hot) == tuple(sorted(writer.weighted))


@each_writer
def test_a_constant_priority_weight_changes_nothing_under_the_mean(writer):
    assert changed_by(writer.build, torch.full((B,), 0.25), writer.one_hot) == ()


def test_the_distributional_loss_writes_its_own_cross_entropy():
    (writer,) = (w for w in writers() if w.unit == ENTROPY)
    batch = transitions(1e4, one_hot=True)
    loss = seeded_loss(writer.build)
    run(loss, batch)
    # every target lies beyond the support, so all its mass is on the top atom
    logits = seeded_loss(writer.build).value_network(batch.select("observation"))["action_value"]
    top = (logits[:, -1] * batch["action"]).sum(-1)
    torch.testing.assert_close(batch["td_error"].squeeze(-1), -top.detach())


def dqn(reduction: str) -> nn.Module:
    return seeded_loss(lambda: o.DQNLoss(q_actor(), action_space="one-hot", reduction=reduction))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_without_the_mean_a_weight_multiplies_the_loss(reduction):
    plain = run(dqn(reduction), transitions(1.0, True))["loss"]
    weighted = run(dqn(reduction), transitions(1.0, True), torch.full((B,), 0.25))["loss"]
    torch.testing.assert_close(weighted, 0.25 * plain)


def test_the_mean_is_divided_by_the_sum_of_the_weights():
    each = run(dqn("none"), transitions(1.0, True))["loss"]
    mean = run(dqn("mean"), transitions(1.0, True), UNEVEN)["loss"]
    torch.testing.assert_close(mean, (UNEVEN * each).sum() / UNEVEN.sum())


def test_weights_with_a_trailing_dimension_raise_or_broadcast_silently():
    column = UNEVEN.unsqueeze(-1)
    for reduction in ("mean", "sum"):
        with pytest.raises(ValueError, match="Tensor and weights shapes must match"):
            run(dqn(reduction), transitions(1.0, True), column)
    assert run(dqn("none"), transitions(1.0, True), column)["loss"].shape == (B, B)


@each_writer
def test_a_part_of_a_loss_writes_td_error_only_in_ddpg_and_discrete_cql(writer):
    loss, batch = seeded_loss(writer.build), transitions(1.0, writer.one_hot)
    for part in ("loss_value", "value_loss", "qvalue_loss", "qvalue_v1_loss", "qvalue_v2_loss"):
        with contextlib.suppress(AttributeError):  # not every loss has every part
            getattr(loss, part)(batch)
    assert ("td_error" in batch) == (writer.name in ("`DDPGLoss`", "`DiscreteCQLLoss`"))


@each_silent
@pytest.mark.filterwarnings("ignore:The name target_.* wasn't part of the annotations:UserWarning")
def test_the_other_losses_write_no_td_error_and_read_no_priority_weight(name):
    loss, batch = seeded_loss(SILENT[name]), transitions(1.0)
    out = run(loss, batch, UNEVEN)
    assert out, "the loss returned no entry named loss*"
    assert "td_error" not in batch
    assert changed_by(SILENT[name], UNEVEN) == ()


def exported(accepted_key: str | None = None) -> set[str]:
    """Names of the losses in torchrl.objectives, of those that accept a key if one is given."""
    found = {name: c for name, c in vars(o).items() if isinstance(c, type) and name != "LossModule"}
    return {
        name
        for name, c in found.items()
        if issubclass(c, o.LossModule)
        and (accepted_key is None or hasattr(c._AcceptedKeys, accepted_key))
    }


def class_name(writer: Writer) -> str:
    return re.search(r"`(.+?)`", writer.name)[1]


def test_every_exported_loss_is_in_one_of_the_lists():
    listed = {class_name(w) for w in writers()}
    assert exported("priority") == {name for name in listed if "." not in name}
    assert exported("priority_weight") == {class_name(w) for w in writers() if w.weighted}
    assert exported() - exported("priority") == set(SILENT) | NOT_RUN


# --- the page -------------------------------------------------------------------------------------


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)[1]


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [[cell.replace("\\|", "|") for cell in row] for row in cells[2:]]


def test_the_page_shows_the_table_that_was_measured():
    assert table_rows(section("Losses that write `td_error`")) == [w.row() for w in writers()]


def test_the_page_lists_the_losses_that_write_nothing():
    run_list, not_run_list = section("Losses that write nothing").strip().split("\n\n")[:2]
    assert set(re.findall(r"`(\w+(?:Loss|Cost))`", run_list)) == set(SILENT)
    assert set(re.findall(r"`(\w+Loss)`", not_run_list)) == NOT_RUN
