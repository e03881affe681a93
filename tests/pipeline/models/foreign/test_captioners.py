"""Captioners on a tiny model of random weights, saved as transformers saves them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from datasets.caption_settings import CaptionerConfig
from pipeline.models.foreign import captioners
from stages.weight_files import BadWeights

CPU, KEY = torch.device("cpu"), "data.captioners.dense"
WORDS = ["a", "red", "blue", "round", "square", "thing", "on", "white"]


def save(folder: Path) -> Path:
    """A BLIP of a few thousand weights, of which no token is a special one."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    size, common = len(special + WORDS), {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": size, "encoder_hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "projection_dim": 16}
    vision = {"image_size": 32, "patch_size": 16, "intermediate_size": 32, "projection_dim": 16}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=common | text, vision_config=common | vision, projection_dim=16)
    model = transformers.BlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that pictures make a difference
        model.text_decoder.get_output_embeddings().bias[: len(special)] = -1e4
        model.text_decoder.cls.predictions.bias[: len(special)] = -1e4
    model.save_pretrained(folder)
    tokenizer = transformers.BertTokenizer({word: number for number, word in enumerate(special + WORDS)})
    image = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(image, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("captioner") / "tiny")


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 48, 40, 3), np.uint8))


def config(folder: Path, **changes: object) -> CaptionerConfig:
    return CaptionerConfig.model_validate({"weights": str(folder), "precision": "fp32", "max_tokens": 5} | changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_picture_gets_a_caption_the_same_in_any_batch(tiny, precision):
    captioner = captioners.load(config(tiny, precision=precision), CPU, KEY)
    together = captioner.captions(pictures(3))
    assert together == captioner.captions(pictures(3))
    assert all(text and set(text.split()) <= set(WORDS) for text in together)
    assert captioner.captions([]) == []
    if precision == "fp32":
        assert together == [captioner.captions([picture])[0] for picture in pictures(3)]


def test_a_prompt_is_not_part_of_the_caption(tiny):
    captioner = captioners.load(config(tiny, prompt="a red"), CPU, KEY)
    assert all(text and not text.startswith("a red") for text in captioner.captions(pictures(2)))


def test_other_folders_are_refused_by_key(tmp_path):
    with pytest.raises(BadWeights, match=rf"^{KEY}.weights: {tmp_path} is no image-to-text model"):
        captioners.load(config(tmp_path), CPU, KEY)
