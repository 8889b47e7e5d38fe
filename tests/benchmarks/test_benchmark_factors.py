"""The benchmark of the factors starts, ends, and writes its table and picture."""

import factors
import pytest
from factor_bounds import SORTS
from factor_layers import layers
from factor_report import Row, shortfalls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # on import of the others
def test_factors(tmp_path):
    output = tmp_path / "results" / "factors.txt"
    factors.main(["--quick", "--budget", "0", "--output", str(output)])
    lines = output.read_text().splitlines()
    heads = [line for line in lines if line.startswith(("expand:", "reduce:"))]
    assert len(heads) == 6  # summary, table, and layers below an aim
    assert output.with_suffix(".png").stat().st_size > 0


def test_a_layer_below_an_aim_is_named_with_what_is_possible():
    layer = next(found for found in layers() if found.is_large)
    times = {"ours": 2.0, "einconv": 13.0, "im2col": 10.0}
    row = Row(layer, "expand", times, {}, {}, 0.5, dict.fromkeys(SORTS, 0.25))
    assert row.misses == {"im2col": 8.0}  # 6.5 times einconv's speed, 5 times im2col's
    (line,) = [line for line in shortfalls([row]) if line.startswith(str(layer))]
    assert line.split()[-7:] == ["5.0", "8.0", "20.0", "4.0", "25%", "25%", "25%"]
    assert not Row(layer, "reduce", {**times, "im2col": 20.0}, {}, {}, 0.5, {}).misses
