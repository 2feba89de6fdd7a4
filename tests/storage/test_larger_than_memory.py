"""Transitions in files, or in the host's memory for batches on a CUDA device."""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

from per_td import ConfigurationError, PrioritizedReplayBuffer, kernels, memory
from tests.support.checkpoints import draws, run, same
from tests.support.oracle import data, numbered
from tests.support.parameters import slow_but


@pytest.fixture(params=kernels.CHOICES)
def choice(request, monkeypatch) -> str:
    """With kernels and without."""
    monkeypatch.setenv(kernels.VARIABLE, request.param)
    return request.param


MORE_THAN_MEMORY = """
    import resource, sys, torch
    from tensordict import TensorDict
    from per_td import PrioritizedReplayBuffer
    folder, megabytes, allowed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)

    def rows(first, n):
        x = torch.arange(first, first + n).view(-1, 1).expand(n, 512).clone()
        return TensorDict({"x": x, "k": x[:, 0].clone()}, [n])

    def use(buffer, first, n):
        for k in range(first, first + n, 512):
            buffer.extend(rows(k, 512))
            batch = buffer.sample(64)
            assert (batch["x"] == batch["k"].unsqueeze(-1)).all()
            buffer.update_priority(batch["index"], batch["k"] % 7, batch["generation"])
        return batch

    warm = PrioritizedReplayBuffer(1024)
    use(warm, 0, 2048)
    with open("/proc/self/status") as file:
        (used,) = (int(line.split()[1]) for line in file if line.startswith("VmData:"))
    limit = used * 1024 + allowed * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    n = megabytes * 256
    try:
        PrioritizedReplayBuffer(n, example=rows(0, 1)[0])
    except MemoryError:
        print("does not fit in memory")
    buffer = PrioritizedReplayBuffer(n, storage="memmap", folder=folder)
    batch = use(buffer, 0, n + 1024)
    print(len(buffer), buffer.write_count, int(batch["k"].max()) > n // 2)
    buffer.save(folder + "/saved")
    del buffer
    loaded = PrioritizedReplayBuffer.load(folder + "/saved", storage="memmap", folder=folder)
    use(loaded, n + 1024, 1024)
    print(len(loaded), loaded.write_count)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
@pytest.mark.parametrize(
    ("megabytes", "allowed"), slow_but([(150, 100)], [(150, 100), (240, 100), (2100, 300)])
)
def test_more_transitions_than_memory_are_written_drawn_saved_and_loaded(
    megabytes, allowed, tmp_path
):
    process = run(MORE_THAN_MEMORY, tmp_path, megabytes, allowed)
    said, _ = process.communicate(timeout=600)
    n = megabytes * 256
    expected = ["does not fit in memory", f"{n} {n + 1024} True", f"{n} {n + 2048}"]
    assert said.splitlines() == expected
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("layout", ["records", "columns"])
def test_buffers_in_files_and_in_memory_do_the_same(layout, choice, tmp_path):
    buffers = [
        PrioritizedReplayBuffer(
            50, 8, generator=torch.Generator().manual_seed(1), layout=layout, **k
        )
        for k in ({}, {"storage": "memmap"}, {"storage": "memmap", "folder": tmp_path})
    ]
    for k in range(0, 120, 7):
        for buffer in buffers:
            buffer.extend(data(k, 7))
        drawn = [draws(buffer) for buffer in buffers]
        assert drawn[0] == drawn[1] == drawn[2]
    same(buffers[0], buffers[1])
    buffers[1].save(tmp_path / "x")
    same(PrioritizedReplayBuffer.load(tmp_path / "x"), buffers[0])
    loaded = PrioritizedReplayBuffer.load(tmp_path / "x", storage="memmap", folder=tmp_path)
    same(loaded, buffers[0])


def test_many_buffers_live_in_files_too(choice):
    for storage in ("memory", "memmap"):
        torch.manual_seed(3)
        buffers = PrioritizedReplayBuffer(20, 8, num_buffers=3, storage=storage)
        buffers.extend(numbered(0, 33))
        batch = buffers.sample()
        if storage == "memory":
            expected = batch
    assert (batch == expected).all()
    assert buffers._storage.place.storage == "memmap"


def test_files_have_no_names_and_go_with_the_buffer(tmp_path):
    def open_files():
        if sys.platform != "linux":
            return 0
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "mapped_zeros", watched := _Watched(memory.mapped_zeros))
        buffer = PrioritizedReplayBuffer(10, storage="memmap", folder=tmp_path)
        buffer.extend(data(0, 3))
    assert watched.folders == {tmp_path}
    assert os.listdir(tmp_path) == []
    if sys.platform == "linux":
        assert open_files() > 0
    gone = weakref.ref(buffer)
    del buffer
    assert gone() is None
    assert open_files() == 0


class _Watched:
    def __init__(self, function):
        self.function, self.folders = function, set()

    def __call__(self, shape, dtype, folder):
        self.folders.add(folder)
        return self.function(shape, dtype, folder)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be asked for")
def test_a_full_disk_is_noticed_before_there_is_anything_to_lose(tmp_path, monkeypatch):
    buffer = PrioritizedReplayBuffer(2**20, storage="memmap", folder=tmp_path)

    def full(file, start, length):
        assert length >= 2**20 * 20
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        buffer.extend(data(0, 3))
    assert len(buffer) == 0


@pytest.mark.parametrize("layout", ["records", "columns"])
def test_batches_are_brought_to_the_device_from_another_home(layout, choice, monkeypatch):
    """The way of a CUDA device, with the CPU in its place."""
    expected = PrioritizedReplayBuffer(20, 8, generator=torch.Generator().manual_seed(1))
    buffer = PrioritizedReplayBuffer(
        20, 8, generator=torch.Generator().manual_seed(1), storage="memmap", layout=layout
    )
    buffer._storage._away = True
    many = PrioritizedReplayBuffer(20, 8, num_buffers=3, storage="memmap", layout=layout)
    many._storage._away = True
    for one in (expected, buffer):
        one.extend(data(0, 33))
    assert draws(buffer) == draws(expected)
    same(buffer, expected)
    many.extend(numbered(0, 33))
    batch = many.sample()
    rows = many.transitions.gather(1, batch["index"])
    assert (batch.select(*rows.keys()) == rows).all()


def test_a_storage_that_cannot_be_is_refused_by_name(tmp_path):
    for settings, expected in (
        ({"storage": "disk"}, "storage: expected one of memory, memmap, pinned, got 'disk'"),
        ({"storage": "pinned"}, "storage: expected 'memory' or 'memmap' on cpu, got 'pinned'"),
        ({"folder": tmp_path}, "folder: expected None with storage='memory'"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            PrioritizedReplayBuffer(5, device="cpu", **settings)


def test_a_folder_is_looked_at_when_the_buffer_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "none", tmp_path / "file", str(tmp_path / "none"), 0):
        with pytest.raises(ConfigurationError, match=f"folder: expected an existing.*{folder}"):
            PrioritizedReplayBuffer(5, storage="memmap", folder=folder)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigurationError, match="that can be written to"):
        PrioritizedReplayBuffer(5, storage="memmap", folder=tmp_path)
    PrioritizedReplayBuffer(5, storage="memmap")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("storage", ["pinned", "memmap"])
@pytest.mark.parametrize("layout", ["records", "columns"])
def test_transitions_on_the_host_are_drawn_on_cuda(storage, layout):
    drawn = []
    for kind in ("memory", storage):
        generator = torch.Generator("cuda").manual_seed(1)
        buffer = PrioritizedReplayBuffer(
            50, 8, device="cuda", generator=generator, storage=kind, layout=layout
        )
        for k in range(0, 120, 7):
            buffer.extend(data(k, 7, "cuda"))
            drawn.append(draws(buffer))
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]
    columns = buffer.filled_leaves().values()
    assert all(column.is_pinned() for column in columns) == (storage == "pinned")
    assert buffer.sample()["action"].device.type == "cuda"
