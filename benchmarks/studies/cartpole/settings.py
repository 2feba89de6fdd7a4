"""The settings of the study, each with uniform and with prioritized replay."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Replay:
    """The way transitions are drawn; the defaults are those of the course's buffer."""

    alpha: float = 0.6
    beta: float = 0.4
    beta_per_episode: float = 0.001  # added per finished episode, averaged over the runs, up to 1
    beta_increment: float = 0.0  # added per gradient step, up to 1
    eps: float = 1e-3
    weight_normalization: str = "batch"
    draw: str = "independent"
    new_priority: str = "buffer_max"


UNIFORM = Replay(alpha=0.0, beta=0.0, beta_per_episode=0.0)
"""The same code with equal masses and weights of 1: only the priorities differ."""


AGENTS = {"uniform": UNIFORM, "prioritized": Replay()}


@dataclass(frozen=True)
class Settings:
    """A DQN and how long it trains. Steps are environment steps of each run."""

    task: str = "CartPole-v1"
    steps: int = 30_000  # at most
    episodes: int = 400  # training ends when every run has had so many
    lr: float = 1e-3  # of Adam
    update_every: int = 1  # steps per gradient step
    tau: float = 0.005  # share of the network mixed into the target after each gradient step
    copy_every: int = 0  # instead: gradient steps between two copies into the target
    failure_reward: bool = False  # -1 where the pole falls and 0 elsewhere, instead of 1 each step
    observation_scale: tuple[float, ...] = ()  # factors on what the networks see
    hidden: tuple[int, ...] = (64, 64)
    gamma: float = 0.99
    batch_size: int = 64
    capacity: int = 10_000
    learning_starts: int = 500  # steps of every run before the first gradient step
    explore_end: float = 0.05  # share of random actions at the end; it starts at 1
    explore_decay: float = 1_000.0  # steps in which the distance to the end falls by a factor e
    evaluate_every: int = 5_000  # steps between two greedy evaluations
    evaluation_episodes: int = 10


@dataclass(frozen=True)
class Variant:
    """One table of the results: settings and the agents compared, the first being the baseline."""

    title: str
    settings: Settings
    step_windows: tuple[tuple[int, int], ...]  # compared: episodes that end in them
    episode_windows: tuple[tuple[int, int], ...] = ((1, 100),)
    agents: dict[str, Replay] = field(default_factory=lambda: AGENTS)


COURSE = Settings()
SLOW = replace(COURSE, lr=2.5e-4)
EARLY = ((2_000, 4_000), (4_000, 6_000), (8_000, 10_000))

ABLATION = {
    "uniform": UNIFORM,
    "prioritized": Replay(),
    "alpha 0.3": Replay(alpha=0.3),
    "alpha 1": Replay(alpha=1.0),
    "beta 0": Replay(beta=0.0, beta_per_episode=0.0),
    "beta 1": Replay(beta=1.0),
    "beta + 0.001 per gradient step": Replay(beta_per_episode=0.0, beta_increment=0.001),
    "eps 1e-6": Replay(eps=1e-6),
    "eps 1e-2": Replay(eps=1e-2),
    "eps 1e-1": Replay(eps=1e-1),
    'weights "buffer"': Replay(weight_normalization="buffer"),
    'weights "none"': Replay(weight_normalization="none"),
    "stratified": Replay(draw="stratified"),
    'new priority "ever_max"': Replay(new_priority="ever_max"),
}

VARIANTS = {
    "course": Variant(
        "lr 1e-3, a gradient step each step, soft target (the course's settings)",
        replace(COURSE, steps=130_000),
        (*EARLY, (15_000, 20_000), (30_000, 40_000), (55_000, 68_000)),
        ((1, 100), (90, 110), (380, 400)),
    ),
    "small_lr": Variant(
        "lr 2.5e-4: a quarter, as the paper does under PER",
        replace(SLOW, steps=20_000),
        (*EARLY, (15_000, 20_000)),
        ((1, 100), (90, 110)),
    ),
    "hard_target": Variant(
        "lr 1e-3, the target copied every 200 gradient steps",
        replace(COURSE, copy_every=200, steps=10_500),
        EARLY,
        ((1, 100), (90, 110)),
    ),
    "every_4": Variant(
        "lr 1e-3, a gradient step every 4 steps",
        replace(COURSE, update_every=4, steps=80_000),
        (*EARLY, (15_000, 20_000), (30_000, 40_000), (60_000, 75_000)),
        ((1, 100), (90, 110), (380, 400)),
    ),
    "sparse": Variant(
        "lr 2.5e-4, reward only at a failure: -1",
        replace(SLOW, failure_reward=True, steps=10_500),
        EARLY,
        ((1, 100), (90, 110)),
    ),
    "mountain_car": Variant(
        "MountainCar-v0, lr 1e-3, a gradient step every 4 steps",
        replace(
            COURSE, task="MountainCar-v0", steps=40_000, observation_scale=(1.0, 10.0),
            explore_decay=5_000.0, episodes=1_000, update_every=4, evaluate_every=10_000,
        ),
        ((5_000, 10_000), (10_000, 20_000), (20_000, 30_000), (30_000, 40_000)),
        ((1, 100),),
    ),
    "ablation": Variant(
        "lr 2.5e-4: PER's settings one by one",
        replace(SLOW, steps=4_200, evaluate_every=2_000),
        ((1_000, 2_000), (2_000, 4_000)),
        (),
        ABLATION,
    ),
}  # fmt: skip


def quick(variant: Variant) -> Variant:
    """Shorten a variant to a few thousand steps: enough to see that it runs."""
    steps = min(variant.settings.steps, 3_000)
    settings = replace(variant.settings, steps=steps, evaluate_every=1_500)
    windows = ((500, 1_500), (1_500, 2_500))
    return replace(
        variant, settings=settings, step_windows=windows, episode_windows=((1, 10), (10, 20))
    )
