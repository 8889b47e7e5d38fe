"""The curvature benchmark prints its table."""

import curvature
import pytest


@pytest.mark.filterwarnings("ignore")
def test_prints_a_table(capsys):
    pytest.importorskip("curvlinops")
    curvature.main(["--small", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].startswith("model")
    for name in ("plain", "wide kernels", "separable"):
        assert f"{name:14}einconv-kfac" in printed
