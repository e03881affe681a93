"""Text towers against transformers: tokens, hidden states, and what an export writes."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stages.models.text import (
    END,
    START,
    BadTextWeights,
    TextTower,
    Tokenizer,
    seeded_tower,
    to_transformers,
    tokenizer_files,
)
from stages.settings.models import ClipTextConfig, SeededTextConfig, TextConfig
from stages.weight_files import BadWeights

CONFIG = SeededTextConfig(width=32, layers=3, heads=4, context_length=16, seed=3)
CAPTIONS = [
    "",
    "red heart",
    "A Blue  house\twith three WINDOWS, isn't it?",
    "Würstchen & Käse: 4k, 100% (natürlich) — 満月 😀 ΟΔΟΣ İstanbul",
    "e\u0301clair, &amp; <end_of_text> <start_of_text>",
    "word " * 40,
    "twelve or so short words that together fill every place of the row",
]


def write_folder(tower: TextTower, folder: Path) -> None:
    config, state = to_transformers(tower)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in tokenizer_files(tower.context_length).items():
        (folder / name).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def tower() -> TextTower:
    tower = seeded_tower(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():  # biases and LayerNorms start as constants: make misplaced keys visible
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tower


@pytest.fixture(scope="module")
def folder(tower: TextTower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    write_folder(tower, folder)
    return folder


@pytest.mark.parametrize("load", [CLIPTokenizer.from_pretrained, AutoTokenizer.from_pretrained])
def test_tokens_equal_transformers(folder: Path, load) -> None:
    stock = load(folder)
    assert stock.model_max_length == CONFIG.context_length
    theirs = stock(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = Tokenizer(CONFIG.context_length)(CAPTIONS)
    assert torch.equal(ours.ids, theirs)


def test_golden_tokens() -> None:
    tokens = Tokenizer(77)(["a cat"])
    assert tokens.ids[0, :4].tolist() == [START, 320, 2368, END]
    assert tokens.ids[0, 4:].unique().tolist() == [END]
    assert tokens.ids.shape == (1, 77)


def test_truncated_captions_are_counted(tower: TextTower) -> None:
    hidden, truncated = tower.encode([*CAPTIONS, "a " * 14, "a " * 15])
    assert hidden.shape == (len(CAPTIONS) + 2, 16, 32)
    assert truncated == sum(len(Tokenizer(77).bpe.encode(text)) > 14 for text in CAPTIONS) + 1


def test_no_captions_is_no_rows(tower: TextTower) -> None:
    assert Tokenizer(16)([]).ids.shape == (0, 16)


def test_hidden_states_equal_transformers(tower: TextTower, folder: Path) -> None:
    stock, tokenizer = CLIPTextModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = stock(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        unmasked = stock(inputs.input_ids).last_hidden_state
    ours, _ = tower.encode(CAPTIONS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (unmasked - theirs).abs().max() > 1e-2  # the mask matters


def test_captions_of_any_length_equal_transformers(tmp_path: Path) -> None:
    """At CLIP's own length: none, one word, as many as fit, and more; what does not fit is cut and counted."""
    tower = seeded_tower(CONFIG.model_copy(update={"context_length": 77}))
    write_folder(tower, tmp_path)
    stock, tokenizer = CLIPTextModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    captions = [" ".join(["cat"] * words) for words in (0, 1, 74, 75, 76, 77, 78, 2500)]
    ours, truncated = tower.encode(captions)
    assert truncated == 4
    inputs = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = stock(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[4:], ours[3:4].expand(4, -1, -1))  # the end token takes the last place


def test_every_weight_of_the_export_is_taken(tower: TextTower) -> None:
    config, state = to_transformers(tower)
    expected = CLIPTextModel(CLIPTextConfig(**config)).state_dict()
    assert {key.removeprefix("text_model.") for key in state} == {key.removeprefix("text_model.") for key in expected}


def test_the_seed_makes_the_tower_and_nothing_else() -> None:
    before = torch.get_rng_state()
    first, again = seeded_tower(CONFIG).state_dict(), seeded_tower(CONFIG).state_dict()
    other = seeded_tower(CONFIG.model_copy(update={"seed": 4})).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_centring_shifts_the_states_and_survives_the_export(tmp_path: Path) -> None:
    tower = seeded_tower(CONFIG)
    raw, _ = tower.encode(CAPTIONS)
    mean = raw.mean(dim=(0, 1))
    tower.centre(mean)
    centred, _ = tower.encode(CAPTIONS)
    torch.testing.assert_close(centred, raw - mean, rtol=0, atol=1e-5)
    write_folder(tower, tmp_path)
    stock, tokenizer = CLIPTextModel.from_pretrained(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).last_hidden_state, centred, rtol=1e-4, atol=1e-5)


def test_a_tower_takes_its_part_of_an_open_clip_checkpoint() -> None:
    source, target = seeded_tower(CONFIG), seeded_tower(CONFIG.model_copy(update={"seed": 4}))
    rest = {"logit_scale": torch.ones(()), "text_projection": torch.ones(32, 8), "visual.proj": torch.ones(3)}
    target.load_open_clip(source.state_dict() | rest)
    assert torch.equal(target.encode(CAPTIONS)[0], source.encode(CAPTIONS)[0])


@pytest.mark.parametrize("before", ["text_model.", "", "text_encoder.text_model."])
def test_a_tower_in_transformers_layout_is_taken_from_a_text_model_or_a_whole_clip(before):
    source, target = seeded_tower(CONFIG), seeded_tower(CONFIG.model_copy(update={"seed": 7}))
    theirs = {key.removeprefix("text_model."): value for key, value in to_transformers(source)[1].items()}
    whole = {before + key: value for key, value in theirs.items()}
    vision = {"vision_model.encoder.layers.0.layer_norm1.bias": torch.zeros(3), "logit_scale": torch.zeros(())}
    target.load_open_clip(whole | (vision if before else {}))
    assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())
    whole.pop(f"{before}final_layer_norm.bias")
    with pytest.raises(BadTextWeights, match=r"lacks .*final_layer_norm\.bias"):
        target.load_open_clip(whole)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    wider = seeded_tower(CONFIG.model_copy(update={"width": 64}))
    with pytest.raises(BadTextWeights, match=r"\(16, 64\) for positional_embedding, not \(16, 32\)"):
        seeded_tower(CONFIG).load_open_clip(wider.state_dict())
    with pytest.raises(BadTextWeights, match="nothing for positional_embedding"):
        seeded_tower(CONFIG).load_open_clip({})


def test_a_checkpoint_with_a_nan_is_refused_by_its_name() -> None:
    broken = seeded_tower(CONFIG).state_dict()
    broken["ln_final.bias"][-1] = torch.nan
    with pytest.raises(BadWeights, match=r"^clip\.safetensors is damaged: its ln_final\.bias holds values"):
        seeded_tower(CONFIG).load_open_clip(broken, "clip.safetensors")


@pytest.mark.parametrize(("model", "parameters"), [("ViT-H-14", 352_984_064), ("ViT-bigG-14", 693_021_440)])
def test_full_size(model: str, parameters: int) -> None:
    config = ClipTextConfig(model=model, weights="x")
    with torch.device("meta"):
        tower = TextTower(config.width, config.layers, config.heads, config.context_length)
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


def test_settings() -> None:
    adapter = TypeAdapter(TextConfig)
    assert isinstance(adapter.validate_python({"model": "ViT-H-14", "weights": "w"}), ClipTextConfig)
    assert isinstance(adapter.validate_python({"model": "seeded"}), SeededTextConfig)
    with pytest.raises(ValidationError, match="heads"):
        SeededTextConfig(width=30, heads=4)
    with pytest.raises(ValidationError, match="weights"):
        adapter.validate_python({"model": "ViT-H-14"})
