"""What a model card says of weights that were there before: licence, content, and the card that lies with them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.results import origins
from pipeline.settings import compose

DATA = "- 64 pictures of OpenMoji, CC BY-SA 4.0.\n- Stage A was not trained here: it is of x.\n  - 9 pictures of x."
CARD = f"---\nlicense: cc-by-sa-4.0\n---\n\n# A base\n\n## Training data\n\n{DATA}\n\n## Scores\n\n- none\n"
SHA = "sha256 " + "0a" * 32


def release(folder: Path, card: str = CARD) -> Path:
    """The files of a release that tell whose it is."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card)
    (folder / "model_index.json").write_text("{}")
    for part in ("vqgan", "decoder/decoder", "prior_prior"):
        (folder / part).mkdir(parents=True)
        (folder / part / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return folder


def told(*words: str, settings: dict[str, Any] | None = None) -> tuple[list[str], list[str | None]]:
    config = compose.load("stage_c", ["scale=micro", *words])
    artifacts: Any = {"stage_a": SimpleNamespace(manifest={"settings": settings or {}})}
    return origins.told(config, artifacts)


def test_a_training_from_nothing_has_no_origins() -> None:
    assert told() == ([], [])


def test_parts_of_one_release_are_told_apart_and_its_card_once(tmp_path: Path) -> None:
    base = release(tmp_path / "base")
    sentences, licences = told(
        f"stage_a.weights={base}/vqgan/diffusion_pytorch_model.safetensors",
        "stage_a.train=null",
        f"stage_b.weights={base}/decoder/decoder/diffusion_pytorch_model.safetensors",
        f"stage_c.weights={base}",
        settings={"stage_a.weights": SHA},
    )
    nested = "\n".join(f"  {line}" for line in DATA.splitlines())
    assert sentences == [
        "Stage A was not trained here: its weights are those of base/vqgan/diffusion_pytorch_model.safetensors "
        f"(licence cc-by-sa-4.0, {SHA}).",
        "Stage B's training started from base/decoder/decoder/diffusion_pytorch_model.safetensors "
        "(licence cc-by-sa-4.0).",
        "Stage C's training started from base (licence cc-by-sa-4.0).",
        f"The model card of base, from which Stage A, Stage B, Stage C came, says of its training data:\n{nested}",
    ]
    assert licences == ["cc-by-sa-4.0"] * 3


def test_two_releases_have_each_their_own_card(tmp_path: Path) -> None:
    first, second = release(tmp_path / "one/base"), release(tmp_path / "two/base", CARD.replace("cc-by-sa-4.0", "mit"))
    sentences, licences = told(f"interpolate={{first: {first}/prior_prior, second: {second}}}")
    assert sentences[:3] == [
        "Stage C lies between base/prior_prior and base, at 0.5 of the way.",
        "Stage C's first end is base/prior_prior (licence cc-by-sa-4.0).",
        "Stage C's second end is base (licence mit).",
    ]
    assert [sentence.partition(" says ")[0] for sentence in sentences[3:]] == [
        "The model card of base, from which Stage C's first end came,",
        "The model card of base, from which Stage C's second end came,",
    ]
    assert licences == ["cc-by-sa-4.0", "mit"]


def test_known_weights_have_their_source_and_others_are_said_not_to_be_known(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Notes\n\n## Training data\n\nA checkout's, without what the Hub reads.\n")
    sentences, licences = told(
        "stage_a.weights=weights/vqgan_f4_v1_500k.pt", f"stage_c.weights={tmp_path}/mine/c.pt", "stage_c.train=null"
    )
    assert sentences == [
        "Stage A's training started from vqgan_f4_v1_500k.pt (licence MIT, by its name "
        "huggingface.co/dome272/wuerstchen/vqgan_f4_v1_500k.pt).",
        "Stage C was not trained here: its weights are those of mine/c.pt (licence unknown).",
        "What mine/c.pt, from which Stage C came, was trained on is not known: no model card with it says so.",
    ]
    assert licences == ["MIT", None]


def test_text_towers_and_the_compressor_have_origins_too(tmp_path: Path) -> None:
    tower = "text.clip={model: ViT-H-14, weights: weights/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors}"
    sentences, licences = told(
        tower, "stage_c.text=clip", "stage_c.model.text_width=1024", "compressor.weights=efficientnet_v2_s-dd5fe13b.pth"
    )
    assert sentences[0].startswith("The compressor began as efficientnet_v2_s-dd5fe13b.pth (licence unknown")
    assert sentences[1].startswith("The text tower clip has the weights of CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors")
    assert len(sentences) == 2
    assert licences == [None, "MIT"]
