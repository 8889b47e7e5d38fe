"""The benchmark of the factors starts, ends, and writes its table and picture."""

import factors
import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # on import of the others
def test_factors(tmp_path):
    output = tmp_path / "results" / "factors.txt"
    factors.main(["--quick", "--budget", "0", "--output", str(output)])
    lines = output.read_text().splitlines()
    assert (
        sum(line.startswith(("expand:", "reduce:")) for line in lines) == 6
    )  # summary, table and shortfalls
    assert output.with_suffix(".png").stat().st_size > 0
