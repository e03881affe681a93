"""THE TABLE: every step of the Würstchen DAG, in reading order.

A step reads the config keys and the artifacts named here and makes one artifact (`sizes.<step>` stands for the picture
sizes of that training's phases). Edges follow from the names. To add a step: write `pipeline/steps/<verb>.py` with a
function `(Build) -> Facts`, and add its row.
"""

from functools import partial

from datasets.config import DataConfig
from datasets.source_settings import MIXTURE
from pipeline.models.feature_sets import feature_sets
from pipeline.plan.dag import Step
from pipeline.settings.config import Config
from pipeline.settings.evaluation import NULL, samples_of
from pipeline.settings.resources import Work
from pipeline.settings.sections import STAGES
from stages.settings.sampling import SamplingConfig

WORK: dict[str, Work] = {  # by the module that does it, what kind of work it is
    "fetch": "data",
    "download": "data",
    "deduplicate": "data",
    "select": "data",
    "score": "encode",
    "caption": "encode",
    "encode": "encode",
    "train": "train",
    "bring": "evaluate",
    "interpolate": "evaluate",
    "sample": "evaluate",
    "measuring.extract": "evaluate",
    "measuring.speed": "evaluate",
    "evaluate": "evaluate",
    "export": "evaluate",
}


def work_of(step: Step) -> Work:
    """What kind of work a step is, for `cluster.pools`."""
    return "text" if step.name == "encode_text" else WORK[step.call.partition(":")[0]]


def table(config: Config) -> list[Step]:
    """The DAG of one config: of the rows that make a stage, the one by which the config wants it."""
    return [
        step for step in rows(config) if step.output not in STAGES or step.name.startswith(config.origin(step.output))
    ]


def rows(config: Config) -> list[Step]:
    """Every row; each text tower that a stage needs gets one of its own."""
    text_b, text_c = f"text_{config.stage_b.text}", f"text_{config.stage_c.text}"
    text_l = f"text_{config.baseline.text}"
    towers = sorted({config.stage_b.text, config.stage_c.text, config.baseline.text})
    texts = tuple(sorted({text_b, text_c}))
    learning = tuple(f"baseline.{key}" for key in ("model", "loss", "train", "text"))
    encode = config.encode
    from_a, online_a = _latents(config, "latents_a", "stage_a")
    from_c, online_c = _latents(config, "latents_c", "stage_b")
    trained_c = config.trained("stage_c")
    phases_c = (trained_c,) if trained_c != "stage_c" else ()
    unwanted = {"keep": (), "drop": ("duplicates",)}
    repeated = ("duplicates",) if any(view.duplicates == "drop" for view in config.data.views.values()) else ()
    scores = ("aesthetic",) if config.data.scorer else ()
    held = ("held_out",) if config.data.holds_out else ()
    drawn = ("data.captions",) if config.data.captions else ()
    towers_of = tuple(f"{stage}.text" for stage in _drawn_with_any_text(config))
    drawings = [step for name in config.drawn_sets() for step in _drawings(config, name, texts, towers_of)]
    compared = {step.output for step in drawings if step.name != "sample_baseline" or config.eval.baseline}
    scored = [step.output for step in drawings if step.output in compared]
    features, timed = feature_sets(config).values(), ["speed"] if config.eval.speed else []
    views, pieces = partial(_views, config), partial(_pieces, config)

    # fmt: off
    return [
        #    step           makes        from                                  reads                               runs
        Step("fetch",       "metadata",  (),                                   (*_plan(config.data), "seed"),      "fetch:fetch", 3),
        Step("download",    "images",    ("metadata",),                        ("data.image", *["data.attempt"] * (config.data.attempt > 1)), "download:download", 2),
        Step("deduplicate", "duplicates",  ("images",),                        (),                                 "deduplicate:deduplicate"),
        *(Step("score",     made,        ("images",),                          ("data.scorer",),                   "score:score") for made in scores),
        *(
        Step("select",      f"view_{v}",   ("metadata", "images", *unwanted[view.duplicates], *(scores if view.scored else ())), (f"data.views.{v}",), "select:select")
        for v, view in config.data.views.items()),
        *(
        Step("hold_out",    name,        ("metadata", "images", *repeated),    ("data.holdout", *["data.held_out_captions"] * bool(config.data.held_out_captions)), "select:hold_out", 2)
        for name in held),
        *(captions := _captions(config.data)),
        *(
        Step("encode_text", f"text_{t}", ("images", *(step.output for step in captions)), (f"text.{t}", *encode.changed("text")), "encode:encode_text")
        for t in towers),
        Step("train_a",     "stage_a",   ("images", *views("train_a")),        ("stage_a", *pieces("train_a"), "seed"), "train:train_a"),
        Step("import_a",    "stage_a",   (),                                   ("stage_a.weights", "stage_a.model"), "bring:bring"),
        Step("encode_a",    "latents_a", ("images", "stage_a"),                ("sizes.train_b", *encode.changed("latents_a")), "encode:encode_a"),
        Step("train_b",     "stage_b",   _once("images", text_b, *from_a, "stage_a", *views("train_b")), ("stage_b", "compressor", *online_a, *pieces("train_b"), *drawn, "seed"), "train:train_b"),
        Step("import_b",    "stage_b",   (),                                   ("stage_b.weights", "stage_b.model", "compressor.weights", "compressor.model"), "bring:bring"),
        Step("encode_c",    "latents_c", ("images", "stage_b"),                ("sizes.train_c", *encode.changed("latents_c")), "encode:encode_c"),
        Step("train_c",     trained_c,   (*from_c, text_c, *views("train_c")), ("stage_c", *online_c, *drawn, "seed"), "train:train_c"),
        Step("import_c",    "stage_c",   (),                                   ("stage_c.weights", "stage_c.model"), "bring:bring"),
        Step("interpolate", "stage_c",   phases_c,                             ("interpolate", "stage_c.model"),   "interpolate:interpolate"),
        Step("train_previewer", "previewer", _once("images", *from_c, *views("train_previewer")), ("previewer", *online_c, *pieces("train_previewer"), "seed"), "train:train_previewer"),
        Step("train_baseline", "baseline", _once(*from_a, text_l, "stage_a", *views("train_baseline")), (*learning, *online_a, *drawn, "seed"), "train:train_baseline"),
        *drawings,
        *(
        Step("extract",     one.output,  one.inputs,                           one.reads,                          "measuring.extract:extract") for one in features),
        *(
        Step("time_drawing", "speed",    (*texts, *STAGES),                    (*_drawing(), *towers_of, "eval.speed"), "measuring.speed:time_drawing") for _ in timed),
        Step("evaluate",    "scores",    (*scored, *(one.output for one in features), *timed), ("eval", *_perceptual(config)), "evaluate:evaluate", 2),
        Step("export",      "release",   ("metadata", *texts, *STAGES, *phases_c, "samples", "scores"), ("sample", *towers_of), "export:export", 3 if config.brought() else 2),
    ]
    # fmt: on


def _captions(data: DataConfig) -> list[Step]:
    """What adds captions to the source's own, by their names."""
    joined = [
        Step("recap", f"captions_{c}", ("metadata", "images"), (f"data.recaps.{c}",), "caption:recap")
        for c in data.recaps
    ]
    written = [
        Step("caption", f"captions_{c}", ("images",), (f"data.captioners.{c}",), "caption:caption")
        for c in data.captioners
    ]
    return sorted(joined + written, key=lambda step: step.output)


def _drawings(config: Config, name: str, texts: tuple[str, ...], towers_of: tuple[str, ...]) -> list[Step]:
    """What draws the pictures of a prompt set: our model; again, with other seeds, where models are compared; the
    baseline."""
    samples, text_l = samples_of(name), f"text_{config.baseline.text}"
    from_file = name in config.prompt_files()
    asked = (f"eval.prompts.{name}", "eval.limit") if from_file else ("sample.limit",)
    from_data = () if from_file else ("images", *(["held_out"] if config.data.holds_out else []))
    how = (*asked, *_drawing()) if from_file else ("sample",)
    ablated = ("sample.ablations",) if from_file and config.sample.ablations else ()
    previewed = ("previewer",) if "preview" in config.sample.ablations else ()
    again = [NULL] if config.eval.compares and name in config.prompt_sets() else []
    pictures = (*asked, *(f"sample.{key}" for key in ("width", "height", "negative")))
    return [
        Step("sample", samples, (*from_data, *texts, *STAGES, *previewed), (*how, *ablated, *towers_of, "seed"), "sample:sample"),
        *(Step("sample_again", f"{null}_{samples}", (*from_data, *texts, *STAGES), (*how, *towers_of, "seed"), "sample:sample_again") for null in again),
        Step("sample_baseline", f"baseline_{samples}", (*from_data, text_l, "stage_a", "baseline"), (*pictures, "baseline.sample", "seed"), "sample:sample_baseline"),
    ]  # fmt: skip


def _drawing() -> tuple[str, ...]:
    """What decides a picture, beside models, caption and seed."""
    return tuple(f"sample.{key}" for key in SamplingConfig.model_fields)


def _perceptual(config: Config) -> tuple[str, ...]:
    """What LPIPS is measured with, where both of its files are there."""
    loss = config.stage_a.loss
    keys = ("stage_a.loss.perceptual_weights", "stage_a.loss.perceptual_heads")
    return keys if loss.perceptual_weights and loss.perceptual_heads else ()


def _plan(data: DataConfig) -> tuple[str, ...]:
    """What decides which pictures there are, and in which shards they lie."""
    own = ("source", "metadata", "scores", "filters", data.source) if data.source != MIXTURE else ("sources",)
    rules = (*own, "removed", "limit", "shard_rows")
    buckets = () if data.image.frame.square else ("data.image.size", "data.image.max_aspect")
    pictures = ("data.per_picture",) if data.captions else ()
    return (*(f"data.{key}" for key in rules), *buckets, *pictures)


def _latents(config: Config, name: str, encoder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What trainings make latents of, and read for it: those of a step, or, online, pictures and the encoder itself."""
    if getattr(config.encode, name).online:
        return ("images", encoder), config.encode.changed(name)
    return (name,), ()


def _drawn_with_any_text(config: Config) -> list[str]:
    """Stages whose text tower who draws has to name: a training's fingerprint names it, existing weights do not."""
    return [stage for stage in ("stage_b", "stage_c") if not config.is_trained(stage)]


def _views(config: Config, step: str) -> tuple[str, ...]:
    """What says which of the pictures a training sees."""
    return (*config.views_of(step), *(["held_out"] if config.data.holds_out else []))


def _pieces(config: Config, step: str) -> tuple[str, ...]:
    """Into what pieces a training cuts its batches, where that shows."""
    return tuple(f"{key}.micro_batch" for key in config.cut_up(step))


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
