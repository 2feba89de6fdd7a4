"""Everything that is measured, as data, with the goals that were set beforehand."""

from benchmarks.case import NO_SLOT, RATIO, Case, Goal, Ref

PEERS = ("TorchRL prioritized", "cpprb", "flashbax", "tianshou")
STANDARD_EXTEND = ("per_td", "per_td, plain torch", "copy into columns", "TorchRL uniform", *PEERS)
GROWTH = tuple(10**k for k in range(4, 9))
CROSSOVER = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 10_000_000)
CUDA_BATCHES = (256, 1_024, 8_192, 65_536)
ALL = "extend + sample + update"
OURS, UNIFORM = Ref("per_td"), Ref("TorchRL uniform", "sample")
FASTTD3 = 10_240 * 4_096  # steps kept of each of its environments


def _extend_goals(n: str) -> tuple[Goal, ...]:
    of, copy = Ref("per_td", "extend"), Ref("copy into columns", "extend")
    return (
        Goal(f"`extend` of {n} / cpprb's", of, 1.0, Ref("cpprb", "extend")),
        Goal(f"`extend` of {n} / copying the bytes", of, 1.5, copy),
    )


CASES: tuple[Case, ...] = (
    Case(
        "standard",
        "The standard case: sample and update",
        "1M filled slots, five-leaf transitions of 77 bytes, batches of 256, one CPU core."
        " `update` is of the batch just drawn, as in training; `update, other slots` is of slots"
        " that are not in the caches.",
        contestants=("per_td", "per_td, plain torch", "TorchRL uniform", *PEERS),
        parts=("sample", "update", "update_cold"),
        seconds=25,
        goals=(
            Goal("sample + update / TorchRL's uniform sample", OURS, 1 / 3, UNIFORM),
            Goal("sample + update / TorchRL prioritized's", OURS, 0.11, Ref(PEERS[0])),
            *(Goal(f"sample + update / {peer}'s", OURS, 1.0, Ref(peer)) for peer in PEERS[1:]),
        ),
        plot="contestant",
    ),
    Case(
        "extend-1",
        "Writing one transition",
        "Into a full buffer of 1M slots. `extend` takes a batch of size [1], `add` a single one.",
        contestants=STANDARD_EXTEND,
        parts=("extend", "add"),
        batches=(1,),
        seconds=10,
        goals=_extend_goals("1"),
    ),
    Case(
        "extend-1000",
        "Writing 1,000 transitions",
        "Into a full buffer of 1M slots.",
        contestants=STANDARD_EXTEND,
        parts=("extend",),
        batches=(1000,),
        seconds=10,
        goals=_extend_goals("1,000"),
    ),
    Case(
        "torchrl",
        "Inside TorchRL's own buffer",
        "TensorDictReplayBuffer with per_td's PrioritizedSampler, against its uniform sampler.",
        contestants=("per_td in TorchRL", "TorchRL uniform", "TorchRL prioritized"),
        seconds=12,
        goals=(
            Goal(
                "sample + update in TorchRL's buffer / its uniform sample",
                Ref("per_td in TorchRL"),
                1.4,
                UNIFORM,
            ),
        ),
    ),
    Case(
        "learner",
        "With a learner in between",
        "The standard case, one transition written at a time, and before each timed call a step of"
        " a small network, which leaves little of the buffer's code and data in the caches.",
        contestants=("per_td, learner in between", "TorchRL uniform, learner in between"),
        parts=("extend", "sample", "update"),
        seconds=20,
        goals=(
            Goal(
                "extend + sample + update with a learner in between / TorchRL's uniform buffer",
                Ref("per_td, learner in between", ALL),
                0.4,
                Ref("TorchRL uniform, learner in between", ALL),
            ),
        ),
    ),
    Case(
        "scripts",
        "As TorchRL's own scripts use it",
        "A memory-mapped storage of 1M slots, three batches drawn ahead, and a transform that moves"
        " the batch to a device. One transition is written, a batch drawn, a small network learns"
        " from it (not timed), and its priorities are set.",
        contestants=(
            "per_td drop-in",
            "TorchRL uniform, in scripts",
            "TorchRL prioritized, in scripts",
        ),
        parts=("extend", "sample", "update"),
        seconds=20,
        goals=(
            Goal(
                "extend + sample + update as in TorchRL's scripts / its uniform buffer",
                Ref("per_td drop-in", ALL),
                0.5,
                Ref("TorchRL uniform, in scripts", ALL),
            ),
        ),
    ),
    Case(
        "growth",
        "From 10^4 to 10^8 slots",
        "Transitions of one int64, so that 10^8 fit; all sizes take turns.",
        contestants=("per_td",),
        capacities=GROWTH,
        schemas=("number",),
        seconds=15,
        goals=(
            Goal(
                "sample + update at 10^8 slots / at 10^4",
                Ref("per_td", capacity=10**8),
                4.0,
                Ref("per_td", capacity=10**4),
            ),
            Goal(
                "bytes of priority state per slot at 10^8",
                Ref("per_td", "priority state", capacity=10**8),
                16.0,
            ),
        ),
        plot="capacity",
    ),
    Case(
        "batch",
        "Batches of 32 to 65,536",
        "1M filled slots, five-leaf transitions; TorchRL's uniform buffer beside it.",
        contestants=("per_td", "TorchRL uniform"),
        batches=(32, 128, 256, 1_024, 4_096, 16_384, 65_536),
        seconds=25,
        plot="batch",
    ),
    Case(
        "methods",
        "Ways of drawing: crossover, independent draws",
        '256 draws from masses alone; what `method="auto"` chooses follows from this.',
        contestants=("tree", "tree, plain torch", "multinomial", "cumsum + searchsorted"),
        parts=("sample",),
        capacities=CROSSOVER,
        seconds=20,
        plot="capacity",
    ),
    Case(
        "methods-distinct",
        "Ways of drawing: crossover, without replacement",
        "256 different slots from masses alone.",
        contestants=("tree", "tree, plain torch", "multinomial", "exponential keys + topk"),
        parts=("sample",),
        capacities=CROSSOVER,
        draws=("without_replacement",),
        seconds=20,
        goals=(
            Goal(
                "us for 256 different slots of 10^6",
                Ref("tree", "sample", capacity=10**6),
                200.0,
            ),
        ),
        plot="capacity",
    ),
    Case(
        "layouts",
        "Storage layouts",
        "Columns: one tensor per field. Records: the fields of a transition side by side. Small"
        " transitions have 77 bytes, large ones 3,113.",
        contestants=("columns", "records"),
        parts=("sample", "update", "extend"),
        capacities=(200_000,),
        schemas=("standard", "large"),
        seconds=12,
    ),
    Case(
        "cartpole",
        "A whole DQN loop",
        "`train` of examples/dqn_cartpole.py: environment, networks and replay, time per"
        " environment step (a gradient step every fourth one). Uniform: a ring of the same tensors,"
        " `torch.randint` and no priorities.",
        kind="cartpole",
        goals=(
            Goal(
                "DQN on CartPole, time per step: prioritized / uniform",
                Ref("per_td", "step"),
                1.15,
                Ref("uniform", "step"),
            ),
        ),
    ),
    Case(
        "startup",
        "The first call of a process",
        "Processes of their own, with torch and tensordict already imported. Numba compiles the CPU"
        " kernels once and keeps them in a folder: cold is that first time, warm every later one.",
        kind="startup",
        goals=(
            Goal(
                "ms for import, first buffer, sample and update, kernels from the cache",
                Ref("warm cache", "together"),
                300.0,
            ),
        ),
    ),
    Case(
        "exactness",
        "Exactness of the draws",
        "Total-variation distance between the slots drawn and the right distribution, over 1,000"
        " buckets: 125 ranges of slots, each split by slot mod 8. Distances are to be read against"
        " those of perfect draws, equally many; stratified draws (cpprb, flashbax) can be closer."
        " `outside` counts draws of slots that do not exist.",
        kind="exactness",
        capacities=tuple(10**k for k in range(3, 9)),
    ),
    Case(
        "cuda-exactness",
        "Exactness of the draws on CUDA",
        "As above, on the GPU.",
        kind="exactness",
        capacities=tuple(10**k for k in range(3, 9)),
        device="cuda",
        goals=(
            Goal(
                "CUDA: distance of the draws at 10^8 slots / that of perfect draws",
                Ref("per_td: tree", RATIO, capacity=10**8),
                1.15,  # six standard deviations of it
            ),
            Goal(
                "CUDA: draws at 10^8 slots of slots that do not exist",
                Ref("per_td: tree", NO_SLOT, capacity=10**8),
                0.0,
            ),
        ),
    ),
    Case(
        "profile",
        "Where the microseconds go",
        "The parts of a call, each on its own, on the standard case; `rest` is what remains.",
        kind="profile",
        seconds=12,
        by_request="profile",
    ),
    Case(
        "cuda-capacity",
        "CUDA: from 10^6 to 10^8 slots",
        "A step is sample + update; transitions of one int64. Eager: each operation launched from"
        " Python, steps following one another. Graph: a step replayed as one CUDA graph.",
        contestants=("per_td, graph", "per_td, eager"),
        parts=("step",),
        capacities=(10**6, 10**7, 10**8),
        batches=CUDA_BATCHES,
        schemas=("number",),
        seconds=20,
        device="cuda",
        goals=(
            *(
                Goal(
                    f"CUDA graph, batch {batch:,}: step at 10^8 slots / at 10^6",
                    Ref("per_td, graph", capacity=10**8, batch=batch),
                    1.5,
                    Ref("per_td, graph", capacity=10**6, batch=batch),
                )
                for batch in CUDA_BATCHES
            ),
            Goal(
                "CUDA graph: us for a step of batch 1,024 at 10^7 slots",
                Ref("per_td, graph", capacity=10**7, batch=1024),
                60.0,
            ),
            Goal(
                "CUDA: host syncs in an eager step",
                Ref("per_td, eager", "host syncs", capacity=10**7, batch=1024),
                0.0,
            ),
        ),
        plot="capacity",
    ),
    Case(
        "cuda-methods",
        "CUDA against CPU, and against flat methods",
        "Batches of 1,024. The flat methods keep masses alone and go through all of them to draw.",
        contestants=(
            "per_td on the CPU",
            "per_td, eager",
            "per_td, graph",
            "multinomial, graph",
            "cumsum + searchsorted, graph",
        ),
        parts=("step",),
        capacities=(*CROSSOVER, 10**8),
        batches=(1_024,),
        schemas=("number",),
        seconds=30,
        device="cuda",
        plot="capacity",
    ),
    Case(
        "cuda-batch",
        "CUDA against CPU by batch size",
        "10^6 slots.",
        contestants=("per_td on the CPU", "per_td, eager", "per_td, graph"),
        parts=("step",),
        batches=(32, *CUDA_BATCHES),
        schemas=("number",),
        seconds=15,
        device="cuda",
        plot="batch",
    ),
    Case(
        "cuda-peers",
        "CUDA: other ways, side by side",
        "A step is sample + update, 10^6 slots, batches of 1,024. The flat methods keep masses"
        " alone and go through all of them to draw.",
        contestants=(
            "per_td, eager",
            "per_td, graph",
            "per_td in TorchRL, eager",
            "TorchRL prioritized, eager",
            "multinomial, graph",
            "cumsum + searchsorted, graph",
        ),
        parts=("step",),
        batches=(1_024,),
        schemas=("number",),
        seconds=10,
        device="cuda",
    ),
    Case(
        "cuda-segments",
        "CUDA: all priorities rewritten before every draw",
        "PufferLib's way: 4,096 segments, all of them given new priorities, then 256 drawn. With so"
        " few, a flat method has little to go through.",
        contestants=(
            "per_td, all anew, eager",
            "per_td, all anew, graph",
            "PufferLib's way, eager",
            "PufferLib's way, graph",
        ),
        parts=("step",),
        capacities=(4_096,),
        schemas=("number",),
        seconds=8,
        device="cuda",
    ),
    Case(
        "cuda-fasttd3",
        "CUDA: batches of 32,768 from 4.2 x 10^7 slots",
        "FastTD3's shape: 4,096 environments, 10,240 steps of each. Transitions of one int64.",
        contestants=("per_td, graph", "per_td, eager"),
        parts=("step",),
        capacities=(FASTTD3,),
        batches=(32_768,),
        schemas=("number",),
        seconds=8,
        device="cuda",
        goals=(
            Goal(
                "CUDA graph: us for a step of batch 32,768 at 4.2 x 10^7 slots",
                Ref("per_td, graph", capacity=FASTTD3),
                150.0,
            ),
        ),
    ),
    Case(
        "cuda-extend",
        "CUDA: writing 4,096 transitions",
        "Into a full buffer of 10^6 slots, five-leaf transitions that are on the GPU.",
        contestants=("per_td, eager",),
        parts=("extend",),
        batches=(4_096,),
        seconds=5,
        device="cuda",
        goals=(
            Goal("CUDA: us for `extend` of 4,096 rows", Ref("per_td, eager", "extend"), 50.0),
            Goal(
                "CUDA: host syncs in `extend` of 4,096 rows",
                Ref("per_td, eager", "host syncs of extend"),
                0.0,
            ),
        ),
    ),
)
