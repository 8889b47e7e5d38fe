"""What importing the optimizer imports beside the package: nothing optional, and no compiler."""

from __future__ import annotations

import json
import sys

from fresh_interpreter import printed

SCRIPT = """
import json, sys
import torch, tqdm, opt_einsum
before = set(sys.modules)
from einconv_kfac import KFAC
print(json.dumps(sorted(set(sys.modules) - before)))
"""
STANDARD = set(sys.stdlib_module_names)


def test_import_brings_only_the_package_and_the_standard_library() -> None:
    """Modules are counted, since their number holds on any machine and their time does not."""
    added = json.loads(printed(SCRIPT))
    assert "einconv_kfac.optim.kfac" in added
    others = [name for name in added if name.split(".")[0] != "einconv_kfac"]
    foreign = [name for name in others if name.split(".")[0] not in STANDARD]
    assert foreign == [], "import these where they are used"
    assert len(others) < 20
    assert not [name for name in added if name.startswith("einconv_kfac.curvature.interop.")]
