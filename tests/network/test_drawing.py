"""Pictures and explanations of networks."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from einconv_kfac.expressions import (
    convNd_forward,
    convNd_gram,
    convNd_kfac_reduce,
    convNd_toeplitz,
)
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.network import draw, explain, simplified

GEOMETRY = conv_geometry((8, 9), (2, 3), stride=(2, 1), padding=(0, 1), groups=2)
DENSE = conv_geometry((8,), 2, stride=2)
NETWORKS = {
    "forward": convNd_forward.network(GEOMETRY, 4, 6, 8),
    "reduce": convNd_kfac_reduce.network(GEOMETRY, 4, 6),
    "gram": convNd_gram.network(GEOMETRY, 2, 4, 6, 8),
    "toeplitz": convNd_toeplitz.network(DENSE, 2, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("simplify", [True, False])
def test_picture_shows_every_operand_and_index(name: str, simplify: bool, tmp_path: Path) -> None:
    network = simplified(NETWORKS[name]) if simplify else NETWORKS[name]
    picture = draw(network)
    root = ElementTree.fromstring(picture.svg)
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    shown = " ".join(texts).split()
    for index, size in network.sizes.items():
        labels = re.findall(rf"{re.escape(index)}=(\d+)", " ".join(texts))
        assert str(size) in labels
    for operand in (node.operand for node in network.nodes):
        assert operand.name in shown
    assert picture._repr_svg_() == picture.svg
    for file in (tmp_path / "network.svg", tmp_path / "network.png"):
        picture.save(file)
        assert file.stat().st_size > 500
    with pytest.raises(ValueError, match=r"`path` must end in \.svg or \.png, got 'network.pdf'"):
        picture.save("network.pdf")


def test_explanation_counts() -> None:
    network = simplified(NETWORKS["forward"])
    explanation = explain(network)
    assert network.fired == ("dense", "contract_deltas", "contract_deltas")
    assert explanation.multiply_accumulates == 4 * 8 * 4 * 9 * 3 * 2 * 3
    assert explanation.largest == 4 * 8 * 4 * 9
    for word in ("dense", "multiply-accumulates: 20,736", "x[n g ci o0 k0 i1]", "ci=3"):
        assert word in str(explanation)


def test_explanation_counts_an_index_of_one_operand_once() -> None:
    """Both copies of the input are summed over their outputs, then multiplied."""
    n, c, o = 5, 6, 8 * 9
    network = convNd_kfac_reduce.network(conv_geometry((8, 9), 1), n, c)
    assert explain(simplified(network)).multiply_accumulates == 2 * n * c * o + n * c * c


def test_network_in_words() -> None:
    assert str(convNd_forward.network(conv_geometry((8,), 3), 2, 4, 5)) == (
        "x[n g ci i0] P[k0 o0 i0] W[g co ci k0] -> [n g co o0]"
    )
