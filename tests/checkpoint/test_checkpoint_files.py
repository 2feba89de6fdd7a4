"""Files of states: whole or not at all, and every damage named."""

import json
import os
import random
import signal
import stat
import struct
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

from per_td import (
    CheckpointError,
    DiskAllocationError,
    LinearSchedule,
    PrioritizedReplayBuffer,
    SchemaError,
    TransitionReplayBuffer,
)
from per_td.checkpoint import atomic
from per_td.checkpoint import file as checkpoint
from tests.support.checkpoints import draws, run, same, used
from tests.support.oracle import data
from tests.support.parameters import slow_but

DTYPES = sorted(checkpoint._DTYPES.values(), key=str)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


def test_every_dtype_layout_and_shape_comes_back(tmp_path):
    base = torch.arange(4 * 24, dtype=torch.uint8).view(4, 24)
    state = {
        "records": {"a": base[:, :8].view(torch.int64), "b": base[:, 8:9], "c": base[:3, 9:17]},
        "sparse": torch.arange(100.0).view(10, 10)[::3, 7],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "expanded": torch.tensor([1.5]).expand(3, 4),
        "conjugate": torch.tensor([1 + 2j, 3j]).conj(),
        "negative": torch.tensor([1 + 2j, 3j]).conj().imag,
        "negative rows": torch._neg_view(torch.arange(40.0).view(4, 10)[:, :9]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "plain": {"none": None, "true": True, "int": 2**70, "float": 0.1, "inf": -torch.inf},
        'quoted "é"': "\u2028",
        "nothing": {},
    }
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.complex128, torch.float8_e5m2):
        state[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    checkpoint.write(tmp_path / "x", state)
    found = checkpoint.read(tmp_path / "x")

    def compare(a, b):
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, torch.Tensor):
            assert a.dtype is b.dtype
            assert a.shape == b.shape
            a, b = (t.resolve_conj().resolve_neg().contiguous() for t in (a, b))
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        else:
            assert a == b

    compare(state, found)


def test_views_that_nearly_fill_a_memory_are_written_as_that_memory():
    base = torch.arange(4 * 24, dtype=torch.uint8).view(4, 24)
    fields = {"a": base[:, :8].view(torch.int64), "b": base[:, 8:9], "c": base[:, 9:24]}
    assert [block.bytes for block in checkpoint._Writer(fields).blocks] == [4 * 24]
    complex_views = {"conjugate": torch.ones(4, dtype=torch.complex64)[::2].conj()}
    assert [block.bytes for block in checkpoint._Writer(complex_views).blocks] == [2 * 8]
    few = {"a": base[:, :1], "b": base[:, 23:24]}
    assert [block.bytes for block in checkpoint._Writer(few).blocks] == [4, 4]


def test_every_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "x"
    base = torch.rand(6, 4)
    checkpoint.write(path, {"a": base[:, :3], "b": torch.arange(5), "c": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        expected = "checksum of its (prefix|header|block)" if at >= 8 else "foreign file"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.read(path)
    path.write_bytes(whole)
    assert checkpoint.read(path)["c"] == 1


def test_every_shorter_file_is_truncated(tmp_path):
    path = tmp_path / "x"
    checkpoint.write(path, {"a": torch.rand(3), "b": torch.arange(5)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=f"x: expected a saved buffer, got a truncated.*{length}"
        ):
            checkpoint.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=f"{len(whole) + 1} bytes instead of {len(whole)}"):
        checkpoint.read(path)


def test_files_of_others_are_called_foreign_and_those_of_later_versions_later(tmp_path):
    path = tmp_path / "x"
    used().save(path)
    whole = path.read_bytes()
    for content in (b"nonsense", b"per_tx", b"\x89PNG\r\n\x1a\n" + bytes(500)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a foreign file, which begins with b"):
            PrioritizedReplayBuffer.load(path)
    prefix = whole[:8] + struct.pack("<I", 9) + whole[12:24]
    path.write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix)) + whole[28:])
    with pytest.raises(CheckpointError, match=r"version 9, made by a later .* versions up to 3"):
        PrioritizedReplayBuffer.load(path)
    checkpoint.write(path, {"weights": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="expected the state of a PrioritizedReplayBuffer"):
        PrioritizedReplayBuffer.load(path)


def test_the_file_of_a_network_is_called_that(tmp_path):
    path, network = tmp_path / "network.pt", torch.nn.Linear(2, 3)
    torch.save(network.state_dict(), path)
    got = (
        "expected the state of a PrioritizedReplayBuffer, got a dict with the keys 'weight', 'bias'"
    )
    for buffer in (PrioritizedReplayBuffer, TransitionReplayBuffer):
        with pytest.raises(CheckpointError, match=rf"network\.pt: {got}, such as of a network"):
            buffer.load(path)
    with pytest.raises(CheckpointError, match=f"^{got}"):
        used().load_state_dict(network.state_dict())
    torch.save({"format": "per_td.torchrl.PrioritizedSampler"}, path)
    with pytest.raises(CheckpointError, match=r"network\.pt: .* that of 'per_td\.torchrl"):
        PrioritizedReplayBuffer.load(path)
    torch.save({str(k): k for k in range(9)}, path)
    with pytest.raises(CheckpointError, match="'0', '1', '2' and 6 more"):
        PrioritizedReplayBuffer.load(path)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match=r"network\.pt: .* got list, no dict"):
        PrioritizedReplayBuffer.load(path)


def test_a_path_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path, error, named in (
        (tmp_path / "none" / "b.pt", FileNotFoundError, "none'"),
        (tmp_path / "file" / "b.pt", NotADirectoryError, "file'"),
        (tmp_path, IsADirectoryError, f"{tmp_path.name}'"),
    ):
        with pytest.raises(error, match="expected") as caught:
            used().save(path)
        assert str(caught.value).endswith(named)
        assert "partial" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "No")))
    with pytest.raises(PermissionError, match=r"folder that 'b\.pt' can be written to, got: No"):
        used().save(tmp_path / "b.pt")


def first_version(buffer: PrioritizedReplayBuffer) -> dict:
    """The state as the first version wrote it."""
    state = buffer.state_dict() | {"version": 1}
    for key in ("mass", "epoch", "written_before", "ranks", "replayed"):
        del state[key]
    for key in ("prioritization", "sort_interval", "num_buffers"):
        del state["settings"][key]
    return state


def test_files_of_the_first_version_load(tmp_path):
    path = tmp_path / "old.pt"
    buffer = used(generator=torch.Generator().manual_seed(3))
    torch.save(first_version(buffer), path)
    loaded = PrioritizedReplayBuffer.load(path)
    same(buffer, loaded)
    assert draws(buffer) == draws(loaded)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated, damaged or foreign archive"):
            PrioritizedReplayBuffer.load(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="expected the state of a PrioritizedReplayBuffer"):
        PrioritizedReplayBuffer.load(path)


def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="truncated, damaged or foreign"):
        PrioritizedReplayBuffer.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_transition_buffer_is_saved_with_all_it_knows(tmp_path):
    path = tmp_path / "t"
    generator = torch.Generator().manual_seed(5)
    buffer = TransitionReplayBuffer(10, beta_increment=0.25, generator=generator)
    buffer.save(path)
    assert len(TransitionReplayBuffer.load(path)) == 0
    for k in range(13):
        buffer.push([0.0, k], k, 1.0, [k, 1.0], k == 3)
    buffer.update_priorities(range(10), torch.rand(10))
    buffer.save(path)
    loaded = TransitionReplayBuffer.load(path)
    for one in (buffer, loaded):
        one.increase_beta()
    assert (loaded.beta, loaded.stats()) == (0.65, buffer.stats())
    for a, b in zip(buffer.sample(6), loaded.sample(6), strict=True):
        assert torch.equal(a, b)
    assert len(TransitionReplayBuffer.load(path, capacity=4)) == 4
    used().save(path)
    with pytest.raises(CheckpointError, match="expected the state of a TransitionReplayBuffer"):
        TransitionReplayBuffer.load(path)


def test_a_failed_save_leaves_the_last_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "buffer.ckpt"
    buffer = used()
    buffer.save(path)
    before = path.read_bytes()
    for broken in (OSError("disk full"), KeyboardInterrupt()):

        def fail(file, broken=broken):
            raise broken

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(type(broken)):
                buffer.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_a_save_reaches_the_disk_before_and_after_it_is_renamed(tmp_path, monkeypatch):
    events, contents, fsync, replace = [], [], os.fsync, Path.replace

    def synced(file):
        path = Path(f"/proc/self/fd/{file}").readlink()
        events.append("folder" if path == tmp_path else "file")
        contents.append(None if path == tmp_path else path.read_bytes())
        fsync(file)

    def renamed(self, target):
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    opened = os.listdir("/proc/self/fd")
    used().save(tmp_path / "x")
    assert events == ["file", "rename", "folder"]
    assert contents[0] == (tmp_path / "x").read_bytes()  # nothing was still in the process
    assert os.listdir("/proc/self/fd") == opened


SAVES = """
    import sys, torch
    from tensordict import TensorDict
    from per_td import PrioritizedReplayBuffer
    torch.set_num_threads(1)
    buffer = PrioritizedReplayBuffer(20_000)
    k = 0
    while True:
        k += 1
        value = torch.full((20_000, 30), float(k))
        buffer.extend(TensorDict({"x": value}, [20_000]), priority=torch.full((20_000,), float(k)))
        buffer.save(sys.argv[1])
        print(k, flush=True)
"""


@needs_posix
@pytest.mark.parametrize("kills", slow_but([1], [1, 12]))
def test_a_process_killed_while_it_saves_leaves_a_whole_state(kills, tmp_path):
    path, moments = tmp_path / "x", random.Random(0)
    for _ in range(kills):
        process = run(SAVES, path)
        try:
            process.stdout.readline()
            time.sleep(moments.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            said, _ = process.communicate()
        last = int((said.split() or ["1"])[-1])
        loaded = PrioritizedReplayBuffer.load(path)
        (k,) = loaded.priority.unique().tolist()
        assert k in (last, last + 1)
        assert (loaded.transitions["x"] == k).all()
        assert loaded.write_count == 20_000 * k
        assert len(list(tmp_path.iterdir())) <= 2
    loaded.save(path)
    assert list(tmp_path.iterdir()) == [path]


@needs_posix
def test_what_another_process_is_writing_is_not_taken_for_a_leftover(tmp_path):
    path = tmp_path / "x"
    (tmp_path / ".x.0123456789ab.partial").write_bytes(b"left by a killed process")
    (tmp_path / ".y.0123456789ab.partial").write_bytes(b"of another file")
    with checkpoint.replacing(path) as file:
        file.write(b"slow")
        used().save(path)
        assert len(list(tmp_path.glob(".x.*.partial"))) == 1
        PrioritizedReplayBuffer.load(path)
    assert path.read_bytes() == b"slow"
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".y.0123456789ab.partial", path]


@needs_posix
@pytest.mark.parametrize("removed", [False, True])
def test_another_process_may_look_for_leftovers_before_a_new_file_is_locked(
    removed, tmp_path, monkeypatch
):
    lock, threads = atomic._lock, []

    def late(file, *, wait):
        if not threads:  # the other process has the lock now, and lets go some time later
            other = Path(file.name).open("rb")  # noqa: SIM115
            lock(other, wait=False)
            if removed:
                os.unlink(file.name)
            threads.append(threading.Timer(0.2, other.close))
            threads[0].start()
        lock(file, wait=wait)

    monkeypatch.setattr(atomic, "_lock", late)
    with atomic.replacing(tmp_path / "x") as file:
        file.write(b"whole")
    threads[0].join()
    assert (tmp_path / "x").read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.slow
@needs_posix
def test_a_full_disk_reaches_the_user_and_the_old_file_stays(tmp_path):
    code = """
        import errno, resource, sys, torch
        from tensordict import TensorDict
        from per_td import PrioritizedReplayBuffer
        buffer = PrioritizedReplayBuffer(10_000)
        buffer.extend(TensorDict({"x": torch.ones(100, 30)}, [100]))
        buffer.save(sys.argv[1])
        buffer.extend(TensorDict({"x": torch.ones(10_000, 30)}, [10_000]))
        for limit in (0, 1000, 300_000, 1_200_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                buffer.save(sys.argv[1])
            except OSError as error:
                print(errno.errorcode[error.errno])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(len(PrioritizedReplayBuffer.load(sys.argv[1])))
    """
    said, _ = run(code, tmp_path / "x").communicate(timeout=120)
    assert said.split() == ["EFBIG"] * 4 + ["100"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_save_does_not_copy_the_transitions(tmp_path, monkeypatch):
    buffer = PrioritizedReplayBuffer(1000, layout="columns")
    buffer.extend(data(0, 1000))
    column, written = buffer.transitions["observation"], []
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", lambda path, state: written.append(state))
        buffer.save(tmp_path / "x")
    (state,) = written
    assert state["transitions"]["observation"].data_ptr() == column.data_ptr()
    copied = buffer.state_dict()["transitions"]["observation"]
    assert copied.data_ptr() != column.data_ptr()
    largest = []
    raw = checkpoint._raw

    def watched(tensor):
        largest.append(tensor.numel() * tensor.itemsize)
        return raw(tensor)

    monkeypatch.setattr(checkpoint, "_raw", watched)
    checkpoint.write(tmp_path / "x", {"x": torch.zeros(3_000_000)})
    assert max(largest) == checkpoint._CHUNK


def test_a_save_keeps_the_permissions_of_the_file_that_it_replaces(tmp_path):
    buffer, path = PrioritizedReplayBuffer(4), tmp_path / "buffer.pt"
    buffer.extend(data(0, 3))
    buffer.save(path)
    for mode in (0o600, 0o640):
        path.chmod(mode)
        buffer.save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("there", [True, False])
def test_a_save_through_a_link_replaces_what_it_leads_to(there, tmp_path):
    buffer, link = PrioritizedReplayBuffer(4), tmp_path / "latest.pt"
    (tmp_path / "runs").mkdir()
    target = tmp_path / "runs" / "buffer.pt"
    link.symlink_to(target)
    if there:
        buffer.save(target)
    buffer.extend(data(0, 3))
    buffer.save(link)
    assert link.is_symlink()
    assert not target.is_symlink()
    assert len(PrioritizedReplayBuffer.load(target)) == 3
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_a_save_to_what_is_no_file_is_refused(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="expected the name of a file") as refused:
        PrioritizedReplayBuffer(4).save(fifo)
    assert refused.value.filename == str(fifo)
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.fixture(params=["in memory", "in a file"])
def copied(request, monkeypatch):
    """Small files are copied into memory, large ones to a file without a name."""
    if request.param == "in a file":
        monkeypatch.setattr(checkpoint, "_IN_MEMORY", 0)


def test_a_file_that_is_overwritten_while_it_is_loaded_is_refused_or_as_it_was(tmp_path, copied):
    old, new = (PrioritizedReplayBuffer(500) for _ in range(2))
    old.extend(data(0, 500))
    new.extend(data(1000, 500))
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    state = checkpoint.read(tmp_path / "old")
    with open(tmp_path / "old", "r+b") as file:  # in place, as `cp` does
        file.truncate(10)
        file.write((tmp_path / "new").read_bytes())
        file.truncate(20)
    loaded = PrioritizedReplayBuffer(500)
    loaded.load_state_dict(state)
    assert (loaded.transitions == old.transitions).all()
    with pytest.raises(CheckpointError, match="truncated"):
        loaded.restore(tmp_path / "old")


def test_a_large_file_in_a_folder_for_reading_only_is_copied_elsewhere(tmp_path, monkeypatch):
    buffer, asked = PrioritizedReplayBuffer(5), []
    buffer.extend(data(0, 5))
    buffer.save(tmp_path / "buffer.pt")
    real = checkpoint.mapped_zeros

    def only_elsewhere(shape, dtype, folder=None):
        asked.append(folder)
        if folder is not None:
            raise DiskAllocationError("a folder for reading only")
        return real(shape, dtype)

    monkeypatch.setattr(checkpoint, "_IN_MEMORY", 0)
    monkeypatch.setattr(checkpoint, "mapped_zeros", only_elsewhere)
    assert len(PrioritizedReplayBuffer.load(tmp_path / "buffer.pt")) == 5
    assert asked == [tmp_path, None]


def forged(header: dict, blocks: bytes) -> bytes:
    """A file whose checksums fit whatever the header says."""
    text = json.dumps(header).encode()
    prefix = checkpoint._PREFIX.pack(
        checkpoint._MAGIC, checkpoint.VERSION, len(text), zlib.crc32(text), 0
    )[:-4]
    return prefix + struct.pack("<I", zlib.crc32(prefix)) + text + blocks


def altered(value, dice):
    """The same with one part exchanged for something else."""
    odd = [None, -1, 2**70, 1.5, "x", [], {}, True, [1, [2]], {"tensor": 3}, {"dict": []}]
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        if dice.random() < 0.1:
            return {other: item for other, item in value.items() if other != key}
        return value | {key: altered(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        return [*value[:at], altered(value[at], dice), *value[at + 1 :]]
    return dice.choice(odd)


def test_headers_that_make_no_sense_are_refused_by_name(tmp_path):
    buffer, path, dice = PrioritizedReplayBuffer(20), tmp_path / "x", random.Random(0)
    buffer.extend(data(0, 30))
    buffer.save(path)
    whole = path.read_bytes()
    _, _, length, _, _ = checkpoint._PREFIX.unpack(whole[: checkpoint._PREFIX.size])
    start = checkpoint._PREFIX.size
    header, blocks = json.loads(whole[start : start + length]), whole[start + length :]
    refused = 0
    for _ in range(1500):
        path.write_bytes(forged(altered(header, dice), blocks))
        try:
            PrioritizedReplayBuffer.load(path)
        except CheckpointError:
            refused += 1
        except SchemaError:  # a header may tell another shape that makes sense
            pass
    assert refused > 1000


@pytest.mark.parametrize(
    "settings",
    [
        {"priority_clip": (0.5, None)},
        {"priority_clip": (0.25, 4.0)},
        {"uniform_mix": 0.25},
        {"latest": 2},
        {"track_draws": True},
        {"beta_schedule": LinearSchedule(0.5, 1.0, 9)},
    ],
)
def test_settings_come_back_from_a_file(settings, tmp_path):
    buffer, path = PrioritizedReplayBuffer(20, **settings), tmp_path / "x"
    buffer.extend(data(0, 30))
    buffer.update_priority(buffer.sample(8)["index"], torch.full((8,), 9.0))
    buffer.save(path)
    loaded = PrioritizedReplayBuffer.load(path)
    for each in (buffer, loaded):
        each.update_priority(torch.arange(3), torch.tensor([0.0, 1.0, 9.0]))
    for name, value in settings.items():
        assert getattr(loaded, name) == value
    assert torch.equal(loaded.priority, buffer.priority)
    assert loaded.beta == buffer.beta


def same_state(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[k], other[k]) for k in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_archives_of_the_first_version_are_read_by_their_checksums(tmp_path):
    buffer, path, dice = PrioritizedReplayBuffer(20), tmp_path / "x", random.Random(1)
    buffer.extend(data(0, 30))
    torch.save(buffer.state_dict() | {"version": 1}, path)
    whole, refused = path.read_bytes(), 0
    expected = PrioritizedReplayBuffer.load(path).state_dict()
    for at in [dice.randrange(len(whole)) for _ in range(400)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << dice.randrange(8)]) + whole[at + 1 :])
        try:
            found = PrioritizedReplayBuffer.load(path).state_dict()
        except CheckpointError:
            refused += 1
        else:
            assert same_state(expected, found)
    assert refused > 100
