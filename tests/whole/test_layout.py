"""The house: whose `datasets` is imported, which library lives where, how large rooms, modules and functions may be,
what answers at once, whether names are right, and what must not stand in any file."""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import datasets
import pipeline
import settings
import stages

CHECKOUT = Path(__file__).parents[2]
OURS = {"pipeline": pipeline, "stages": stages, "datasets": datasets, "settings": settings}
LONGEST_FUNCTION = 60  # lines, its docstring included
LONGEST_MODULE = 400
LARGEST_ROOM = 15  # modules
HOMES = {  # library -> the packages, rooms or modules that may import it
    "ray": {"pipeline.cluster"},
    "mlflow": {"pipeline.tracking"},
    "hydra": {"pipeline.settings"},
    "omegaconf": {"pipeline.settings"},
    "torch": {"pipeline", "stages", "datasets.pictures"},  # there, to resize pictures alone, and where it does so
    "torchvision": {"stages"},
    "torch_fidelity": {"stages.scoring"},
    "open_clip": {"stages"},
    "img2dataset": {"datasets.fetching"},
    "webdataset": {"datasets.formats"},
    "resvg_py": {"datasets.sources"},
    "diffusers": set(),  # oracle: only tests use it
    "transformers": {"pipeline.models.foreign"},
    "accelerate": set(),
    "scipy": set(),
}
HEAVY = {"torch", "ray", "mlflow"}  # libraries that take seconds to import
AT_ONCE = (  # rooms that do without, at least until something is to be done
    "settings", "pipeline.store", "pipeline.settings", "pipeline.plan", "pipeline.verbs", "pipeline.run",
    "pipeline.hours", "pipeline.results",
    "stages.settings", "stages.anatomy",
    "datasets.files", "datasets.formats", "datasets.sources", "datasets.planning",
)  # fmt: skip
FORBIDDEN = {
    "the address of a package registry": r"pypi\.org|pythonhosted\.org|conda\.anaconda|download\.pytorch",
    "a switch for one": r"--(?:extra-)?index-url",
    "a path of one machine": r"(?<![\w.$}])/(?:home/(?!me/)|(?:work|Users|mnt|media)/)\w",
}


def modules(room: Path) -> list[Path]:
    """Every module below a folder."""
    return sorted(room.rglob("*.py"))


def ours() -> list[Path]:
    return [file for name in OURS for file in modules(CHECKOUT / name)]


def dotted(file: Path) -> str:
    """A module's full name; a package's is that of its `__init__`."""
    return ".".join(file.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> frozenset[str]:
    """Top-level names of everything that a file imports, functions' imports included."""
    found: list[str] = []
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.append(str(node.module))
    return frozenset(name.partition(".")[0] for name in found)


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
    """And in every one of its homes: the table tells what is."""
    users = {dotted(file) for file in ours() if library in imports(file)}
    homes = {user: home for user in users for home in HOMES[library] if f"{user}.".startswith(f"{home}.")}
    assert users - homes.keys() == set()
    assert set(homes.values()) == HOMES[library]


def test_stages_and_datasets_know_neither_each_other_nor_the_pipeline():
    for name in ("stages", "datasets"):
        for file in modules(CHECKOUT / name):
            assert OURS.keys() & imports(file) <= {name, "settings"}, file


def test_rooms_that_answer_at_once_import_nothing_heavy():
    """One module after the other, so that the first that brings such a library is named."""
    names = [dotted(file) for room in AT_ONCE for file in modules(CHECKOUT / room.replace(".", "/"))]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    if found := {HEAVY} & set(sys.modules):
        sys.exit(f"{{name}} imports {{found}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_nodes_read_lies_in_a_package():
    """With `cluster.code=sent` each package lands in a folder of its own: only the driver composes confs."""
    above = {dotted(file) for file in ours() if re.search(r"__file__\)\.(?:parents|parent\.parent)", file.read_text())}
    assert above == {"pipeline.settings.compose"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (  # tasks of the data's steps: of these, and so of the board, there is a process for each CPU
            ["pipeline.cluster.board", "pipeline.cluster.slots", "pipeline.steps.fetch", "pipeline.steps.download"],
            ["torch", "ray.train", "ray.data", "mlflow"],
        ),
        (["pipeline.cluster.ranks.meeting"], ["torch"]),  # by Ray's process beside each training
        (["pipeline.verbs.run", "pipeline.cluster.ray_cluster"], ["torch"]),  # by the driver, which may train nothing
        (["stages.weights.card", "pipeline.steps.export"], ["torch", "torchvision", "open_clip"]),  # by the driver
    ],
)
def test_processes_import_nothing_that_others_need(modules, heavy):
    code = f"import sys, {', '.join(modules)}; sys.exit(str(set({heavy}) & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


# ------------------------------------------------------------------------------------------------- sizes and rooms


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{dotted(file)}.{node.name}": node.end_lineno - node.lineno + 1
        for file in ours()
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_no_module_is_longer_than_a_sitting():
    lengths = {dotted(file): len(file.read_text().splitlines()) for file in ours()}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE} == {}


def test_every_room_says_what_lives_there_and_is_seen_at_a_glance():
    rooms = {file.parent for file in ours()}
    silent = [room for room in rooms if not ast.get_docstring(parsed(room / "__init__.py"))]
    assert silent == []
    sizes = {dotted(room): len([*room.glob("*.py")]) - 1 for room in rooms}
    assert {name: size for name, size in sizes.items() if size > LARGEST_ROOM} == {}


# ----------------------------------------------------------------------------------------------------------- names


def said(file: Path) -> Iterator[str]:
    """What no interpreter and no linter reads: strings and comments of a Python file, all of another one."""
    text = file.read_text()
    if file.suffix != ".py":
        yield text
        return
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def full_names(text: str) -> Iterator[str]:
    """Names such as `stages.sampling.sample.draw` in a text, and those that its import lines ask for."""
    for match in re.finditer(r"(?<![\w./-])(?:pipeline|stages|datasets)(?:\.[A-Za-z_]\w*)+", text):
        yield match[0]
    for match in re.finditer(r"\bfrom ((?:pipeline|stages|datasets)[\w.]*) import (\w+(?:, \w+)*)", text):
        yield from (f"{match[1]}.{name}" for name in match[2].split(", "))


@cache
def defined(file: Path) -> frozenset[str]:
    """Every name that a module defines or imports, methods and local names included."""
    names: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return frozenset(names)


def is_there(name: str) -> bool:
    """Whether a full name is that of a room, of a module, or of something that a module defines."""
    place, *rest = CHECKOUT, *name.split(".")
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    module = rest and (place / f"{rest[0]}.py").is_file()
    file = place / (f"{rest.pop(0)}.py" if module else "__init__.py")
    return not rest or rest[0] in defined(file)


def stale_names(file: Path) -> set[str]:
    """What a file calls by a full name that nothing has; in Python code it may be a variable's attribute."""
    stale = {name for name in full_names(file.read_text()) if not is_there(name)}
    return stale and stale & {name for text in said(file) for name in full_names(text)}


def test_a_full_name_is_that_of_something():
    """In docstrings, in the programs that tests start, in Markdown: where a move leaves stale names behind."""
    texts = {".py", ".md", ".toml", ".yaml", ".yml", ".sh"}
    wrong = {
        str(file.relative_to(CHECKOUT)): names
        for file in tracked()
        if file.suffix in texts and file.name != "CHANGELOG.md"  # which tells of the past
        if (names := sorted(stale_names(file)))
    }
    assert wrong == {}


def test_stale_names_are_found():
    stale = ["stages" + ".sampling.sample.paint", "pipeline" + ".ledger", "pipeline" + ".ledger.Writer"]
    text = f"`{stale[0]}`, `stages.sampling.sample.draw`\nfrom {stale[1]} import Writer"
    assert [name for name in full_names(text) if not is_there(name)] == stale


# ----------------------------------------------------------------------------------------------------------- files


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
