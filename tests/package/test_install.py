"""Wheel and sdist hold the package alone, and are installed and removed beside a package with a folder of our names."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TINY_PRE
from tests.package.conftest import ROOT, Distributions

NEIGHBOUR = "configobj"
"""Ships a folder `validate` at the top of site-packages."""
LARGEST_SDIST = 2_000_000
"""Bytes; the sdist has 0.4 MB, the whole repository many times that."""


def names_in_tree() -> Iterator[str]:
    """The files of the package in the repository, through the links to its rooms."""
    for folder, folders, files in os.walk(ROOT / "streamquant", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from ((Path(folder) / name).relative_to(ROOT).as_posix() for name in files)


def test_the_wheel_holds_the_package_and_nothing_else(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = wheel.namelist()
    mine = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert mine == set(names_in_tree())
    assert {Path(name).suffix for name in mine} >= {".py", ".j2", ".css", ".typed"}


def test_the_sdist_builds_the_same_wheel(distributions: Distributions, tmp_path: Path) -> None:
    with tarfile.open(distributions.sdist) as sdist:
        assert all(member.isfile() for member in sdist)
        sdist.extractall(tmp_path, filter="data")
    assert distributions.sdist.stat().st_size < LARGEST_SDIST
    (source,) = tmp_path.iterdir()
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, tmp_path / "again"], cwd=source, check=True, capture_output=True)
    (again,) = (tmp_path / "again").iterdir()
    assert again.read_bytes() == distributions.wheel.read_bytes()


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment that sees this one's libraries, but neither this repository nor its installed package."""

    folder: Path
    work: Path
    """Where its programs run."""

    @property
    def site(self) -> Path:
        """Its site-packages."""
        paths = {"base": str(self.folder), "platbase": str(self.folder)}
        return Path(sysconfig.get_path("purelib", "venv", vars=paths))

    def run(self, program: str, *arguments: object) -> str:
        """What one of its programs prints."""
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        ended = subprocess.run(
            [str(self.folder / "bin" / program), *map(str, arguments)],
            cwd=self.work,
            env={**variables, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def pip(self, *arguments: object) -> None:
        """The environment's own pip, without the network."""
        self.run("python", "-m", "pip", "--quiet", *arguments)

    def install(self, file: Path) -> None:
        """A wheel or an sdist; no dependency."""
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", file)

    def files(self) -> set[str]:
        """Every file there is."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_dir()}

    def record(self, name: str) -> dict[str, str]:
        """The files of an installed distribution, relative to the environment -> their hash, as pip wrote them down."""
        (record,) = self.site.glob(f"{name}-*.dist-info/RECORD")
        rows = csv.reader(record.read_text().splitlines())
        return {
            Path(os.path.normpath(self.site / path)).relative_to(self.folder).as_posix(): sha for path, sha, _ in rows
        }

    def check(self, name: str) -> None:
        """Every file of an installed distribution is there, as it was in its wheel."""
        for path, sha in self.record(name).items():
            data = (self.folder / path).read_bytes()
            if sha:
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert sha == f"sha256={digest}", path


@pytest.fixture(scope="session")
def neighbour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of configobj."""
    folder = tmp_path_factory.mktemp("neighbour")
    command = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:"]
    ended = subprocess.run([*command, "--dest", folder, NEIGHBOUR], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"{NEIGHBOUR} cannot be had from the package index: {ended.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to what is installed here, but for this package and for configobj."""
    folder = tmp_path_factory.mktemp("libraries")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "streamquant" not in entry.name and not entry.name.startswith((NEIGHBOUR, "validate")):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path: Path, libraries: Path) -> Environment:
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    found = Environment(folder, tmp_path)
    (found.site / "libraries.pth").write_text(f"{libraries}\n")
    return found


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "neighbour-first"])
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_lives_beside_a_package_with_folders_of_our_names(
    kind: str, ours_first: bool, distributions: Distributions, neighbour: Path, environment: Environment, tiny: Path
) -> None:
    ours = distributions.wheel if kind == "wheel" else distributions.sdist
    before = environment.files()
    for file in (ours, neighbour) if ours_first else (neighbour, ours):
        environment.install(file)
    environment.check("streamquant")
    environment.check(NEIGHBOUR)
    assert "Q8_0" in environment.run("streamquant", "plan", tiny, "--to", "gguf:Q8_0", "--pre", TINY_PRE)
    shown = environment.run(
        "python", "-c", "import streamquant, validate; print(streamquant.__file__, validate.__file__)"
    )
    assert shown.split() == [str(environment.site / name / "__init__.py") for name in ("streamquant", "validate")]

    theirs = set(environment.record(NEIGHBOUR))
    environment.pip("uninstall", "--yes", "streamquant")
    assert environment.files() - before == theirs
    environment.check(NEIGHBOUR)


def test_it_stays_whole_when_the_neighbour_goes(
    distributions: Distributions, neighbour: Path, environment: Environment
) -> None:
    environment.install(distributions.wheel)
    environment.install(neighbour)
    environment.pip("uninstall", "--yes", NEIGHBOUR)
    environment.check("streamquant")
