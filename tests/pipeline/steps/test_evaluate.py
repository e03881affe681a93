"""evaluate, in this process: a known truth comes out, whatever is killed; nobody's pictures are scored twice."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.config import DataError
from datasets.files import storage
from datasets.reading import prompts
from datasets.reading.rivals import Findings
from pipeline.models import contests, scorers
from pipeline.models.score_tables import FILE, TABLES
from pipeline.settings.evaluation import TRAINING, samples_of
from pipeline.steps import evaluate
from pipeline.steps.build import Facts
from pipeline.store.artifacts import Artifact
from stages.sampling.grid import png
from stages.scoring.metrics import psnr, ssim
from stages.scoring.scorers import likenesses
from tests.pipeline.in_process import Root

N, WON = 100, 70
SIDE = 64


def flat(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


class Brightness:
    """Whose pictures are brighter is known beforehand; it counts how often it looked at each of them."""

    wants_originals = False

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, bytes]] = Counter()
        self.fail_after: int | None = None
        self.value: float | None = None

    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[str], originals: Any) -> np.ndarray:
        if self.fail_after is not None and self.seen.total() >= self.fail_after:
            raise OSError("the machine is gone")
        self.seen.update((prompt, picture.tobytes()) for prompt, picture in zip(prompts, pictures, strict=True))
        return np.array([self.value or picture.mean() for picture in pictures], np.float32)

    def is_truncated(self, prompt: str) -> bool:
        return prompt.endswith("9")


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> Brightness:
    scorer = Brightness()
    monkeypatch.setattr(scorers, "load", lambda config, device: {"brightness": scorer} | likenesses(None))
    monkeypatch.setattr(scorers, "names", lambda config: {})
    monkeypatch.setattr(evaluate, "CHUNK", 16)
    return scorer


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.board.BoardClient", lambda board: board)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A prompt set of a hundred, a rival that is darker on seventy of them, and something to name as weights."""
    lines = [f"prompt {n}\t{'Animals' if n < 50 else 'Food'}\tBasic\t\n" for n in range(N)]
    (tmp_path / "mine.tsv").write_text("Prompt\tCategory\tChallenge\tNote\n" + "".join(lines))
    (tmp_path / "w.safetensors").write_text("weights")
    (tmp_path / "rival").mkdir()
    for n in range(N):
        Image.fromarray(flat(100 if n < WON else 200)).save(tmp_path / f"rival/{prompts.Prompt(f'prompt {n}').key}.png")
    return tmp_path


def words(files: Path) -> list[str]:
    return [
        "targets=[scores]",
        f"eval.prompts.mine={files}/mine.tsv",
        f"eval.rivals.other={files}/rival",
        f"eval.scorers.clip_h={files}/w.safetensors",
        "eval.batch=5",
    ]


def put(root: Root, output: str, folders: dict[str, list[np.ndarray]], rows: list[dict[str, Any]]) -> Artifact:
    """An artifact of samples."""
    build = root.build(output)
    text = evaluate.json.dumps(rows).encode()
    files = {"captions.json": storage.publish(text, storage.join(build.path, "captions.json"))}
    for folder, pictures in folders.items():
        for row, picture in zip(rows, pictures, strict=True):
            name = f"{folder}/{row['key']}.png"
            files[name] = storage.publish(png(picture), storage.join(build.path, name))
    return root.commit(build, Facts(files, rows=len(rows), call="", workers=[]))


def captions(name: str, count: int) -> list[dict[str, Any]]:
    return [{"key": f"{name[0]}{n:031d}", "caption": f"{name} {n}", "seed": n} for n in range(count)]


def prepared(path: Path, *config: str) -> Root:
    root = Root(path, *config)
    for name in root.config.drawn_sets():
        if name in root.config.prompt_files():
            mine = prompts.read(root.config.eval.prompts[name], None, 0, "")
            rows = [{"key": p.key, "caption": p.text, "seed": 1, "category": p.category} for p in mine.prompts]
            put(root, samples_of(name), {"generated": [flat(150)] * len(rows)}, rows)
            put(root, f"null_{samples_of(name)}", {"generated": [flat(149 + n % 3) for n in range(N)]}, rows)
            continue
        count, first = (4, 0) if name == TRAINING else (2, 50)
        originals = [noise(first + n) for n in range(count)]
        worse = [picture // 2 for picture in originals]
        drawn = [originals[0], *worse[1:]] if name == TRAINING else [originals[0], noise(0)]
        folders = {"original": originals, "stage_a": originals, "stage_b": worse, "generated": drawn}
        put(root, samples_of(name), folders, captions(name, count))
        if f"null_{samples_of(name)}" in root.prints:
            put(root, f"null_{samples_of(name)}", {"generated": worse}, captions(name, count))
    return root


@pytest.mark.parametrize(("usable", "n"), [(2, 3), (6, 7), (2, 2003), (29999, 30000), (1, 8)])
def test_the_share_that_is_named_is_enough(usable, n):
    keys = [f"{number:032x}" for number in range(n)]
    findings = Findings(frozenset(keys[:usable]), missing=tuple(keys[usable:]))
    with pytest.raises(DataError, match=r"leave them out with eval\.allow_missing=") as told:
        contests.require(findings, "eval.rivals.x", "DIR", "mine", n, 0.0)
    share = float(str(told.value).rpartition("=")[2])
    contests.require(findings, "eval.rivals.x", "DIR", "mine", n, share)
    assert share < 1.2 * findings.lacking / n
    with pytest.raises(DataError, match=r"mend them$"):
        contests.require(Findings(frozenset(), missing=tuple(keys)), "k", "DIR", "mine", n, 0.0)


def scored(root: Root) -> Artifact:
    build = root.build("scores")
    return root.commit(build, evaluate.evaluate(build))


def lines(scores: Artifact) -> dict[tuple[str, ...], dict[str, Any]]:
    found = evaluate.json.loads(scores.read(TABLES))
    return {(line["scorer"], line["set"], line["rival"], line["part"]): line for line in found}


def test_a_known_truth_comes_out_on_any_part_and_chance_is_beside_it(brightness, files, tmp_path):
    scores = scored(prepared(tmp_path / "root", *words(files)))
    metrics, found = scores.manifest["metrics"], lines(scores)
    assert metrics["brightness/mine/other/win_rate"] == WON / N
    assert metrics["brightness/mine/other/win_low"] > 0.5
    assert metrics["brightness/mine/null/win_low"] < 0.5 < metrics["brightness/mine/null/win_high"]
    assert metrics["brightness/mine/mean"] == 150
    assert metrics["brightness/mine/truncated"] == 10
    assert metrics["brightness/mine/other/margin"] == pytest.approx((WON * 50 - (N - WON) * 50) / N)
    assert found["brightness", "mine", "other", "category: Animals"]["rate"] == 1.0
    assert found["brightness", "mine", "other", "category: Food"]["rate"] == 0.4
    assert found["brightness", "mine", "other", "all"]["n"] == N
    table = pq.read_table(io.BytesIO(scores.read(FILE)))
    mine = [row for row in table.to_pylist() if row["set"] == "mine"]
    assert len(mine) == N
    assert mine[0] == {
        "set": "mine", "key": prompts.Prompt("prompt 0").key, "prompt": "prompt 0", "category": "Animals",
        "challenge": None, "seed": 1, "scorer": "brightness", "truncated": False, "score": 150.0, "null": 149.0,
        "rival_other": 100.0, "stage_a": None, "stage_b": None,
    }  # fmt: skip


def test_sides_are_not_swapped(brightness, files, tmp_path):
    for picture in (files / "rival").iterdir():
        with Image.open(picture) as image:
            Image.fromarray(flat(300 - int(np.asarray(image)[0, 0, 0]))).save(picture)
    scores = scored(prepared(tmp_path / "root", *words(files)))
    assert scores.manifest["metrics"]["brightness/mine/other/win_rate"] == (N - WON) / N


def test_killed_half_way_it_ends_with_the_same_table_and_scores_nothing_twice(brightness, files, tmp_path):
    whole = scored(prepared(tmp_path / "whole", *words(files)))
    brightness.seen.clear()
    root = prepared(tmp_path / "killed", *words(files))
    brightness.fail_after = 130
    with pytest.raises(OSError, match="gone"):
        evaluate.evaluate(root.build("scores"))
    brightness.fail_after, before = None, brightness.seen.total()
    again = scored(root)
    assert {name: again.read(name) for name in again.files} == {name: whole.read(name) for name in whole.files}
    finished = before - before % (3 * 16)  # pictures of the chunks with a receipt: ours, null, the rival's
    assert finished > 0
    assert brightness.seen.total() - before == 4 + 3 * N - finished - (4 if finished else 0)


def test_a_score_that_is_no_number_stops_it(brightness, files, tmp_path):
    root = prepared(tmp_path / "root", *words(files))
    brightness.value = float("nan")
    with pytest.raises(DataError, match=r"^brightness gives nan to the picture \w+ of training; look at its weights"):
        evaluate.evaluate(root.build("scores"))


def test_a_rival_that_lacks_pictures_is_refused_or_compared_on_the_others(brightness, files, tmp_path):
    (first, second, third, *_) = sorted((files / "rival").iterdir())
    first.unlink()
    second.write_bytes(b"no picture")
    Image.new("RGB", (1, 1)).save(third)
    refused = prepared(tmp_path / "refused", *words(files))
    with pytest.raises(
        DataError, match=r"1 missing .* 1 undecodable .* 1 of another size, .*eval\.allow_missing=0\.03$"
    ):
        evaluate.evaluate(refused.build("scores"))
    scores = scored(prepared(tmp_path / "allowed", *words(files), "eval.allow_missing=0.03"))
    assert lines(scores)["brightness", "mine", "other", "all"]["n"] == N - 3
    assert lines(scores)["brightness", "mine", "null", "all"]["n"] == N
    assert "1 undecodable" in scores.manifest["notes"]["prompts"]["mine"]["rivals"]["other"]


def test_held_out_captions_are_told_from_those_that_were_trained_on(brightness, tmp_path):
    scores = scored(prepared(tmp_path / "root", "targets=[scores]", "data.held_out_captions=[red heart]"))
    metrics = scores.manifest["metrics"]
    training, held = [noise(n) for n in range(4)], [noise(50 + n) for n in range(2)]
    assert (metrics["n_training"], metrics["n_heldout"]) == (4, 2)
    assert metrics["retrieval_top1"] == 1.0
    assert metrics["retrieval_top1_heldout"] == 0.5  # the other is nearest to one that was trained on
    assert "psnr_generated_heldout" not in metrics
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        pairs = {"": training, "_heldout": held}
        for suffix, originals in pairs.items():
            expected = measure(np.stack([one // 2 for one in originals]), np.stack(originals)).mean()
            assert metrics[f"{name}_stage_b{suffix}"] == pytest.approx(expected, rel=1e-6)
    assert metrics["psnr_stage_a"] == 100
    assert metrics["psnr_generated"] == pytest.approx((100 + 3 * metrics["psnr_stage_b"] + 0) / 4, rel=0.2)
    with Image.open(io.BytesIO(scores.read("grid.png"))) as sheet:
        assert sheet.height > 3 * 128


def test_what_the_code_decides_and_what_the_caption_adds_are_measured(brightness, tmp_path):
    root = Root(tmp_path / "root", "targets=[scores]", "sample.ablations=[preview,without_text]")
    originals = [noise(n) for n in range(4)]
    drawn = [picture // 2 for picture in originals]
    small = [contests.fit(picture, flat(0)[:32, :32]) for picture in drawn]
    blind = [picture // 3 for picture in originals]
    folders = {"original": originals, "stage_a": originals, "stage_b": drawn, "generated": drawn}
    folders |= {"preview": [one // 2 for one in small], "without_text": blind}
    put(root, "samples", folders, captions("training", 4))
    scores = scored(root)
    metrics = scores.manifest["metrics"]
    expected = psnr(np.stack([one // 2 for one in small]), np.stack(small)).mean()  # to our pictures made smaller
    assert metrics["psnr_preview"] == pytest.approx(expected, rel=1e-6)
    assert metrics["psnr_without_text"] == pytest.approx(psnr(np.stack(blind), np.stack(originals)).mean(), rel=1e-6)
    assert metrics["psnr_without_text"] < metrics["psnr_stage_b"]
    table = pq.read_table(io.BytesIO(scores.read(FILE)))
    assert table.filter(pc.field("scorer") == "brightness")["preview"].null_count == 4  # likeness alone
