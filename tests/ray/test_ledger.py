import math

from per_td.ray.exchange import Ledger
from per_td.ray.shard import Report


def report(total, *, size=3, epoch=1, serial=1, stale=0):
    return Report(total, total / 10, size, size, stale, 0, epoch, serial)


def test_a_report_that_a_later_one_has_overtaken_is_not_taken_up():
    ledger = Ledger(2)
    assert ledger.note(1, report(5.0, serial=2))  # the first of a start
    assert not ledger.note(1, report(4.0, serial=1))
    assert ledger.total.tolist() == [0.0, 5.0]
    assert not ledger.note(1, report(6.0, serial=3))
    assert ledger.total.tolist() == [0.0, 6.0]
    assert ledger.note(1, report(1.0, epoch=2, serial=1))  # it started anew
    assert ledger.total.tolist() == [0.0, 1.0]


def test_a_lost_shard_counts_nothing_until_it_reports_again():
    ledger = Ledger(2)
    ledger.note(0, report(5.0, size=7))
    ledger.note(1, report(2.0, size=4, serial=5))
    assert (ledger.size, ledger.losses, ledger.living) == (11, 0, [True, True])
    ledger.lose(1)
    ledger.lose(1)
    assert (ledger.size, ledger.losses, ledger.living) == (7, 1, [True, False])
    assert ledger.total.tolist() == [5.0, 0.0]
    assert ledger.smallest.tolist() == [0.5, math.inf]
    assert not ledger.note(1, report(2.0, size=4, serial=4))  # it was only late
    assert (ledger.size, ledger.living) == (11, [True, True])


def test_counters_are_summed_over_what_was_last_heard():
    ledger = Ledger(3)
    ledger.note(0, report(1.0, stale=2))
    ledger.note(1, report(1.0, stale=5))
    ledger.lose(1)
    assert ledger.sum("stale") == 7
