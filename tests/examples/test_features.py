"""The short examples run, and each shows the effect of its feature."""

import adamw_with_kfac
import fine_tuning
import mixed_precision
import resume
import switch_from_sgd


def test_switching_from_sgd_is_three_lines():
    changed = [line.strip() for line in switch_from_sgd.__doc__.splitlines()]
    assert len([line for line in changed if line[:1] in {"+", "-"}]) == 3
    accuracies = switch_from_sgd.main(steps=12)
    assert accuracies["KFAC"] > max(0.95, accuracies["SGD"])


def test_adamw_behind_kfac():
    accuracies = adamw_with_kfac.main()
    assert accuracies["AdamW behind K-FAC"] > max(0.9, accuracies["AdamW"])


def test_fine_tuning(capsys):
    accuracies = fine_tuning.main()
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[1:3]] == [
        ["0.weight", "frozen"],
        ["0.bias", "frozen"],
    ]
    assert accuracies["pre-training"] > 0.95
    assert accuracies["unfrozen"] > 0.9


def test_mixed_precision_with_accumulation():
    assert mixed_precision.main(steps=10) > 0.95


def test_resuming_changes_nothing():
    assert resume.main()
