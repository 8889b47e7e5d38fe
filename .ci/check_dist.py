"""Check that wheel and sdist contain the package and its papers, and nothing that is not theirs."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "einconv_kfac").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
]

PAPERS = ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff")
"""What the sdist has beside the package."""
ELSEWHERE = ("tests/", "benchmarks/", "docs/", "examples/", ".ci/", ".github/")
"""What stays in the repository."""


def check(archive: Path, names: list[str]) -> None:
    """Exit with an error if ``names`` lacks a file, or has a top-level package ``optim``."""
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise SystemExit(f"{archive.name} lacks {', '.join(missing)}")
    if any(name.split("/")[0] == "optim" for name in names):
        raise SystemExit(f"{archive.name} has a top-level package `optim`")
    print(f"{archive.name}: {len(names)} files")


def main() -> None:
    """Check the wheel and the sdist of the folder that the command line names."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    check(wheel, names)
    foreign = {name.split("/")[0] for name in names if not name.startswith("einconv_kfac")}
    if foreign:
        raise SystemExit(f"{wheel.name} installs {', '.join(sorted(foreign))}, too")
    with tarfile.open(sdist) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    check(sdist, names)
    if missing := [name for name in PAPERS if name not in names]:
        raise SystemExit(f"{sdist.name} lacks {', '.join(missing)}")
    if others := [name for name in names if name.startswith(ELSEWHERE)]:
        raise SystemExit(f"{sdist.name} has {', '.join(others)}, too")


if __name__ == "__main__":
    main()
