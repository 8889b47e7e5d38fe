"""The Laplace example improves calibration, keeps accuracy, and draws a picture."""

import laplace_uncertainty
import pytest


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_is_better_calibrated(tmp_path):
    picture = tmp_path / "reliability.png"
    options = ["--samples", "16", "--steps", "120", "--output", str(picture)]
    results = laplace_uncertainty.main(options)
    before, after = results["network"], results["Laplace"]
    assert after["ece"] < before["ece"]
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > before["accuracy"] - 0.03
    assert picture.read_bytes().startswith(b"\x89PNG")
