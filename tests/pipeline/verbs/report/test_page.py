"""The page: every figure is its table's, what it quotes is inert, nothing comes from elsewhere."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datasets.files import storage
from pipeline.settings.words import parse
from pipeline.store.ledger import read
from pipeline.verbs.report import command, page
from tests.experiment import RUN, SKIPPED, Experiment, experiment

ADDRESSES = ("href", "src", "action", "data", "srcset", "poster", "xlink:href")


class Parsed(HTMLParser):
    """Tags, the rows of each table by its id, and every address that a browser would open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.pictures: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str]]]] = {}  # text and data-value of each cell
        self._table, self._cell = "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = {key: value or "" for key, value in attributes}
        self.tags.add(tag)
        assert not [key for key in told if key.startswith("on")]
        self.addresses += [told[key] for key in ADDRESSES if key in told]
        if tag == "img":
            self.pictures.append(told["src"])
        if tag == "table":
            self._table = told.get("id", "")
            self.tables.setdefault(self._table, [])
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append(("", told.get("data-value", "")))
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            text, value = self.tables[self._table][-1][-1]
            self.tables[self._table][-1][-1] = (text + data, value)


def made(words: list[str], root: str, out: Path) -> tuple[str, dict[str, Any]]:
    command.handle(parse(["report", *words, f"root={root}", f"out={out}"]))
    return out.read_text("utf-8"), json.loads(out.with_suffix(".json").read_text("utf-8"))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("root")
    of = experiment(root)
    return of, *made([f"run={RUN}"], of.root, root / "report.html")


def test_it_loads_nothing_and_runs_nothing(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    _, html, _ = told
    parsed = Parsed(html)
    assert not parsed.tags & {"script", "iframe", "link", "object", "embed", "form", "base"}
    assert all(address.startswith(("data:image/jpeg;", "#")) for address in parsed.addresses)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert") > 6  # the captions, as text
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html
    assert len(html) < 5_000_000


def test_every_score_is_the_one_that_was_measured(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    of, html, document = told
    measured = of.artifacts["scores"].manifest["metrics"]
    header, *rows = Parsed(html).tables["metrics"]
    assert [text for text, _ in header] == ["metric", "value", "run before", "n", "of", "what it is"]
    shown = {row[0][0]: row for row in rows}
    assert shown.keys() == {name for name in measured if "/" not in name and not name.startswith("n_")}
    for name, row in shown.items():
        assert float(row[1][1]) == measured[name]
        assert row[1][0] == page.figure(measured[name])
        assert int(row[3][1]) == measured["n_heldout" if name.endswith("_heldout") else "n_training"] == 3
    _, *wins = Parsed(html).tables["wins"]
    lines = {(line["rival"], line["set"]): line for line in json.loads(of.artifacts["scores"].read("tables.json"))}
    assert [row[0][0] for row in wins] == ["over baseline", "same model, other seed"]
    for row, rival in zip(wins, ("baseline", "null"), strict=True):
        for cell, prompts in zip(row[2:], ("training", "held_out"), strict=True):
            assert float(cell[1]) == lines[rival, prompts]["rate"]
            assert f"{100 * lines[rival, prompts]['rate']:.1f} %" in cell[0]
            assert "n 3" in cell[0]
    assert json.loads(json.dumps(document["scores"]["metrics"])) == document["scores"]["metrics"]


def test_distances_and_times_are_those_that_were_measured(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    of, html, document = told
    apart, timed = (json.loads(of.artifacts["scores"].read(name)) for name in ("distances.json", "speed.json"))
    assert (document["scores"]["distances"], document["scores"]["speed"]) == (apart, timed)
    tables = Parsed(html).tables
    header, *rows = tables["distances"]
    assert [text for text, _ in header][-3:] == ["FD:1A2B3C4D", "KD:1A2B3C4D x 1000", "IS:1A2B3C4D"]
    assert [row[0][0] for row in rows] == ["ours", "same model, other seed", "ours", "ours"]
    for line, row in zip(apart, rows, strict=True):  # none of the paper's, which is of the published Inception
        shown = dict(zip(("n", "n_real", "fid", "kid", "inception_score"), row[3:], strict=True))
        for name, (text, value) in shown.items():
            assert value == ("" if line[name] is None else str(line[name])), name
            assert line[name] is not None or text == "too few"
        assert row[6][0] == "{:.2f} [{:.2f}, {:.2f}]".format(*(1000 * line[k] for k in ("kid", "kid_low", "kid_high")))
    _, *rows = tables["speed"]
    for line, row in zip(timed, rows, strict=True):
        parts = [line[stage] for stage in ("stage_c", "stage_b", "stage_a")]
        assert [float(value) for _, value in row[1:6]] == [line["batch"], *parts, sum(parts)]
        assert (row[0][0], row[6][0], row[7][0]) == (line["mode"], line["device"], line["precision"])


def test_hours_and_funnel_are_those_of_ledger_and_manifests(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    of, html, document = told
    tables = Parsed(html).tables
    _, *rows, last = tables["hours"]
    hours = {row[0][0].split()[0]: float(row[1][1]) for row in rows}
    leases, _ = read(of.root)
    held = sum(sum(lease.phases.values()) for lease in leases) / 3600
    assert float(last[1][1]) == pytest.approx(held)
    assert sum(float(row[1][1]) for row in rows) == pytest.approx(held)
    assert set(hours) == {artifact.manifest["step"] for artifact in of.artifacts.values()}
    assert {row[-1][0] for row in rows} == {"cpu", "cuda:NVIDIA A100"}
    funnel = [(row[0][0], float(row[1][1])) for row in tables["funnel"][1:]]
    assert funnel == [("read", 20), ("planned", 16), ("kept", 16)]
    assert "url 4" in tables["funnel"][2][3][0]
    assert document["data"]["held_out"] == 2


def test_the_margins_are_told_best_first(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    _, html, document = told
    held, training = document["comparisons"]
    assert (held["set"], training["set"]) == ("held_out", "training")
    (margin,) = held["margins"]
    assert [row["margin"] for row in margin["best"]] == [1, 1]
    assert [row["margin"] for row in margin["worst"]] == [-1]
    assert (margin["scorer"], margin["rival"], margin["n"]) == ("psnr", "baseline", 3)
    assert margin["worst"][0]["pictures"].keys() == {"original", "score", "rival_baseline"}
    assert "+1" in html


def test_its_pictures_are_those_of_the_artifacts(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    _, html, _ = told
    shades = set()
    for uri in Parsed(html).pictures:
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            shades.add(round(picture.getpixel((0, 0))[0] / 40))
    assert shades == {0, 1, 2, 3, 5}  # the original, Stage A, Stages B + A, ours, the baseline's


def test_the_config_is_compared_with_the_run_before(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    _, html, document = told
    assert document["config"]["changes"] == [{"key": "stage_c.train.learning_rate", "before": 1e-4, "now": 2e-4}]
    shown = [text for text, _ in Parsed(html).tables["changes"][1]]
    assert shown == ["stage_c.train.learning_rate", "0.0001", "0.0002"]


def test_the_verdict_says_no_more_than_the_figures_bear(told: tuple[Experiment, str, dict[str, Any]]) -> None:
    _, html, document = told
    said = " ".join(document["verdict"]["sentences"])
    assert "psnr cannot tell ours from baseline: ours wins 66.7 % of 3 prompts of held_out" in said
    assert "against itself with another seed it wins 50.0 %" in said
    assert "Of 3 captions that it was trained on, 3 pictures are nearest to their own original" in said
    assert "1 picture is nearest to its own among 6 originals" in said
    assert "no more than chance can give" in said
    assert document["verdict"]["headline"] in html.replace("&#39;", "'")


def test_what_a_training_left_out_is_told(tmp_path: Path) -> None:
    of = Experiment(tmp_path)
    of.data(SKIPPED)
    of.record()
    html, _ = made([f"run={RUN}"], of.root, tmp_path / "page.html")
    assert html.count("left out: ") == html.count("left out: 2 bad steps, 4 pictures<") == 1


@pytest.mark.parametrize("what", ["record", "data", "drawn"])
def test_what_is_missing_is_said(tmp_path: Path, what: str) -> None:
    """A run that failed at once, one that has trained, one without scores: each is told as far as it came."""
    of = Experiment(tmp_path)
    if what != "record":
        of.data()
    if what == "drawn":
        of.drawn()
        storage.remove(f"{of.artifacts['scores'].path}/manifest.json")
    of.record(outcome="UsageError: <b>no</b> pictures", fingerprints={"images": "0" * 16, "scores": "1" * 16})
    html, document = made([f"run={RUN[-4:]}"], of.root, tmp_path / "out" / "page.html")
    assert document["verdict"]["headline"] == "Not finished: UsageError: <b>no</b> pictures"
    assert "&lt;b&gt;no&lt;/b&gt;" in html
    assert "not there: " in html
    assert any("scores" in sentence for sentence in document["missing"])
    assert "there is no MLflow store" in html
    assert ("Nothing was drawn yet" in html) == (what != "drawn")
    assert "report.json" not in html, "whose name is page.json here; MLflow's copies have another"


def test_a_lost_picture_is_a_gap_and_no_error(tmp_path: Path) -> None:
    of = experiment(tmp_path)
    for file in (Path(of.artifacts["samples"].path) / "generated").iterdir():
        file.write_bytes(b"damaged")
    html, _ = made([f"run={RUN}"], of.root, tmp_path / "page.html")
    assert html.count("no picture") >= 3


def test_figures_for_people() -> None:
    assert [page.figure(value) for value in (None, 0.984375, 64.0, 26.312, 123456.7, 3)] == [
        "–", "0.9844", "64", "26.31", "123,457", "3",
    ]  # fmt: skip
    assert [page.hours(value) for value in (0.01234, 1.234, 24602.0)] == ["0.0123", "1.23", "24,602.0"]
    assert [page.size(value) for value in (12, 2048, 3 * 2**30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
