"""`config`: the composed config with a comment for every key; `config list`: confs, groups, options;
`config reference`: every key with type, default, range and meaning, as Markdown."""

from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.settings import compose, reference
from pipeline.settings.comments import commented_yaml
from pipeline.settings.words import Words
from pipeline.verbs.configured import configured


def handle(words: Words) -> None:
    if words.rest == ["list"]:
        print("confs: " + ", ".join(compose.names()))
        for group, options in compose.groups().items():
            print(f"{group}: " + ", ".join(options))
        return
    if words.rest == ["reference"]:
        print(reference.markdown(), end="")
        return
    if words.rest:
        raise UsageError(
            f"'{words.rest[0]}' is not key=value; config takes conf=NAME and overrides, or list or reference"
        )
    loaded, _ = configured(words)
    order(table(loaded), loaded.targets)  # refuses unknown ones
    print(commented_yaml(loaded), end="")
