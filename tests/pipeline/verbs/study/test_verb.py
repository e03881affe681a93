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
from tests.pipeline.in_process import WORDS, Root
from tests.pipeline.steps.test_evaluate import SIDE, captions, flat, prepared, put


def built(file: Path, *words: str) -> tuple[int, dict]:
    """Build a page; its exit code, and the key that came with it."""
    root = next(Path(word.removeprefix("root=")) for word in words if word.startswith("root="))
    before = set((root / "studies").glob("*"))
    code = main(["study", "build", f"out={file}", *words])
    keys = set((root / "studies").glob("*")) - before
    return code, json.loads(keys.pop().read_text()) if keys else {}


def data_of(file: Path) -> dict:
    found = re.search(r'id="study">(.*?)</script>', file.read_text())
    assert found
    return json.loads(found[1])


def test_a_page_holds_the_pairs_and_the_root_the_key(words, tmp_path, capsys):
    file = tmp_path / "page.html"
    code, key = built(file, *words, "n=20", "--json")
    said = capsys.readouterr()
    assert code == 0, said.err
    document = json.loads(said.out)
    assert document["of"] == [{"set": "mine", "rival": "other", "pairs": 20}]
    data = data_of(file)
    assert data["study"] == key["study"] == document["study"]
    assert [pair["id"] for pair in data["pairs"]] == [*key["pairs"]]
    assert all(pair.keys() == {"id", "prompt", "a", "b"} for pair in data["pairs"])
    for pair in data["pairs"]:
        ours = key["pairs"][pair["id"]]["ours"]
        levels = {side: decoded(pair[side]).mean() for side in ("a", "b")}
        if ours == "both":
            assert pair["a"] == pair["b"]
            continue
        number = int(pair["prompt"].removeprefix("prompt "))
        assert levels == pytest.approx({ours: 150, {"a": "b", "b": "a"}[ours]: 200 if number % 3 else 100}, abs=1)
    assert {pair["ours"] for pair in key["pairs"].values()} == {"a", "b", "both"}


def decoded(address: str) -> np.ndarray:
    head, _, content = address.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert not picture.getexif()
        assert "comment" not in picture.info
        return np.asarray(picture)


def test_nothing_in_a_page_tells_whose_the_pictures_are_or_asks_a_server(words, tmp_path):
    assert built(tmp_path / "page.html", *words, "n=3")[0] == 0
    text = re.sub(r'"data:image/jpeg;base64,[^"]*"', "", (tmp_path / "page.html").read_text())
    telling = ["mine", "ours", "rival", '"other"', '"null"', "original", "rstchen", "stage_c", "conf", "score", "model"]
    assert [word for word in telling if word in text.lower()] == []
    assert not re.search(r"https?:|src=|@import|url\(", text)
    assert "default-src 'none'" in text


def test_prompts_may_hold_anything():
    nasty = '</script><script>alert(1)</script> "quoted" & ümlaut \u2028 {{STUDY}}'
    content = page.html("s", [{"id": "p", "prompt": nasty, "a": "", "b": ""}]).decode()
    data = re.search(r'id="study">(.*?)</script>', content)[1]
    assert json.loads(data)["pairs"][0]["prompt"] == nasty


def test_a_rival_in_another_size_is_shown_in_ours(drawn, tmp_path):
    code, _ = built(tmp_path / "page.html", *drawn((128, 96)), "n=2")
    assert code == 0
    shapes = {decoded(pair[side]).shape for pair in data_of(tmp_path / "page.html")["pairs"] for side in "ab"}
    assert shapes == {(SIDE, SIDE, 3)}


def test_without_rivals_it_is_the_originals(tmp_path, capsys):
    prepared(tmp_path / "root", "targets=[scores]")
    code, _ = built(tmp_path / "page.html", "conf=stage_c", *WORDS, f"root={tmp_path}/root")
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
        (["taly"], "study does no 'taly' (did you mean tally?); it does build, tally"),
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


def test_prompts_without_originals_need_a_rival(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("prompt 0")
    asked = f"eval.prompts.mine={tmp_path}/mine.txt"
    put(
        Root(tmp_path / "root", "targets=[scores]", asked),
        "samples_mine",
        {"generated": [flat(0)]},
        captions("mine", 1),
    )
    said = refused(capsys, "build", "conf=stage_c", *WORDS, f"root={tmp_path}/root", f"out={tmp_path}/p.html", asked)
    assert "eval.rivals: there is nobody to compare with on mine" in said


def test_a_page_that_cannot_be_written_leaves_no_key(words, tmp_path, capsys):
    assert built(tmp_path, *words)[0] == 2
    assert "the page is an HTML file" in capsys.readouterr().err
    (tmp_path / "page.html").mkdir()
    assert built(tmp_path / "page.html", *words) == (2, {})
    assert f"out={tmp_path}/page.html: cannot be written" in capsys.readouterr().err


def test_answers_of_studies_that_the_root_does_not_know_are_refused_or_left_out(words, tmp_path, capsys):
    keys = [built(tmp_path / "page.html", *words, "n=3")[1] for _ in range(2)]
    capsys.readouterr()
    header = "study,rater,pair,left,chosen,answered\n"
    files = {"theirs": "0" * 16, "ours": keys[0]["study"], "second": keys[1]["study"]}
    for name, study in files.items():
        (tmp_path / f"{name}.csv").write_text(header + f"{study},r,{next(iter(keys[0]['pairs']))},a,neither,2026\n")
    root = next(word for word in words if word.startswith("root="))
    theirs, ours, second = (tmp_path / f"{name}.csv" for name in files)
    assert f"has no key of the study {'0' * 16}" in refused(capsys, "tally", theirs, root)
    assert "the files hold answers of the studies" in refused(capsys, "tally", ours, second, root)
    assert main(["study", "tally", str(theirs), str(ours), root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"of another study": 1}
    (tmp_path / "long.csv").write_text(
        f"{header}{'y' * 5000},r,p,a,neither,2026\n../{files['ours']},r,p,a,neither,2026\n"
    )
    assert main(["study", "tally", str(tmp_path / "long.csv"), str(ours), root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"of another study": 2}


def test_a_count_of_few_is_told_in_true_sentences(words, tmp_path, capsys):
    key = built(tmp_path / "page.html", *words, "n=3")[1]
    (pair, *_) = (name for name, its in key["pairs"].items() if its["ours"] != "both")
    root = next(word for word in words if word.startswith("root="))
    header, file = "study,rater,pair,left,chosen,answered\n", tmp_path / "answers.csv"
    file.write_text(header)
    assert "the files hold no answers" in refused(capsys, "tally", file, root)
    file.write_text(f"{header},r,{pair},a,a,2026\n")
    assert "no answer in the files says which study it is of" in refused(capsys, "tally", file, root)
    file.write_text(f"{header}{key['study']},r,{pair},a,a,2026\n")
    assert main(["study", "tally", str(file), root]) == 0
    said = capsys.readouterr().out
    assert f"study {key['study']}: 1 answer by 1 rater\n" in said
    assert "a picture is preferred in 1 answer, the left one in 1\n" in said
    file.write_text(f"{header}{key['study']},r,{pair},a,neither,2026\n")
    assert main(["study", "tally", str(file), root]) == 0
    assert "preferred" not in capsys.readouterr().out
