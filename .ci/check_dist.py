"""Check that wheel and sdist hold the package, and no top-level package ``optim``."""

import sys
import tarfile
import zipfile
from pathlib import Path

NEEDED = ("einconv_kfac/__init__.py", "einconv_kfac/py.typed", "einconv_kfac/geometry.py")


def check(archive: Path, names: list[str]) -> None:
    """Raise if a file is missing from ``names`` or one too many is there."""
    missing = [name for name in NEEDED if name not in names]
    if missing:
        raise SystemExit(f"{archive.name} lacks {', '.join(missing)}")
    if any(name.split("/")[0] == "optim" for name in names):
        raise SystemExit(f"{archive.name} has a top-level package `optim`")
    print(f"{archive.name}: {len(names)} files, as they should be")


def main() -> None:
    """Check the one wheel and the one sdist of a folder."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    check(wheel, names)
    foreign = {name.split("/")[0] for name in names if not name.startswith("einconv_kfac")}
    if foreign:
        raise SystemExit(f"{wheel.name} installs {', '.join(sorted(foreign))}, too")
    with tarfile.open(sdist) as tar:
        check(sdist, [name.partition("/")[2] for name in tar.getnames()])


if __name__ == "__main__":
    main()
