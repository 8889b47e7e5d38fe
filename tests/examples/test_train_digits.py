"""The numbers, the picture and the command line of the main example."""

import json
import math

import pytest
import torch
import train_digits
from torch import nn

KEYS = {"test_accuracy", "test_loss", "seconds", "steps", "steps_to_0.1", "steps_to_0.03"}


def test_writes_table_picture_and_numbers(tmp_path, capsys):
    picture, numbers = tmp_path / "curves.png", tmp_path / "numbers.json"
    train_digits.main(["--epochs", "5", "--output", str(picture), "--json", str(numbers)])
    printed = capsys.readouterr().out
    assert "1347 training and 450 test images, split by seed 0" in printed
    assert str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    summaries = json.loads(numbers.read_text())
    assert list(summaries) == ["KFAC", "SGD", "AdamW"]
    for name, summary in summaries.items():
        assert summary.keys() >= KEYS
        assert summary["steps"] == 15
        assert name in printed
    assert summaries["KFAC"]["test_accuracy"] > 0.9
    assert summaries["SGD"]["steps_to_0.03"] is None


def test_runs_repeat_and_split_is_a_partition():
    data = train_digits.split_digits(seed=3)
    everything = torch.cat([data.x, data.x_test]).flatten(1)
    again = torch.cat([train_digits.split_digits(seed=4).x, train_digits.split_digits(4).x_test])
    assert torch.equal(everything.sum(0), again.flatten(1).sum(0))
    assert everything.min() == 0
    assert everything.max() == 1
    setting = train_digits.Setting(epochs=1, seed=3)
    first, second = (train_digits.train("AdamW", data, setting, quiet=True) for _ in range(2))
    assert first.losses == second.losses


def test_options_reach_the_optimizers(tmp_path, monkeypatch):
    settings = []
    monkeypatch.setattr(
        train_digits, "KFAC", lambda model, loss_fn, **given: settings.append(given)
    )
    model, loss_fn = nn.Linear(2, 2), nn.CrossEntropyLoss()
    setting = train_digits.Setting(lr=0.5, damping=0.01)
    train_digits.build_optimizer("KFAC", model, loss_fn, setting)
    assert settings == [{"lr": 0.5, "damping": 0.01}]
    for name in ("SGD", "AdamW"):
        optimizer = train_digits.build_optimizer(name, model, loss_fn, setting)
        assert type(optimizer).__name__ == name
        assert optimizer.defaults["lr"] == 0.5


def test_network_has_a_strided_and_a_grouped_convolution():
    convolutions = [m for m in train_digits.build_network(0) if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 3
    assert any(conv.stride != (1, 1) for conv in convolutions)
    assert any(conv.groups > 1 for conv in convolutions)


def test_running_mean_is_over_one_epoch():
    run = train_digits.Run(steps_per_epoch=2, losses=[4.0, 2.0, 0.1, 0.06, 0.0])
    assert run.running_mean() == pytest.approx([3.0, 1.05, 0.08, 0.03])
    assert run.steps_to(0.1) == 4
    assert run.steps_to(0.001) is None
    assert train_digits.Run(1, losses=[math.nan]).steps_to(0.1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "Adagrad"], "must be one of KFAC, SGD, AdamW, got 'Adagrad'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "2000"], "--batch-size must be in 1..1347, got 2000"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_digits.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_optimizers_are_found_in_any_case():
    args = train_digits.parse_arguments(["--optimizers", "kfac", "ADAMW"])
    assert args.optimizers == ["KFAC", "AdamW"]
