"""Tasks on several threads: errors, settings, and processes that are forked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from threading import Thread, get_ident

import pytest
import torch

from einconv_kfac.curvature.devices.threads import run_tasks, threads_for


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch have two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _threads_of_new_thread() -> int:
    found: list[int] = []
    thread = Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_tasks_run_once_on_one_thread_each() -> None:
    found: list[tuple[int, int]] = []

    def task(number: int) -> None:
        assert not torch.is_grad_enabled()
        found.append((number, torch.get_num_threads()))

    run_tasks([partial(task, number) for number in range(20)], 4)
    assert sorted(found) == [(number, 1) for number in range(20)]


def test_this_thread_runs_tasks_if_there_is_no_other() -> None:
    found: list[int] = []
    run_tasks([lambda: found.append(get_ident())], 1)
    assert found == [get_ident()]


def test_settings_stay() -> None:
    before, later = torch.get_num_threads(), _threads_of_new_thread()
    run_tasks([lambda: None], 5)
    assert torch.get_num_threads() == before
    assert _threads_of_new_thread() == later


def test_errors_are_raised_after_all_tasks() -> None:
    done: list[int] = []

    def fail() -> None:
        raise KeyError("first")

    tasks = [fail, *(partial(done.append, number) for number in range(8))]
    with pytest.raises(KeyError, match="first"):
        run_tasks(tasks, 2)
    run_tasks([partial(done.append, 8)], 2)
    assert 8 in done


def test_inference_mode_is_that_of_the_caller() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
        run_tasks([partial(x.add_, 1.0)], 2)  # type: ignore[list-item]
    assert x.tolist() == [1.0] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_forked_process() -> None:
    run_tasks([lambda: None, lambda: None], 2)
    child = os.fork()
    if not child:
        found: list[int] = []
        run_tasks([partial(found.append, 1), partial(found.append, 1)], 2)
        os._exit(0 if found == [1, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_for_tensors() -> None:
    x = torch.zeros(3)
    assert threads_for(x) == torch.get_num_threads()
    assert threads_for(torch.nn.Parameter(x)) == 1
    assert threads_for(x.to("meta")) == 1
    assert torch.func.vmap(lambda row: row * threads_for(row))(torch.ones(2, 3)).eq(1).all()
