"""The benchmarks of factors on several threads start, end, and count."""

import factor_regions
import factor_threads


def test_factor_threads(tmp_path):
    output = tmp_path / "threads.txt"
    factor_threads.main(["--quick", "--threads", "1", "2", "--output", str(output)])
    assert "2 thread(s), im2col" in output.read_text()


def test_factor_regions(tmp_path):
    output = tmp_path / "regions.txt"
    factor_regions.main(["--quick", "--output", str(output)])
    counts = [line.split() for line in output.read_text().splitlines() if line.startswith("8x128")]
    assert all(int(words[7]) > 0 for words in counts)
    assert sum(words[6].endswith("*") for words in counts) == 1
