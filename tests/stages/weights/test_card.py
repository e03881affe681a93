"""The model card: what the Hub reads of it, what it says, and another caption in its example."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from stages.settings.sampling import SamplingConfig
from stages.weights.card import CardFacts, Score, model_card, terms, with_prompt

FACTS = CardFacts(
    name="Tiny Würstchen",
    license="cc-by-sa-4.0",
    prompt="red heart",
    settings=SamplingConfig(width=256, height=128, steps_c=3, steps_b=2, guidance_c=2.5, guidance_b=1.5),
    sources=["OpenMoji, CC BY-SA 4.0, https://openmoji.org"],
    scores=[Score("retrieval_top1", 0.984375, 64, "training"), Score("pickscore/parti/mean", 19.7012, None, "parti")],
    cost=["train_c: 0.1 hours (on cpu)."],
    limitations=["It knows 64 pictures."],
    lineage=["Stage C: fingerprint 0a, content 0b."],
)


def test_the_card_says_it_all() -> None:
    card = ModelCard(model_card(FACTS))
    assert card.data.to_dict() == {
        "license": "cc-by-sa-4.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "wuerstchen"],
    }
    assert re.findall(r"^## (.*)$", card.text, re.MULTILINE) == [
        "Use",
        "Training data",
        "Scores",
        "Cost",
        "Limitations",
        "Lineage",
        "Citation",
    ]
    for said in (
        "# Tiny Würstchen\n",
        "- OpenMoji, CC BY-SA 4.0, https://openmoji.org\n",
        "| retrieval_top1 | 0.9844 | 64 | training |\n| pickscore/parti/mean | 19.7012 | not known | parti |\n",
        "- train_c: 0.1 hours (on cpu).\n",
        "- Stage C: fingerprint 0a, content 0b.\n",
        "- It knows 64 pictures.\n",
        "2306.00637",
    ):
        assert said in card.text


def test_the_example_has_the_settings_of_the_pictures() -> None:
    """Every one of them, by the names of the stock pipeline."""
    (example,) = re.findall(r"```python\n(.*?)```", model_card(FACTS), re.DOTALL)
    for line in (
        "    'red heart',\n",
        "    width=256,\n    height=128,\n",
        "    prior_num_inference_steps=3,\n    prior_guidance_scale=2.5,\n",
        "    num_inference_steps=2,\n    decoder_guidance_scale=1.5,\n",
    ):
        assert line in example


@pytest.mark.parametrize("caption", ["a cat", 'it\'s "quoted"', "with\nlines", "a {brace} and a \\"])
def test_another_caption_in_the_example_is_the_card_of_that_caption(caption: str) -> None:
    expected = model_card(dataclasses.replace(FACTS, prompt=caption))
    assert with_prompt(model_card(FACTS), "red heart", caption) == expected
    assert with_prompt(model_card(FACTS), "blue heart", caption) == model_card(FACTS)


def test_its_licence_and_training_data_can_be_read_back() -> None:
    assert terms(model_card(FACTS)) == ("cc-by-sa-4.0", "- OpenMoji, CC BY-SA 4.0, https://openmoji.org")
    assert terms("---\r\ntags: [a]\r\nlicense: 'mit'\r\n---\r\n# Another's\r\n") == ("mit", None)
    assert terms("---\ntags: [a]\n---\n\n## Training data\n\nAll.\n") == (None, "All.")
    assert terms("# Notes\n\nlicense: mit\n\n## Training data\n\nMine\n") is None
