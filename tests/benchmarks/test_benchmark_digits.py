"""The comparison on the digits writes its table."""

import digits


def test_digits(tmp_path):
    table = tmp_path / "results" / "digits.txt"
    digits.main(["--quick", "--output", str(table)])
    lines = table.read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("batch size")] == ["448,", "64,"]
    assert sum(line.split()[:2] == ["KFAC", "median"] for line in lines) == 2
