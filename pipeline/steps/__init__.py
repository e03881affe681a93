"""THE TABLE: every step of the Würstchen DAG, in reading order.

A step reads the config keys and the artifacts named here and makes one artifact (`sizes.<step>` stands for the picture
sizes of that training's phases). Edges follow from the names. To add a step: write `pipeline/steps/<verb>.py` with a
function `(Build) -> Facts`, and add its row.
"""

from pipeline.config import Config
from pipeline.dag import Step


def table(config: Config) -> list[Step]:
    """The DAG of one config; each text tower that a stage needs gets a row of its own."""
    text_b, text_c = f"text_{config.stage_b.text}", f"text_{config.stage_c.text}"
    towers = sorted({config.stage_b.text, config.stage_c.text})
    texts = tuple(f"text_{tower}" for tower in towers)
    stages = ("stage_a", "stage_b", "stage_c")
    plan = tuple(
        f"data.{key}" for key in ("source", "metadata", "removed", "limit", "shard_rows", "filters", "openmoji")
    )
    # fmt: off
    return [
        #    step           makes        from                                  reads                               runs
        Step("fetch",       "metadata",  (),                                   (*plan, "seed"),                    "fetch:fetch", 2),
        Step("download",    "images",    ("metadata",),                        ("data.image",),                    "download:download"),
        *(
        Step("encode_text", f"text_{t}", ("images",),                          (f"text.{t}",),                     "encode:encode_text")
        for t in towers),
        Step("train_a",     "stage_a",   ("images",),                          ("stage_a", "seed"),                "train:train_a"),
        Step("encode_a",    "latents_a", ("images", "stage_a"),                ("sizes.train_b",),                 "encode:encode_a"),
        Step("train_b",     "stage_b",   ("images", text_b, "latents_a", "stage_a"), ("stage_b", "compressor", "seed"), "train:train_b"),
        Step("encode_c",    "latents_c", ("images", "stage_b"),                ("sizes.train_c",),                 "encode:encode_c"),
        Step("train_c",     "stage_c",   ("latents_c", text_c),                ("stage_c", "seed"),                "train:train_c"),
        Step("sample",      "samples",   ("images", *texts, *stages),          ("sample", "seed"),                 "sample:sample"),
        Step("evaluate",    "scores",    ("samples",),                         ("eval",),                          "evaluate:evaluate"),
        Step("export",      "release",   ("metadata", *texts, *stages, "samples", "scores"), ("sample",),          "export:export", 2),
    ]
    # fmt: on
