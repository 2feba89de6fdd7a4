"""The contestants on a GPU: per_td eager and in a CUDA graph, flat methods in a graph, and a CPU.

A step is sample + update. In a graph all of it is replayed with one launch: the draws differ from
replay to replay (the generator's state advances), the TD errors are the same.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.contestants import methods
from benchmarks.contestants.base import Contestant, NotRun
from benchmarks.contestants.own import PerTd
from benchmarks.contestants.rl import InTorchRL, TorchRLPrioritized
from benchmarks.workload import ALPHA, BETA, EPS, Point


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, after a warm-up on a side stream as torch's notes say."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise NotRun(f"it cannot be captured ({str(error).splitlines()[0]})") from error
    return graph


class OnCpu(PerTd):
    """per_td on the CPU of the same machine, one thread."""

    name = "per_td on the CPU"

    def __init__(self, point: Point) -> None:
        super().__init__(dataclasses.replace(point, device="cpu"))


class PerTdEager(PerTd):
    """per_td, each operation launched from Python."""

    name = "per_td, eager"
    clock = "cuda"

    def facts(self) -> dict[str, tuple[float | None, str]]:
        """Bytes, and whether a step, or an `extend`, stops the host."""
        return super().facts() | {
            "host syncs": (self._syncs(self.step), "in a step"),
            "host syncs of extend": (self._syncs(self.extend), "in an extend"),
        }

    def _syncs(self, call: Callable[[], None]) -> float | None:
        call()  # the first call may compile something
        if self.point.device != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return 1.0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return 0.0


class Graphed(Contestant):
    """Puts `_step` of the class beside it into a CUDA graph, which `step` replays."""

    clock = "cuda"
    cuda_only = True

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        _, self.td_error = self.pool.next()
        self.graph = capture(self._step)

    def _step(self) -> None:
        self.sample()
        self.update()

    def step(self) -> None:
        self.graph.replay()


class PerTdGraph(Graphed, PerTd):
    """per_td, a step captured in a CUDA graph."""

    name = "per_td, graph"


class InTorchRLOnCuda(InTorchRL):
    """per_td's sampler in TorchRL's buffer, both on the GPU."""

    name = "per_td in TorchRL, eager"
    clock = "cuda"


class TorchRLOnCuda(TorchRLPrioritized):
    """TorchRL's own prioritized replay with its CUDA tree, which only some of its builds have."""

    name = "TorchRL prioritized, eager"
    clock = "cuda"
    cuda_only = True
    options: ClassVar[dict[str, object]] = {"device": "cuda"}


class _Flat(Contestant):
    """Masses in one tensor and nothing above them: drawing is O(N)."""

    draw: Callable[[Tensor, int], Tensor]

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        data, self.priority = self.initial()
        self.columns = dict(data.items())
        self.mass = self.priority**ALPHA
        self.sample()
        self.check()

    def sample(self) -> None:
        self.index = index = self.draw(self.mass, self.point.batch)
        mass = self.mass[index]
        self.batch = {key: column.index_select(0, index) for key, column in self.columns.items()}
        self.weight = (mass / mass.amin()) ** -BETA

    def drawn(self) -> Tensor:
        return self.index

    def update(self) -> None:
        self.mass[self.index] = (self.td_error.abs() + EPS) ** ALPHA


class GraphMultinomial(Graphed, _Flat):
    """torch.multinomial in float32."""

    name = "multinomial, graph"
    draw = staticmethod(methods.multinomial)


class GraphCumulativeSum(Graphed, _Flat):
    """The running sum of all masses in float64, and a binary search in it."""

    name = "cumsum + searchsorted, graph"
    draw = staticmethod(methods.cumulative_sum)
