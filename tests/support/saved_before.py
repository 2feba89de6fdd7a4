"""Files that the version before the parts were rebuilt has saved, and what it did next.

`PYTHONPATH=<a checkout of 67b0a04> python tests/support/saved_before.py` has made what is in
tests/checkpoint/files: a file for each of `CASES`, and in played.json what `play` returned for the
buffer that was saved, except for "without_replacement": such draws now take other random numbers,
and `play` returned what is there when they did. It uses the public interface alone, which both
versions have.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from per_td import PrioritizedReplayBuffer, TransitionReplayBuffer

FILES = Path(__file__).parents[1] / "checkpoint" / "files"
PLAYED = FILES / "played.json"

CASES: dict[str, dict[str, Any]] = {
    "columns": {"layout": "columns"},
    "records": {"layout": "records", "draw": "stratified"},
    "memmap": {"storage": "memmap", "layout": "records"},
    "buffer": {"weight_normalization": "buffer", "new_priority": "ever_max"},
    "without_replacement": {"draw": "without_replacement"},
    "multinomial": {"method": "multinomial"},
    "rank": {"prioritization": "rank", "sort_interval": 7},
    "many": {"num_buffers": 3},
    "many_buffer": {"num_buffers": 3, "weight_normalization": "buffer", "draw": "stratified"},
    "threads": {"threads": True},
    "shared": {"shared": True},
    "moved": {},
    "torch_save": {},
    "course": {},
}


def transitions(start: int, *shape: int) -> TensorDict:
    """Transitions of several dtypes, with `shape[-1]` numbers from `start` on."""
    k = torch.arange(start, start + shape[-1]).expand(shape)
    return TensorDict(
        {
            "k": k,
            "observation": (k.unsqueeze(-1) * torch.tensor([1.0, 0.5, -2.0])).float(),
            "next": {"reward": k.double() / 3, "done": k % 5 == 0},
        },
        shape,
    )


def made(name: str) -> PrioritizedReplayBuffer:
    """The buffer that is saved: it has wrapped, and has priorities, settings and a past."""
    settings = {"method": "tree"} | CASES[name]
    lead = (settings["num_buffers"],) if "num_buffers" in settings else ()
    buffer = PrioritizedReplayBuffer(
        10,
        6,
        alpha=0.37,
        beta=0.5,
        eps=0.01,
        beta_increment=0.125,
        example=transitions(0, 1)[0],
        generator=torch.Generator().manual_seed(7),
        **settings,
    )
    seeded = torch.Generator().manual_seed(3)
    buffer.extend(transitions(0, *lead, 4), torch.rand(*lead, 4, generator=seeded))
    late = buffer.sample(3)
    for n in (5, 4):
        mask = {"mask": torch.rand(*lead, n, generator=seeded) < 0.6} if lead else {}
        buffer.extend(transitions(buffer.write_count, *lead, n), **mask)
    buffer.update_priority(
        late["index"], torch.randn(late.shape, generator=seeded), late["generation"]
    )
    for _ in range(3):
        batch = buffer.sample()
        error = torch.randn(batch.shape, generator=seeded)
        buffer.update_priority(batch["index"], error, batch["generation"])
    buffer.increase_beta()
    if name == "moved":
        smaller = PrioritizedReplayBuffer(7, 6, method="tree", generator=torch.Generator())
        smaller.load_state_dict(buffer.state_dict())
        return smaller
    return buffer


def made_course() -> TransitionReplayBuffer:
    buffer = TransitionReplayBuffer(10, method="tree", generator=torch.Generator().manual_seed(7))
    for k in range(13):
        buffer.push([float(k), -k], k % 3, k / 2, [k + 1.0, 0.5], k % 5 == 0)
    *_, index, _ = buffer.sample(6)
    buffer.update_priorities(index, torch.linspace(-1, 2, 6))
    return buffer


def play_course(buffer: TransitionReplayBuffer) -> list[Any]:
    played: list[Any] = [buffer.beta, buffer.buffer.eps, buffer.priority.tolist()]
    for k in range(3):
        batch = buffer.sample(6)
        played.append([part.tolist() for part in batch])
        buffer.update_priorities(batch[-2], torch.linspace(0, k + 1.0, 6))
        buffer.push([0.5, k], 1, -1.0, [0.0, 0.0], True)
    return played


def play(buffer: PrioritizedReplayBuffer) -> list[Any]:
    """What a buffer holds, and what it does next: plain values, of floats their exact value."""
    lead = () if buffer.num_buffers is None else (buffer.num_buffers,)
    played: list[Any] = [buffer.alpha, buffer.beta, buffer.eps, buffer.beta_increment]
    played += [buffer.lengths.tolist(), buffer.stats()["written"], buffer.stats()["stale_updates"]]
    for step in range(3):
        batch = buffer.sample()
        played.append(
            {str(key): batch[key].tolist() for key in sorted(batch.keys(True, True), key=str)}
        )
        error = batch["k"].float().sin() * (step + 1)
        buffer.update_priority(batch["index"], error, batch["generation"])
        index = buffer.extend(transitions(100 * step, *lead, 2))
        played += [index.tolist(), buffer.priority.tolist()]
        buffer.update_priority(batch["index"], error, batch["generation"])
        buffer.increase_beta()
    counters = buffer.stats()
    return [*played, counters["stale_updates"], counters["written"]]


def main() -> None:
    FILES.mkdir(exist_ok=True)
    played = {}
    for name in CASES:
        buffer = made_course() if name == "course" else made(name)
        path = FILES / f"{name}.per_td"
        if name == "torch_save":
            torch.save(buffer.state_dict(), path)
        else:
            buffer.save(path)
        played[name] = play_course(buffer) if name == "course" else play(buffer)
    PLAYED.write_text(json.dumps(played, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
