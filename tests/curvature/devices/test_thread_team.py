"""Tasks on the threads among which torch divides its operations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from threading import Barrier, get_ident

import pytest
import torch

from einconv_kfac.curvature.devices import thread_team
from einconv_kfac.curvature.devices.thread_team import LEFT_OUT, ThreadTeam, torch_team
from einconv_kfac.curvature.devices.threads import run_tasks


@pytest.fixture
def team() -> Iterator[ThreadTeam]:
    """Return torch's threads, of which there are two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if (found := torch_team()) is None:
        pytest.skip("torch's threads take no functions")
    found._left_out = 0
    yield found
    torch.set_num_threads(before)


def mkl_threads() -> list[str]:
    """Return the lines of torch's report on MKL's number of threads."""
    report = torch.__config__.parallel_info().splitlines()
    return [line for line in report if "mkl_get_max_threads" in line]


def test_all_threads_take_part_at_the_same_time(team: ThreadTeam) -> None:
    both, found = Barrier(2, timeout=60), set()

    def meet() -> None:
        both.wait()
        found.add(get_ident())

    team.run(meet)
    assert len(found) == 2
    assert get_ident() in found


def test_operations_are_not_divided(team: ThreadTeam) -> None:
    before, inside = mkl_threads(), []
    team.run(lambda: inside.append((torch.get_num_threads(), mkl_threads() == before)))
    assert inside == [(1, not before)] * 2
    assert torch.get_num_threads() == 2
    assert mkl_threads() == before
    inside.clear()
    team.run_undivided(lambda: inside.append((torch.get_num_threads(), mkl_threads() == before)))
    assert inside == [(1, not before)]
    assert torch.get_num_threads() == 2
    assert mkl_threads() == before


def test_errors_and_interrupts_are_raised_when_all_have_ended(team: ThreadTeam) -> None:
    here, ended = get_ident(), []

    def interrupted() -> None:
        if get_ident() == here:
            raise KeyboardInterrupt
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        team.run(interrupted)
    assert ended == [True]
    assert torch.get_num_threads() == 2


def test_a_single_task_stays_on_its_thread(team: ThreadTeam) -> None:
    found: list[int] = []
    run_tasks([lambda: found.append(get_ident())], 2)
    assert found == [get_ident()]


def test_a_team_with_a_late_thread_is_left_out(
    team: ThreadTeam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For some calls, whose tasks run on other threads."""
    calls = []
    kept = team.run
    monkeypatch.setattr(team, "run", lambda function: (calls.append(0), kept(function)))
    monkeypatch.setattr(thread_team, "LATE", 3600.0)
    run_tasks([lambda: None] * 2, 2)
    monkeypatch.setattr(thread_team, "LATE", -1.0)
    run_tasks([lambda: None] * 2, 2)
    assert len(calls) == 2
    done: list[int] = []
    for number in range(LEFT_OUT - 1):
        run_tasks([partial(done.append, number)] * 2, 2)
    assert len(calls) == 2
    assert len(done) == 2 * (LEFT_OUT - 1)
    run_tasks([lambda: None] * 2, 2)
    assert len(calls) == 3


WITHOUT_A_TEAM = """
from unittest import mock
import torch
from einconv_kfac.curvature.devices.thread_team import _found_team, torch_team
torch.set_num_threads(2)
for owner, name, change in (
    (torch.__config__, "parallel_info", lambda: "native"), (torch, "get_num_threads", int)
):
    _found_team.cache_clear()
    with mock.patch.object(owner, name, change):
        assert torch_team() is None, name
"""


def test_other_threads_serve_where_torch_has_no_such_team() -> None:
    """In a process of its own, since what was found is kept."""
    subprocess.run([sys.executable, "-c", WITHOUT_A_TEAM], check=True)
