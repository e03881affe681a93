"""`study` on pictures that are there: a page that tells nobody whose they are, a key in the root, one sentence each for
what cannot be."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.verbs.study import page
from tests.pipeline.models.test_encoders import WORDS
from tests.pipeline.steps.test_evaluate import SIDE, files, prepared, words

__all__ = ["files"]


@pytest.fixture
def drawn(files, tmp_path) -> Path:
    """A root with our pictures of a prompt set, level 150, and a rival outside, levels 100 and 200."""
    prepared(tmp_path / "root", *words(files))
    return tmp_path


def built(folder: Path, *more: str) -> tuple[int, Path]:
    file = folder / "page.html"
    common = ["conf=stage_c", *WORDS, f"root={folder}/root", f"out={file}"]
    return main(["study", "build", *common, *more]), file


def test_a_page_holds_the_pairs_and_the_root_the_key(drawn, files, capsys):
    code, file = built(drawn, *words(files), "n=20", "--json")
    said = capsys.readouterr()
    assert code == 0, said.err
    document = json.loads(said.out)
    assert document["of"] == [{"set": "mine", "rival": "other", "pairs": 20}]
    (key_file,) = (drawn / "root/studies").iterdir()
    key = json.loads(key_file.read_text())
    assert key_file.stem == key["study"] == document["study"]
    data = json.loads(re.search(r'id="study">(.*?)</script>', file.read_text())[1])
    assert data["study"] == key["study"]
    assert [pair["id"] for pair in data["pairs"]] == [*key["pairs"]]
    assert all(pair.keys() == {"id", "prompt", "a", "b"} for pair in data["pairs"])
    for pair in data["pairs"]:
        about = key["pairs"][pair["id"]]
        levels = {side: decoded(pair[side]).mean() for side in ("a", "b")}
        if about["ours"] == "both":
            assert pair["a"] == pair["b"]
            continue
        number = int(pair["prompt"].removeprefix("prompt "))
        other = {"a": "b", "b": "a"}[about["ours"]]
        assert levels == pytest.approx({about["ours"]: 150, other: 100 if number < 70 else 200}, abs=1)
    sides = {about["ours"] for about in key["pairs"].values()}
    assert sides == {"a", "b", "both"}


def decoded(address: str) -> np.ndarray:
    head, _, content = address.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert not picture.getexif()
        assert "comment" not in picture.info
        return np.asarray(picture)


def test_nothing_in_a_page_tells_whose_the_pictures_are_or_asks_a_server(drawn, files):
    code, file = built(drawn, *words(files), "n=3")
    text = re.sub(r'"data:image/jpeg;base64,[^"]*"', "", file.read_text())
    assert code == 0
    for told in ("other", "mine", "ours", "rival", "null", "original", "rstchen", "stage_c", "conf", "score", "model"):
        if told in ("other", "null"):  # words of the script
            told = f'"{told}"'
        assert told not in text.lower().replace("configur", ""), told
    assert not re.search(r"https?:|//[a-z]|src=[^d]|@import|url\(", text.replace("// ", ""))
    assert "default-src 'none'" in text


def test_prompts_may_hold_anything():
    nasty = '</script><script>alert(1)</script> "quoted" & ümlaut \u2028 {{STUDY}}'
    content = page.html("s", [{"id": "p", "prompt": nasty, "a": "", "b": ""}]).decode()
    data = re.search(r'id="study">(.*?)</script>', content)[1]
    assert json.loads(data)["pairs"][0]["prompt"] == nasty


def test_a_rival_in_another_size_is_shown_in_ours(files, tmp_path):
    for picture in (files / "rival").iterdir():
        Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(picture)
    prepared(tmp_path / "root", *words(files))
    code, file = built(tmp_path, *words(files), "n=2")
    assert code == 0
    data = json.loads(re.search(r'id="study">(.*?)</script>', file.read_text())[1])
    assert {decoded(pair[side]).shape for pair in data["pairs"] for side in "ab"} == {(SIDE, SIDE, 3)}


def test_without_rivals_it_is_the_originals(tmp_path, capsys):
    prepared(tmp_path / "root", "targets=[scores]")
    code, _ = built(tmp_path)
    assert code == 0
    assert "4 pairs: ours and original, prompts training" in capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    code = main(["study", *map(str, arguments)])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "study needs one of: build conf=NAME out=FILE.html, tally FILE..."),
        (["count"], "study needs one of"),
        (["build", "more"], "study needs one of"),
        (["build", "conf=stage_c"], "study build needs out=FILE.html"),
        (["build", "conf=stage_c", "out=page.txt"], "out=page.txt: the page is an HTML file"),
        (
            ["build", "conf=stage_c", "out=p.html", "n=0"],
            "n=0: how many pairs the page shows; give a number from 1 to 1000",
        ),
        (["build", "conf=stage_c", "out=p.html", "n=many"], "n=many"),
        (["build", "conf=stage_c", "out=p.html", "n=²"], "n=²"),
        (["build", "out=p.html"], "study needs conf=NAME"),
        (["tally"], "study tally needs the files that raters sent"),
        (["tally", "nothing.csv"], "nothing.csv: cannot be read"),
        (["tally", "f.csv", "conf=stage_c"], "study tally takes files, root= and --json alone"),
    ],
)
def test_words_that_cannot_be_are_refused_in_a_sentence(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_pictures_it_says_how_to_draw_them(tmp_path, capsys):
    said = refused(capsys, "build", "conf=stage_c", "scale=micro", f"root={tmp_path}/root", f"out={tmp_path}/p.html")
    assert "has no samples of exactly this conf" in said
    assert "build it with: python -m pipeline run conf=stage_c" in said


def test_prompts_without_originals_need_a_rival(files, tmp_path, capsys):
    asked = ["targets=[scores]", f"eval.prompts.mine={files}/mine.tsv"]
    prepared(tmp_path / "root", *asked)
    common = ["conf=stage_c", *WORDS, f"root={tmp_path}/root", f"out={tmp_path}/p.html", *asked]
    said = refused(capsys, "build", *common)
    assert "eval.rivals: there is nobody to compare with on mine" in said


def test_a_page_that_cannot_be_written_leaves_no_key(drawn, files, capsys):
    (drawn / "page.html").mkdir()
    code, _ = built(drawn, *words(files))
    assert code == 2
    assert f"out={drawn}/page.html: cannot be written" in capsys.readouterr().err
    assert list((drawn / "root/studies").iterdir()) == []


def test_answers_of_studies_that_the_root_does_not_know_are_refused_or_left_out(drawn, files, tmp_path, capsys):
    assert built(drawn, *words(files), "n=3")[0] == 0
    capsys.readouterr()
    (key_file,) = (drawn / "root/studies").iterdir()
    pair = next(iter(json.loads(key_file.read_text())["pairs"]))
    header = "study,rater,pair,left,chosen,answered\n"
    (tmp_path / "theirs.csv").write_text(header + f"{'0' * 16},r,{pair},a,a,2026\n" * 2)
    (tmp_path / "ours.csv").write_text(header + f"{key_file.stem},r,{pair},a,neither,2026\n")
    root = f"root={drawn}/root"
    assert f"has no key of the study {'0' * 16}" in refused(capsys, "tally", tmp_path / "theirs.csv", root)
    assert main(["study", "tally", str(tmp_path / "theirs.csv"), str(tmp_path / "ours.csv"), root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"of another study": 2}
    assert built(drawn, *words(files), "n=3")[0] == 0
    capsys.readouterr()
    (other,) = (file for file in (drawn / "root/studies").iterdir() if file != key_file)
    (tmp_path / "second.csv").write_text(header + f"{other.stem},r,p,a,a,2026\n")
    said = refused(capsys, "tally", tmp_path / "ours.csv", tmp_path / "second.csv", root)
    assert "the files hold answers of the studies" in said
