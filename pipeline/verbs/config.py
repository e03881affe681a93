"""`config`: the composed config with a comment for every key; `config list`: confs, groups, options."""

from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.settings.words import Words
from pipeline.verbs.configured import configured


def handle(words: Words) -> None:
    if words.rest == ["list"]:
        print("confs: " + ", ".join(compose.names()))
        for group, options in compose.groups().items():
            print(f"{group}: " + ", ".join(options))
        return
    if words.rest:
        raise UsageError(f"'{words.rest[0]}' is not key=value; config takes conf=NAME and overrides, or the word list")
    loaded, _ = configured(words)
    order(table(loaded), loaded.targets)  # refuses unknown ones
    print(compose.commented_yaml(words.required_conf(), words.overrides), end="")
