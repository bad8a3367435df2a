"""Who shares a disk, and errors of one rank that all raise, with ranks that are threads of this process."""

import threading
from pathlib import Path

import pytest

from camopd import machines
from camopd.errors import CaMOPDError, OtherRankError


def on_ranks(count, work, monkeypatch):
    """What `work(rank)` gives or raises on each of some ranks, which gather among themselves."""
    barrier, rank_of, rows = threading.Barrier(count, timeout=20), threading.local(), [None] * count

    def gather(mine):
        rows[rank_of.value] = mine[0]
        barrier.wait()
        found = list(rows)
        barrier.wait()
        return found

    monkeypatch.setattr(machines, "gather_object", gather)
    results = [None] * count

    def run(rank):
        rank_of.value = rank
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("error", "others"),
    [(OSError(28, "No space left"), OtherRankError), (CaMOPDError("lost"), CaMOPDError)],
)
def test_raise_of_any_raises_on_all_what_one_rank_has_met(error, others, monkeypatch):
    def work(rank):
        def fail():
            if rank == 1:
                raise error
            return rank

        return machines.raise_of_any(fail)

    found = on_ranks(3, work, monkeypatch)
    assert found[1] is error
    assert all(type(found[rank]) is others and str(found[rank]) == str(error) for rank in (0, 2))


def test_raise_of_any_gives_each_rank_its_own_result(monkeypatch):
    assert on_ranks(3, lambda rank: machines.raise_of_any(lambda: rank * 10), monkeypatch) == [0, 10, 20]


@pytest.mark.parametrize("shared", [True, False])
def test_machines_commit_once_on_each_disk(shared, monkeypatch, tmp_path):
    """Four ranks on two machines, which have one disk or two."""
    names = threading.local()
    monkeypatch.setattr(machines.socket, "gethostname", lambda: names.value)

    def work(rank):
        names.value = f"host{rank // 2}"
        disk = tmp_path / ("disk" if shared else names.value)
        disk.mkdir(exist_ok=True)
        machine = machines.Machine()
        machine.prepare(disk / "_saving" / "checkpoint-1")
        assert (disk / "_saving" / "checkpoint-1").is_dir()
        return machine.part, machine.parts, machine.commits

    found = on_ranks(4, work, monkeypatch)
    assert [row[:2] for row in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [row[2] for row in found] == ([True, False, False, False] if shared else [True, False, True, False])
    assert list(Path(tmp_path).rglob("seen-*")) == []


def test_machines_work_in_turn_on_a_shared_disk(monkeypatch):
    """The first process is done before a rank of another machine begins."""
    order, names = [], threading.local()
    monkeypatch.setattr(machines.socket, "gethostname", lambda: names.value)

    def work(rank):
        names.value = f"host{rank // 2}"
        machines.Machine().in_turn(lambda: order.append(rank))

    on_ranks(4, work, monkeypatch)
    assert order == [0, 2]
