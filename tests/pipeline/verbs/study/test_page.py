"""The page in a real browser: twenty pairs by keys and touch, a reload in the middle, the file, and the count of it."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests import chromium
from tests.chromium import needs_chromium

VOTES = 20
WAYS = ("ArrowLeft", "ArrowRight", "ArrowDown", "left", "right", "neither")  # by key and by finger


@pytest.fixture(scope="module")
def built(words, tmp_path_factory) -> tuple[Path, Path, dict]:
    """A page of twenty pairs and a control, the root, and its key."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    root = Path(next(word for word in words if word.startswith("root=")).removeprefix("root="))
    before = set((root / "studies").glob("*"))
    assert main(["study", "build", f"out={file}", *words, "n=20"]) == 0
    (key,) = set((root / "studies").glob("*")) - before
    return file, root, json.loads(key.read_text())


@needs_chromium
def test_the_tally_is_what_was_voted(built, tmp_path, capsys):
    file, root, key = built
    wanted: dict[str, str] = {}
    with chromium.page(tmp_path, width=1100, height=850, touch=True) as page:
        page.open(file.as_uri())
        assert page.value("document.querySelectorAll('img').length") == 2
        for number in range(VOTES + 1):
            if number == 11:
                page.reload()
                said(page, "Pair 12 of 21")
            voted(page, WAYS[number % len(WAYS)], wanted, key)
        assert page.value("document.getElementById('vote').hidden")
        page.press("Backspace")  # the last one once more, otherwise
        voted(page, "ArrowDown", wanted, key)
        page.touch("save")
        answers = downloaded(page, tmp_path / "downloads")
        assert page.complaints == []
        assert [address for address in page.asked if not address.startswith(("file:", "blob:"))] == []
        assert page.value("document.documentElement.scrollWidth <= innerWidth")
    assert {row["pair"]: row["chosen"] for row in csv.DictReader(answers.read_text().splitlines())} == wanted
    capsys.readouterr()
    assert main(["study", "tally", str(answers), f"root={root}", "--json"]) == 0
    counted(json.loads(capsys.readouterr().out), wanted, key)
    assert main(["study", "tally", str(answers), f"root={root}"]) == 0
    assert f"study {key['study']}: 20 answers by 1 rater\n" in capsys.readouterr().out


@needs_chromium
def test_what_another_tab_has_kept_is_gone_on_from_and_not_written_over(built, tmp_path):
    file, _, key = built
    kept = f"localStorage.getItem('study-{key['study']}')"
    with chromium.page(tmp_path) as page:
        page.open(file.as_uri())
        assert page.value(kept) is None
        page.press("ArrowLeft")
        page.press("ArrowDown")
        two = page.value(kept)
        page.press("Backspace")
        page.press("Backspace")
        assert page.value("document.getElementById('said').textContent") == "Pair 1 of 21"
        page.value(f"localStorage.setItem('study-{key['study']}', {json.dumps(two)})")  # of which only others hear
        page.value(f"dispatchEvent(new StorageEvent('storage', {{key: 'study-{key['study']}'}}))")
        assert page.value("document.getElementById('said').textContent") == "Pair 3 of 21"
        page.press("ArrowRight")
        (rater,) = json.loads(page.value(kept))
        assert [one["chosen"] == "neither" for one in rater["answers"]] == [False, True, False]
        assert page.complaints == []


def voted(page: chromium.Page, way: str, wanted: dict[str, str], key: dict) -> None:
    """Vote; note which picture, of those that the eye sees, that is."""
    seen = page.value("[...document.querySelectorAll('.side img')].map(image => image.src)")
    prompt = page.value("document.getElementById('prompt').textContent")
    data = page.value("JSON.parse(document.getElementById('study').textContent).pairs")
    (pair,) = (one for one in data if one["prompt"] == prompt and {one["a"], one["b"]} == set(seen))
    place = {"ArrowLeft": 0, "left": 0, "ArrowRight": 1, "right": 1}.get(way)
    if key["pairs"][pair["id"]]["ours"] == "both":  # the same twice: which side is `a`, nobody sees
        way, place = "ArrowDown", None
    wanted[pair["id"]] = "neither" if place is None else "a" if pair["a"] == seen[place] else "b"
    page.press(way) if way[0].isupper() else page.touch(way)


def said(page: chromium.Page, wanted: str) -> None:
    """Wait until the page says so: what was kept comes late to a page that is loaded anew on a busy machine."""
    for _ in range(500):
        if page.value("document.getElementById('said').textContent") == wanted:
            return
        page.value("new Promise(done => setTimeout(done, 20))")
    pytest.fail(f"the page does not say {wanted}")


def downloaded(page: chromium.Page, folder: Path) -> Path:
    """The file that the page saves, once it is whole."""
    while not (found := list(folder.glob("answers-*.csv"))):
        page.value("new Promise(done => setTimeout(done, 20))")
    return found[0]


def counted(tally: dict, wanted: dict[str, str], key: dict) -> None:
    votes: Counter[str] = Counter()
    for name, chosen in wanted.items():
        ours = key["pairs"][name]["ours"]
        if ours != "both":
            votes["neither" if chosen == "neither" else "ours" if chosen == ours else "theirs"] += 1
    (everything,) = (one for one in tally["preferences"] if one["by"] == "all raters" and one["set"] == "all")
    assert {name: everything[name] for name in ("ours", "theirs", "neither")} == dict(votes)
    assert (tally["answers"], tally["controls"], tally["controls_failed"]) == (VOTES, 1, 0)
    assert tally["dropped"] == {}


@needs_chromium
def test_whoever_cannot_see_or_point_gets_through(built, tmp_path):
    with chromium.page(tmp_path, width=400, height=800) as page:
        page.open(built[0].as_uri())
        named = (
            "[...document.querySelectorAll('button')].every(one => one.innerText.trim() || one.querySelector('[alt]'))"
        )
        assert page.value(named)
        assert page.value("document.querySelector('[role=status]').textContent") == "Pair 1 of 21"
        assert page.value("document.documentElement.scrollWidth <= innerWidth")  # a phone's width
        page.press("Tab")
        assert page.value("document.activeElement.id") == "left"
        page.press("Enter")
        assert page.value("document.querySelector('[role=status]').textContent") == "Pair 2 of 21"
        page.value("document.querySelector('#save').focus()")
        for _ in range(20):
            page.press("ArrowDown")
        assert page.value("document.querySelector('[role=status]').textContent") == "All 21 pairs are answered."
        page.value("document.getElementById('another').click()")
        assert page.value("document.querySelector('[role=status]').textContent") == "Pair 1 of 21"
