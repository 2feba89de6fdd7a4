import os
import threading
from pathlib import Path

import numpy as np
import pytest

from per_td.errors import CheckpointError
from per_td.ray import log
from per_td.ray.log import Record, WriteAheadLog


@pytest.fixture
def opened():
    """Opens logs, and closes them after the test."""
    made = []

    def make(folder, **options):
        made.append(WriteAheadLog(folder, **options))
        return made[-1]

    yield make
    for wal in made:
        wal.close()


def record(number, n=3):
    arrays = [(("next", "x"), "float32", np.full((n, 2), number, np.float32))]
    return Record("extend", {"number": number}, arrays)


def numbers(wal):
    return [r.values["number"] for r in wal.replay()]


def written(folder, *records):
    wal = WriteAheadLog(folder)
    assert numbers(wal) == []
    for each in records:
        wal.append(each)
    wal.close()
    return folder / "000000.log"


def test_what_is_appended_is_replayed_in_order_and_to_the_bit(opened, tmp_path):
    written(tmp_path, record(1), record(2, n=0), record(3, n=1000))
    found = list(opened(tmp_path).replay())
    assert [r.values for r in found] == [{"number": 1}, {"number": 2}, {"number": 3}]
    for back, n in zip(found, (3, 0, 1000), strict=True):
        ((key, dtype, values),) = back.arrays
        assert (key, dtype, values.shape) == (("next", "x"), "float32", (n, 2))
        assert (values == back.values["number"]).all()


@pytest.mark.parametrize("fsync", [False, True])
def test_a_log_goes_on_where_the_last_one_ended(opened, fsync, tmp_path):
    for number in range(3):
        wal = opened(tmp_path, fsync=fsync)
        assert numbers(wal) == list(range(number))
        wal.append(record(number))
        wal.close()


def test_a_record_torn_anywhere_is_dropped_and_those_before_it_remain(opened, tmp_path):
    path = written(tmp_path, record(1))
    first = path.stat().st_size
    wal = opened(tmp_path)
    assert numbers(wal) == [1]
    wal.append(record(2))
    wal.close()
    whole = path.read_bytes()
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        torn = opened(tmp_path)
        assert numbers(torn) == [1]
        assert path.stat().st_size == first
        torn.append(record(9))  # goes where the torn one was
        torn.close()
        again = opened(tmp_path)
        assert numbers(again) == [1, 9]
        again.close()


def test_zeros_that_a_file_system_left_at_the_end_are_a_torn_record(opened, tmp_path):
    path = written(tmp_path, record(1))
    with path.open("ab") as file:
        file.write(bytes(500))
    assert numbers(opened(tmp_path)) == [1]


def test_a_wrong_byte_in_the_last_record_is_a_torn_record(opened, tmp_path):
    path = written(tmp_path, record(1), record(2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert numbers(opened(tmp_path)) == [1]


def test_damage_before_the_end_raises_since_what_follows_was_acknowledged(opened, tmp_path):
    last = written(tmp_path, record(1), record(2)).stat().st_size
    path = written(tmp_path / "all", record(1), record(2), record(3))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        wal = opened(tmp_path / "all")
        try:
            found = numbers(wal)
        except CheckpointError as error:
            assert "expected a whole record at byte" in str(error)  # noqa: PT017
        else:
            assert at >= last
            assert found == [1, 2]
        wal.close()


def test_zeros_before_the_end_are_damage_too(opened, tmp_path):
    path = written(tmp_path, record(1), record(2), record(3))
    whole, size = path.read_bytes(), path.stat().st_size // 3
    path.write_bytes(whole[:size] + bytes(size) + whole[2 * size :])
    with pytest.raises(CheckpointError, match=f"at byte {size}"):
        numbers(opened(tmp_path))


def test_a_checkpoint_empties_the_log(opened, tmp_path):
    wal = opened(tmp_path)
    assert numbers(wal) == []
    wal.append(record(1))
    wal.rotate(lambda path: path.write_text("state"))
    assert (tmp_path / "000001.log").read_bytes() == b""
    wal.append(record(2))
    wal.close()
    again = opened(tmp_path)
    assert again.checkpoint.read_text() == "state"
    assert numbers(again) == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001.log", "000001.pt", "lock"]


def test_a_crash_anywhere_in_a_checkpoint_loses_and_doubles_nothing(opened, tmp_path):
    class CrashError(Exception):
        pass

    def crash(path):
        raise CrashError

    wal = opened(tmp_path)
    assert numbers(wal) == []
    wal.append(record(1))
    with pytest.raises(CrashError):
        wal.rotate(crash)  # after the new log, before the checkpoint
    wal.append(record(2))
    wal.close()
    again = opened(tmp_path)
    assert numbers(again) == [1, 2]
    again.append(record(3))
    again.close()
    last = opened(tmp_path)
    assert numbers(last) == [1, 2, 3]
    last.close()

    (tmp_path / "000002.log").touch()  # after the checkpoint, before the old files went
    (tmp_path / "000002.pt").write_text("state with 1, 2 and 3")
    last = opened(tmp_path)
    assert last.checkpoint.name == "000002.pt"
    assert numbers(last) == []


def test_a_failed_append_leaves_the_log_whole(opened, tmp_path, monkeypatch):
    wal = opened(tmp_path)
    assert numbers(wal) == []
    wal.append(record(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    wal.fsync = True
    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            wal.append(record(2))
    wal.fsync = False
    wal.append(record(3))
    wal.close()
    assert numbers(opened(tmp_path)) == [1, 3]


def test_a_file_that_takes_a_few_bytes_at_a_time_gets_them_all(opened, tmp_path):
    wal = opened(tmp_path)
    assert numbers(wal) == []

    class Slow:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    wal._file = Slow(wal._file)
    wal.append(record(1))
    wal.append(record(2))
    wal.close()
    assert numbers(opened(tmp_path)) == [1, 2]


def test_with_fsync_the_disk_has_a_log_by_name_before_it_acknowledges(
    opened, tmp_path, monkeypatch
):
    wal = opened(tmp_path, fsync=True)
    fsync, synced = os.fsync, []

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert numbers(wal) == []
    wal.append(record(1))
    wal.rotate(lambda path: path.write_text("state"))
    wal.append(record(2))
    assert synced == [tmp_path.name, "000000.log", tmp_path.name, "000001.log"]


def test_a_folder_belongs_to_one_log(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_LOCK_WAIT_S", 0.1)
    first = opened(tmp_path)
    with pytest.raises(CheckpointError, match="in use"):
        opened(tmp_path)
    first.close()
    second = opened(tmp_path)
    monkeypatch.undo()
    threading.Timer(0.2, second.close).start()  # its process takes a moment to be gone
    opened(tmp_path).close()


def test_appending_before_replaying_is_refused(opened, tmp_path):
    with pytest.raises(CheckpointError, match="replay"):
        opened(tmp_path).append(record(1))
