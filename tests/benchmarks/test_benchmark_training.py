"""The training comparison runs, can be continued, and computes its numbers correctly."""

from __future__ import annotations

import gzip
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from evidence.data import Sources, fashion_mnist
from evidence.examples import Examples
from evidence.optimizers import schedule
from evidence.picture import bands
from evidence.report import Outcome, table
from evidence.rounds import train
from evidence.runs import Records, Run
from evidence.search import KFAC_SETTINGS, settings
from evidence.task import Task, batches, mean_loss, measured
from evidence.tasks import TASKS, tasks
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

PACKAGES = dict.fromkeys(("SOAP", "Muon"), "pytorch_optimizer")
PACKAGES |= {"SINGD": "singd", "asdl K-FAC": "asdl"}
SOURCES = Sources()
SGD = ("SGD", {"lr": 0.1})
PEERS = ("AdamW", "SOAP", "Muon", "SINGD", "asdl K-FAC", "KFAC fixed", "KFAC")
NEWER = ("AdamW", "SOAP", "Muon", "KFAC")  # optimizers of tasks other than images
CASES = [(n, t) for t in "cde" for n in PEERS] + [(n, t) for t in "ghijklm" for n in NEWER]
CASES.remove(("SOAP", "g"))  # two steps at its large rates diverge


def trained(task: Task, *runs: Run) -> list[Run]:
    return train(task, task.family.data(SOURCES), runs)


def write_idx(path: Path, values: torch.Tensor, magic: int) -> None:
    header = struct.pack(f">{1 + values.dim()}i", magic, *values.shape)
    path.write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = torch.arange(count * 4).reshape(count, 2, 2)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels, 2051)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", torch.arange(count), 2049)
    return tmp_path


def test_reads_the_files(folder: Path) -> None:
    split = fashion_mnist(folder)
    assert split.train.x.shape == (5, 1, 2, 2)
    assert torch.equal(split.train.x.flatten() * 255, torch.arange(20.0))
    assert split.test.y.tolist() == [0, 1, 2]


def test_says_where_missing_files_come_from(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"needs train-images.*--data-dir"):
        training.main(["--data-dir", str(tmp_path), "--output", str(tmp_path)])


def test_refuses_a_cut_file(folder: Path) -> None:
    write_idx(folder / "train-labels-idx1-ubyte.gz", torch.arange(5), 2051)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz must be a complete"):
        fashion_mnist(folder)


@pytest.mark.parametrize("option", ["task", "optimizer"])
def test_refuses_unknown_names(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"`--{option}` must be of .*, got 'z'"):
        training.main(["--quick", f"--{option}", "z", "--output", str(tmp_path)])


def test_tasks_get_a_table_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    length = ["--steps", "6", "--fraction", "0.5"]
    chosen = ["--quick", "--task", "a,e", *length, "--optimizer", "SGD,KFAC"]
    training.main([*chosen, "--output", str(tmp_path)])
    lines = (tmp_path / "training-quick.txt").read_text().splitlines()
    assert [line[:3] for line in lines if line.startswith("(")] == ["(a)", "(e)"]
    assert sum(line.startswith("    KFAC by SGD:") for line in lines) == 2
    assert (tmp_path / "training-quick.png").stat().st_size > 0
    runs = (tmp_path / "training-quick.jsonl").read_text()
    assert not any(json.loads(line)["error"] for line in runs.splitlines())
    assert all(json.loads(line)["steps"][-1] == 3 for line in runs.splitlines())
    training.main([*chosen, "--output", str(tmp_path)])  # nothing is left to run
    assert (tmp_path / "training-quick.jsonl").read_text() == runs


@pytest.mark.parametrize(("name", "letter"), CASES)
def test_every_optimizer_trains(name: str, letter: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    task = tasks("quick")[letter]
    setting = settings(name, task, 4)[0]
    [run] = trained(task, Run("quick", letter, name, 0, setting, 2))
    assert not run.error
    assert len(run.losses) == len(run.seconds) == len(run.steps) > 0
    assert len(run.metrics) == (2 if task.family.metric else 0)
    assert all(math.isfinite(value) for value in [*run.losses, *run.metrics])


@pytest.mark.parametrize("setting", KFAC_SETTINGS, ids=str)
def test_every_setting_of_kfac_trains(setting: dict[str, object]) -> None:
    [run] = trained(tasks("quick")["a"], Run("quick", "a", "KFAC tuned", 0, setting, 2))
    assert not run.error


def test_runs_that_take_turns_are_those_alone() -> None:
    task = tasks("quick")["a"]
    runs = [Run("quick", "a", name, 3, setting, 6) for name, setting in (("KFAC", {}), SGD)]
    before = torch.get_rng_state()
    together = trained(task, *runs)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [trained(task, run)[0] for run in runs]
    assert [run.losses for run in together] == [run.losses for run in alone]
    assert together[0].clock == together[1].clock != alone[0].clock


def test_a_failed_run_does_not_stop_the_others() -> None:
    task = tasks("quick")["a"]
    runs = [Run("quick", "a", "SGD", 0, {"lr": rate}, 6) for rate in (1e30, 0.1)]
    failed, other = trained(task, *runs)
    assert failed.error.startswith("ArithmeticError: the loss was")
    assert failed.final == math.inf
    assert not other.error
    assert other.steps[-1] == 6


def test_a_missing_package_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    [run] = trained(tasks("quick")["a"], Run("quick", "a", "SOAP", 0, {"lr": 0.1}, 2))
    assert run.error == "ImportError: This optimizer needs pytorch_optimizer: pip install " + (
        "pytorch-optimizer"
    )
    assert run.final == math.inf


def test_repeated_runs_replace_the_recorded_ones(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = ["--quick", "--task", "a", "--optimizer", "SGD,KFAC", "--output", str(tmp_path)]
    training.main(chosen)
    training.main([*chosen, "--repeat", "KFAC"])
    lines = (tmp_path / "training-quick.jsonl").read_text().splitlines()
    first, second = (run for run in map(json.loads, lines) if run["optimizer"] == "KFAC")
    assert first["losses"] == second["losses"]
    found = Records(tmp_path / "training-quick.jsonl").find(Run("quick", "a", "KFAC", 1, {}, 6))
    assert found is not None
    assert found.clock == second["clock"] != first["clock"]
    assert "different clocks" in (tmp_path / "training-quick.txt").read_text()


def test_missing_runs_are_left_out_on_demand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = ["--quick", "--output", str(tmp_path)]
    training.main([*chosen, "--task", "a", "--optimizer", "SGD"])
    training.main([*chosen, "--task", "a,b", "--optimizer", "SGD,AdamW,KFAC", "--recorded"])
    lines = (tmp_path / "training-quick.txt").read_text().splitlines()
    rows = [line.split()[0] for line in lines if line.startswith("    ")]
    assert [row for row in rows if row in {"SGD", "AdamW", "KFAC"}] == ["SGD"]
    assert (tmp_path / "training-quick.png").stat().st_size > 0


def test_recorded_runs_are_read() -> None:
    path = Path(training.__file__).parent / "results" / "training.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    older = [line for line in lines if "accuracies" in line]
    records = Records(path)
    for line in older:
        names = ("size", "task", "optimizer", "seed", "setting", "total")
        found = records.find(Run(*(line[name] for name in names)))
        assert found is not None
        assert found.losses == line["losses"] or found.machine
    last = older[-1]
    assert last["task"] in TASKS


def test_held_out_seeds_are_other_seeds(tmp_path: Path) -> None:
    assert not {*training.SEEDS, 0} & {*training.HELD_OUT}
    options = training._arguments(["--held-out", "--task", "g", "--output", str(tmp_path)])
    assert tuple(training._protocol(options).seeds) == training.HELD_OUT


def test_the_plan_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--plan", "--task", "f", "--optimizer", "SGD"]
    training.main([*arguments, "--output", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("together")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["standard", "full"])
@pytest.mark.parametrize("letter", TASKS)
def test_networks_fit_the_examples(letter: str, size: str) -> None:
    task = tasks(size)[letter]
    some = task.family.data(SOURCES).train.first(2)
    loss = task.family.loss(task.family.loss_fn(), task.model()(some.x), some.x, some.y)
    assert loss.isfinite()
    assert not loss.shape


def test_evaluates_on_all_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    images = Examples(torch.rand(1100, 1, 2, 2), torch.randint(4, (1100,)))
    with torch.no_grad():
        logits = model(images.x)
    total = binary_cross_entropy_with_logits(logits, images.x.flatten(1), reduction="sum")
    torch.testing.assert_close(mean_loss(TASKS["f"], model, images), float(total) / 1100)
    right = float((logits.argmax(1) == images.y).double().mean())
    assert measured(TASKS["a"], model, images) == right


def test_batches_go_through_all_images_each_epoch() -> None:
    indices = batches(replace(TASKS["a"], batch_size=5), 20, seed=0)
    epochs = [torch.cat([indices(step) for step in range(4 * e, 4 * e + 4)]) for e in range(2)]
    assert all(epoch.sort().values.tolist() == list(range(20)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_last_step_is_evaluated() -> None:
    task = replace(TASKS["a"], steps=17, evaluations=5)
    due = [step for step in range(1, 18) if task.due(step)]
    assert len(due) == 5
    assert due[-1] == 17


def test_a_batch_of_all_examples_keeps_their_order() -> None:
    assert batches(TASKS["g"], 354, seed=0)(7).tolist() == list(range(354))


def test_schedule_warms_up_and_ends_at_zero() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("name", ["SGD", "KFAC fixed", "KFAC tuned"])
def test_trials_are_as_many_as_asked_for(name: str) -> None:
    tried = settings(name, TASKS["c"], 4)
    assert len({json.dumps(setting) for setting in tried}) == 4


def test_table_has_ratios_to_the_best_peer() -> None:
    def run(name: str, losses: list[float]) -> Run:
        seconds = [1.0, 2.0, 4.0]
        return Run("s", "f", name, 1, {}, 30, [10, 20, 30], losses, seconds, seconds)

    runs = {
        "SGD": [run("SGD", [9.0, 8.0, 7.0])],
        "AdamW": [run("AdamW", [9.0, 8.0, 6.0])],
        "KFAC": [run("KFAC", [9.0, 5.0, 4.0])],
    }
    outcome = Outcome(TASKS["f"], runs, {"SOAP": "no such thing"})
    lines = table([outcome])
    assert "target: 6.0000, the final training loss of AdamW" in lines[1]
    assert "KFAC by AdamW: 0.67 of its steps, 0.50 of its time" in "".join(lines)
    assert any("SOAP" in line and "failed: no such thing" in line for line in lines)
    runs["KFAC"] = [replace(runs["KFAC"][0], clock="another")]
    assert "0.67 of its steps, times are from different clocks" in "".join(table([outcome]))


def test_bands_reach_over_seeds() -> None:
    losses = [[4.0, 3.0], [8.0, 1.0], [5.0, 2.0]]
    runs = [
        Run("s", "f", "SGD", i, {}, 2, [1, 2], each, [i, i + 2]) for i, each in enumerate(losses)
    ]
    assert bands(runs, "seconds") == ([1, 3], [4.0, 1.0], [5.0, 2.0], [8.0, 3.0])
