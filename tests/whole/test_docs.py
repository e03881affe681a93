"""The documentation: its commands parse and compose, what it names is there, and the imports of its snippets resolve.

No command is run at full length: `run` becomes `plan`, on a root that does not exist yet; verbs that want what a run
has made are tried there too, and may lack nothing else. Placeholders such as DIR stand for small real files.
"""

import ast
import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import tarfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import BaseModel

from datasets.formats.shards import Receipt
from pipeline.__main__ import main
from pipeline.cluster.interruptions import Interruptions
from pipeline.models import known_weights
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.words import VERBS, Words, parse, usage
from pipeline.steps.build import Facts
from pipeline.store.artifacts import Fingerprint
from pipeline.store.claims import Owner
from pipeline.store.ledger import Writer
from pipeline.store.process import ProcessId
from pipeline.store.provenance import provenance
from pipeline.store.removals import Removals
from pipeline.verbs.sample import Request

CHECKOUT = Path(__file__).parents[2]
REFERENCE = CHECKOUT / "docs" / "reference"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"``(.+?)``|`([^`\n]+)`")  # inline code
COMMAND = re.compile(r"python -m pipeline( .*)?$")
GRAMMAR = "VERB conf=NAME [key=value ...] [flags]"
MAKE = re.compile(r"(?:^|\W)make((?: [A-Z]+=\S+)*(?: [a-z][a-z-]*)+)")
PATH = re.compile(
    r"(?:pipeline|stages|datasets|conf|infra|docs|tests|\.ci)/[\w./<>*-]*|[A-Z]+\.md|Makefile|\w+\.(?:toml|lock)"
)
MODULE = re.compile(r"(?:pipeline|stages|datasets)(?:\.\w+)+")
KEY = re.compile(rf"((?:{'|'.join(Config.model_fields)})(?:\.\w+)+)(?:[=:].*)?")
SUFFIXES = ("py", "md", "json", "jsonl", "yaml", "parquet", "safetensors", "png", "log")
LAION = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE")
WANTS_A_RUN = ("show", "sample", "export", "data", "report", "study")  # verbs that need what a run has made


@dataclass(frozen=True)
class Doc:
    """A Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(CHECKOUT))

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """Its fenced blocks: language and content."""
        return FENCE.findall(self.path.read_text(encoding="utf-8"))

    @property
    def prose(self) -> str:
        """All but those."""
        return FENCE.sub("", self.path.read_text(encoding="utf-8"))

    @property
    def spans(self) -> list[str]:
        """Its inline code."""
        return [(one or two).strip() for one, two in SPAN.findall(self.prose)]

    @property
    def lines(self) -> list[str]:
        """The lines of its blocks, those that go on joined, and its inline code."""
        blocks = [content.replace("\\\n", " ").splitlines() for _, content in self.blocks]
        return [line for block in blocks for line in block] + self.spans

    @property
    def anchors(self) -> set[str]:
        """Those of its headings, as GitHub makes them."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def docs() -> tuple[Doc, ...]:
    """Every document of the checkout."""
    roots = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "infra/README.md")]
    return tuple(Doc(path) for path in [*roots, *sorted((CHECKOUT / "docs").rglob("*.md"))])


def commands() -> list[str]:
    """What stands after `python -m pipeline` anywhere, each once."""
    found = (COMMAND.search(line) for doc in docs() for line in doc.lines)
    return list(dict.fromkeys((match[1] or "").strip() for match in found if match))


def blocks(language: str) -> Iterator[tuple[Doc, str]]:
    return ((doc, content) for doc in docs() for name, content in doc.blocks if name == language)


def each_document() -> Any:
    return pytest.mark.parametrize("doc", docs(), ids=lambda doc: doc.name)


# ---------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: the tutorial's pictures and conf, and a file for each placeholder."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (drawing,) = (content for _, content in blocks("python") if 'Path("my_pictures")' in content)
        exec(drawing, {})
    (folder / "DIR").mkdir()
    Image.new("RGB", (1024, 1024), "red").save(folder / "DIR/x.png")  # as large as any conf takes
    (folder / "DIR/x.txt").write_text("a red square")
    coco = {"images": [{"id": 1, "file_name": "x.png", "coco_url": "http://a.invalid/x.png"}], "annotations": []}
    (folder / "DIR/captions_1.json").write_text(json.dumps(coco))
    with tarfile.open(folder / "DIR/0.tar", "w") as tar:
        for file in ("x.png", "x.txt"):
            tar.add(folder / "DIR" / file, file)
    (folder / "DIR/prompts.csv").write_text("file,prompt\nx.png,a red square\n")
    (folder / "PartiPrompts.tsv").write_text("Prompt\tCategory\na red square\tAbstract\n")
    (folder / "captions_val2014.json").write_text('{"annotations": [{"caption": "a red square"}]}')
    (folder / "coco.jsonl").write_text('{"caption": "In this image there is a red square."}\n')
    (folder / "PICTURE").write_bytes((folder / "DIR/x.png").read_bytes())
    (folder / "FILE").write_bytes(b"\x80weights")  # as a file of torch may begin
    (folder / "LIST").write_text(f"{'0' * 32}\nhttps://example.org/a.jpg\n")
    pq.write_table(pa.table({name: ["0"] for name in LAION}), folder / "laion.parquet")
    for file in sorted((CHECKOUT / "conf").rglob("*.yaml")):
        copy = folder / file.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for _, content in blocks("yaml"):
        (folder / content.partition("\n")[0].removeprefix("# ")).write_text(content)
    return folder


def test_the_documents_have_commands_of_every_verb():
    words = [split(command) for command in commands()]
    assert VERBS.keys() <= {line[0] for line in words if line}
    assert all(f"conf={name}" in str(words) for name in set(compose.names()) - {"stage_a", "stage_b", "release"})


@pytest.mark.parametrize("command", [command for command in commands() if command not in ("", GRAMMAR)])
def test_a_command_parses_and_its_config_composes(command, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(compose, "CONF", place / "conf")
    monkeypatch.setattr(compose, "compose", lambda conf, overrides: composed(conf, tuple(overrides)))
    root = tmp_path / "root"
    words = split(command)
    if words[0] not in VERBS:  # --help, --version
        assert main(words) == 0
        return
    asked = parse(words)
    tried = rehearsed([stand_in(word, root) for word in words], asked)
    if tried is None:
        return
    code = main([*tried, *([] if f"root={root}" in tried else [f"root={root}"])])
    said = capsys.readouterr().err
    if asked.own.get("from") == "release":
        assert "release/sampling.json is missing" in said
    elif asked.verb == "logs":
        assert code == 2, said
        assert "nothing has been run there yet" in said
    elif (asked.verb in WANTS_A_RUN or "=run=" in command) and asked.rest not in (["dedup"], ["forget"], ["hours"]):
        assert code == 2, said
        assert re.search("of exactly this conf|has no finished artifact of this conf|has no run of that ID", said), said
    else:
        assert code == 0, said
    stops = [line for line in said.splitlines() if line.startswith("a run would stop at once")]
    assert not [line for line in stops if not re.search(r"weights|interpolate\.", line)]
    assert not root.exists() or asked.yes or asked.rest == ["forget"]


compose_anew = compose.compose


@cache
def composed(conf: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A composed config, each once: many commands have the same."""
    return compose_anew(conf, list(overrides))


def split(command: str) -> list[str]:
    """Its words, without where its output goes and without comments."""
    return shlex.split(command.partition(" > ")[0], comments=True)


def stand_in(word: str, root: Path) -> str:
    """A word with something real and near for what it names: conf, root, metadata, keys."""
    near = {
        "root": str(root),
        **dict.fromkeys(("data.metadata", "data.recaps.dense.path"), "laion.parquet"),
        "keys": "0" * 32,
    }
    near |= {"KEY": "0" * 32, "conf=NAME": "conf=stage_c"}
    key, separator, _ = word.partition("=")
    word = word.replace("metadata: /data/laion", f"metadata: {near['data.metadata']}")  # of a source among several
    return near.get(word) or (f"{key}={near[key]}" if separator and key in near else word)


def rehearsed(words: list[str], asked: Words) -> list[str] | None:
    """The nearest thing to a command that starts nothing; None where nothing is left to try."""
    plain = [word for word in words[1:] if "=" in word and not word.startswith("from=")]
    match asked.verb, asked.rest:
        case "run", _:
            return ["plan", *words[1:]]
        case (("doctor" | "import"), _):
            return ["config", *plain] if asked.conf else None
        case "data", ["dedup"]:
            return ["plan", *plain, "targets=[duplicates]"]
        case "infra", ["render"]:
            return ["plan", *(word for word in plain if not re.match(r"out=|.*\.weights=s3:", word))]
        case "weights", ["get" | "verify", *names]:
            assert all(known_weights.named(name) for name in names)
            return None
        case "ui", _:
            assert asked.own.get("port", "0").isdigit()
            return None
        case "study", ["tally", *files]:
            assert files
            return None
        case "sample", _:
            assert Request.model_validate({k: v for k, v in asked.own.items() if k in Request.model_fields}).out
    return words


# ----------------------------------------------------------------------------------------- what the documents name


@each_document()
def test_what_a_document_links_to_is_there(doc):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", doc.prose):
        path, _, anchor = target.partition("#")
        file = (doc.path.parent / path).resolve() if path else doc.path
        if not re.match(r"https?:", target) and not (file.exists() and (not anchor or anchor in Doc(file).anchors)):
            broken.append(target)
    assert broken == []


def test_the_help_names_documents_that_are_there():
    named = re.findall(r"[\w/]+\.md", usage())
    assert named
    assert all((CHECKOUT / name).is_file() for name in named)


@each_document()
def test_the_files_and_modules_that_a_document_names_are_there(doc):
    words = doc.spans + [word for language, text in doc.blocks if language == "" for word in text.split()]
    paths = {word for word in words if PATH.fullmatch(word)}
    missing = {word for word in paths if not any(CHECKOUT.glob(re.sub("<[^>]*>", "*", word).rstrip("/")))}
    missing |= {span for span in doc.spans if MODULE.fullmatch(span) and not defined(span)}
    assert missing == set()


def defined(dotted: str) -> bool:
    """Whether a dotted name is a package or a module of ours, or something that a module defines."""
    path = CHECKOUT / dotted.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    return (
        module.is_file()
        and re.search(rf"^(?:def|class) {path.name}\b|^{path.name}\b", module.read_text(), re.M) is not None
    )


@each_document()
def test_the_keys_that_a_document_names_are_keys_of_the_config(doc):
    named = {match[1] for span in doc.spans for word in span.split() if (match := KEY.fullmatch(word))}
    unknown = {key for key in named if key.rpartition(".")[2] not in SUFFIXES and not is_key(Config, key.split("."))}
    assert unknown == set()


def is_key(kind: Any, parts: list[str]) -> bool:
    """Whether there is something below a type at a path of names."""
    if not parts:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(parts[0])
        return field is not None and is_key(field.annotation, parts[1:])
    if get_origin(kind) in (Union, types.UnionType, Annotated):
        return any(is_key(option, parts) for option in get_args(kind))
    if get_origin(kind) is dict:
        return is_key(get_args(kind)[1], parts[1:])
    return get_origin(kind) is tuple and parts[0].isdigit() and is_key(get_args(kind)[0], parts[1:])


@each_document()
def test_the_make_targets_that_a_document_names_exist(doc):
    targets = set(re.findall(r"^([a-z-]+):.*?## ", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.partition("#")[0] for line in doc.lines]
    named = {word for line in lines for words in MAKE.findall(line) for word in words.split() if "=" not in word}
    assert named <= targets


def test_each_procedure_of_the_runbook_names_its_test_or_says_that_none_does():
    text = (CHECKOUT / "docs/guides/operating.md").read_text().partition("## Runbook")[2].partition("\n## ")[0]
    tests = "".join(path.read_text() for path in (CHECKOUT / "tests").rglob("test_*.py"))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for what, _, costs, named in rows:
        found = re.findall(r"`(test_\w+)`", named)
        assert costs
        assert found or named.startswith("not one: "), what
        assert all(re.search(rf"^def {name}\(", tests, re.MULTILINE) for name in found), named


def test_the_commits_that_contributing_names_are_in_the_history():
    named = re.findall(r"^- `([0-9a-f]{7})`", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"], cwd=CHECKOUT, capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("no git, or only a part of the history")
    for commit in named:
        subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=CHECKOUT, check=True)
    assert len(named) >= 6


# ----------------------------------------------------------------------------------------------------- snippets


@pytest.mark.parametrize(("doc", "content"), list(blocks("python")), ids=lambda value: getattr(value, "name", ""))
def test_a_snippet_compiles_and_its_imports_resolve(doc, content):
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


# ---------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("verb", VERBS)
def test_every_word_and_flag_of_a_verb_is_in_the_reference(verb):
    sections = re.split(r"^## ", (REFERENCE / "verbs.md").read_text(), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.partition("\n")[0] == verb)
    wanted = [*(f"{word}=" for word in VERBS[verb].words), *VERBS[verb].flags]
    assert [word for word in wanted if not re.search(rf"`[^`]*{word}", section)] == []


def fields_of(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("title", "wanted"),
    [
        ("manifest.json", fields_of(Facts, Fingerprint, ProcessId) | set(provenance("run"))),
        ("Receipts", fields_of(Receipt)),
        ("building/", fields_of(Interruptions)),
        ("Claims", fields_of(Owner, ProcessId) - {"process"}),
        ("forgotten.json", fields_of(Removals)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_of_a_file_is_in_the_reference(title, wanted):
    sections = re.split(r"^## ", (REFERENCE / "artifacts.md").read_text(), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.partition("\n")[0] == title)
    assert wanted <= set(re.findall(r"`(\w+)`", section))


def test_every_field_of_an_event_of_the_ledger_is_in_the_reference(tmp_path):
    with Writer(str(tmp_path), "run", heartbeat_s=0.01).lease("train_c", "0" * 16, 1, "cpu"):
        while "heartbeat" not in (tmp_path / "ledger/run.jsonl").read_text():
            pass
    events = [json.loads(line) for line in (tmp_path / "ledger/run.jsonl").read_text().splitlines()]
    wanted = {event["event"] for event in events} | {name for event in events for name in event}
    assert wanted <= set(re.findall(r"`(\w+)`", (REFERENCE / "ledger.md").read_text()))
