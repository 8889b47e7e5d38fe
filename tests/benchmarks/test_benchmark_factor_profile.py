"""The profile of the factors starts, ends, and counts what cannot be avoided."""

import factor_bounds
import factor_profile
from factor_layers import layers


def test_factor_profile(tmp_path):
    output = tmp_path / "results" / "factor_profile.txt"
    factor_profile.main(["--quick", "--output", str(output)])
    lines = output.read_text().splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["expand", "reduce"]


def test_least():
    found = {str(layer): layer for layer in layers()}
    layer = found["8x256x56x56 k1 s1 p0 d1 g1"]
    assert factor_bounds.least(layer, "expand") == 8 * 56 * 56 * 256 * 256 / 2
    assert factor_bounds.least(layer, "reduce") == 8 * 256 * 256 / 2
    assert set(factor_profile.KINDS.values()) <= found.keys()
    stride_1 = found["8x64x56x56 k3 s1 p1 d1 g1"]
    positions = 56 + 2 * 55 + 2 * 54  # of the five lags of a dimension
    expected = 8 * 64 * 64 * positions**2 / 2
    assert (
        factor_bounds.least(stride_1, "expand") == expected
    )  # lags are each other's mirror images
