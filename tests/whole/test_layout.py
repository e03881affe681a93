"""The house: whose `datasets` is imported, which library lives where, and what must not stand in any file."""

import ast
import importlib.metadata
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

import datasets
import pipeline
import stages

CHECKOUT = Path(__file__).parents[2]
OURS = {"pipeline": pipeline, "stages": stages, "datasets": datasets}
HOMES = {  # library -> the packages that may import it
    "ray": {"pipeline"},
    "mlflow": {"pipeline"},
    "hydra": {"pipeline"},
    "omegaconf": {"pipeline"},
    "torch": {"pipeline", "stages", "datasets"},  # there, to resize pictures alone, and where it does so
    "torchvision": {"stages"},
    "open_clip": {"stages"},
    "img2dataset": {"datasets"},
    "webdataset": {"datasets"},
    "resvg_py": {"datasets"},
    "diffusers": set(),  # oracles: only tests use them
    "transformers": set(),
    "accelerate": set(),
    "scipy": set(),
}
FORBIDDEN = {
    "the address of a package registry": r"pypi\.org|pythonhosted\.org|conda\.anaconda|download\.pytorch",
    "a switch for one": r"--(?:extra-)?index-url",
    "a path of one machine": r"(?<![\w.$}])/(?:home/(?!me/)|(?:work|Users|mnt|media)/)\w",
}


@cache
def imports(file: Path) -> frozenset[str]:
    """Top-level names of everything that a file imports, functions' imports included."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules.append(str(node.module))
    return frozenset(module.partition(".")[0] for module in modules)


def tracked() -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [CHECKOUT / name for name in names if (CHECKOUT / name).is_file()]


@pytest.mark.parametrize("name", OURS)
def test_the_packages_are_the_folders_of_this_checkout(name):
    assert Path(OURS[name].__path__[0]) == CHECKOUT / name


def test_no_installed_distribution_provides_a_package_of_our_names():
    provided = importlib.metadata.packages_distributions()
    assert {name: provided[name] for name in OURS if name in provided} == {}


def test_the_project_is_never_built_as_a_wheel():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert "build-system" not in project
    assert project["tool"]["uv"]["package"] is False


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_only(library):
    users = {name for name in OURS for file in (CHECKOUT / name).rglob("*.py") if library in imports(file)}
    assert users == HOMES[library]


def test_stages_and_datasets_know_neither_each_other_nor_the_pipeline():
    for name in ("stages", "datasets"):
        for file in (CHECKOUT / name).rglob("*.py"):
            assert OURS.keys() & imports(file) <= {name}, file


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what):
    pattern = re.compile(FORBIDDEN[what])
    found = {}
    for file in tracked():
        match = pattern.search(file.read_text(errors="replace"))
        if match:
            found[str(file.relative_to(CHECKOUT))] = match[0]
    assert found == {}


def test_the_patterns_find_what_they_are_meant_to_find():
    texts = ["https://" + "pypi" + ".org/simple", "pip install --" + "index-url x", 'open("/' + 'home/someone/x")']
    for pattern, text in zip(FORBIDDEN.values(), texts, strict=True):
        assert re.search(pattern, text)
