"""The contestants, by the name in the tables."""

from benchmarks.contestants import cuda, methods, own, peers, rl, segments
from benchmarks.contestants.base import Contestant, NotRun

__all__ = ["CONTESTANTS", "Contestant", "NotRun"]

CONTESTANTS: dict[str, type[Contestant]] = {
    contestant.name: contestant
    for contestant in (
        own.PerTd,
        own.PerTdLearner,
        own.PlainTorch,
        own.Columns,
        own.Records,
        own.CopyColumns,
        rl.InTorchRL,
        rl.TorchRLUniform,
        rl.TorchRLUniformLearner,
        rl.TorchRLPrioritized,
        rl.DropInAsInScripts,
        rl.UniformAsInScripts,
        rl.PrioritizedAsInScripts,
        peers.Cpprb,
        peers.Flashbax,
        peers.Tianshou,
        methods.Tree,
        methods.PlainTree,
        methods.Multinomial,
        methods.CumulativeSum,
        methods.ExponentialKeys,
        cuda.OnCpu,
        cuda.PerTdEager,
        cuda.PerTdGraph,
        cuda.GraphMultinomial,
        cuda.GraphCumulativeSum,
        cuda.InTorchRLOnCuda,
        cuda.TorchRLOnCuda,
        segments.PerTdAnew,
        segments.PerTdAnewGraph,
        segments.PufferLib,
        segments.PufferLibGraph,
    )
}
