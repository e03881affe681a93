"""From a conf's name and overrides to a checked `Config`: Hydra composes the YAML files, pydantic checks the result.

What either of them has against it becomes a sentence with the key and the nearest valid one.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from datasets.source_settings import MIXTURE, SourceName
from pipeline.errors import UsageError, nearest
from pipeline.settings import overrides as overriding
from pipeline.settings.config import Config
from pipeline.settings.keys import flatten, is_below
from pipeline.store.redact import hide, holds_password

CONF = Path(__file__).parents[2] / "conf"
PLAINER = {  # than pydantic's own words
    "model_type": "a section with keys of its own is needed here",
    "model_attributes_type": "a section with keys of its own is needed here",
    "dict_type": "names with values are needed here, such as {name: value}",
    "tuple_type": "a list is needed here, such as [one, two]",
    "int_parsing_size": "input is far out of range",
    "bool_parsing": "input should be a valid boolean (true, false)",
    "bool_type": "input should be a valid boolean (true, false)",
}
WRITTEN = "as_written"  # the name of a resolver
INTERNAL = {"base"}  # shared defaults, not a conf that one runs


def names() -> list[str]:
    """The confs that `conf=` may name."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in INTERNAL)


def groups() -> dict[str, list[str]]:
    """Config groups (`scale`, `data`, ...) with their options."""
    folders = (path for path in CONF.iterdir() if path.is_dir())
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in sorted(folders)}


def load(conf: str, overrides: list[str]) -> Config:
    """Compose and check a conf.

    Raises:
        UsageError: unknown conf, group option or key, wrong type, or values that do not fit together.
    """
    return check(compose(conf, overrides))


def check(tree: dict[str, Any]) -> Config:
    """The config of a composed tree.

    Raises:
        UsageError: unknown key, wrong type, or values that do not fit together.
    """
    for key, value in flatten(tree).items():
        check_no_password(key, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(explain(error, tree)) from None


def check_no_password(key: str, value: Any) -> None:
    """Refuse a URI with a password in it: whatever a config says is written into manifests, records and MLflow.

    Raises:
        UsageError: says where it belongs, and not what it is.
    """
    if holds_password(value):
        raise UsageError(
            f"{key}: a URI must not hold a password or a secret key; leave it out and give it in the environment "
            "(AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; MLFLOW_TRACKING_USERNAME and _PASSWORD); "
            "proxies are asked without"
        )


def compose(conf: str, overrides: list[str]) -> dict[str, Any]:
    """The composed config as plain data, before keys and types are checked."""
    if conf not in names():
        raise UsageError(f"conf={conf}: there is no such conf{nearest(conf, names())}; there are {', '.join(names())}")
    for word in overrides:
        _check_override(word)
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = OmegaConf.to_container(_hydra(conf, overrides), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain_hydra(error)) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _hydra(conf: str, overrides: list[str]) -> Any:
    """Hydra's composition, which takes any key: YAML need not spell out all, and which there are, pydantic knows.

    What is taken as it is written comes in by a resolver: nothing in it means anything, and YAML may refer to it.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    pairs = [(word, *word.partition("=")[::2]) for word in overrides]
    texts = {key: overriding.literal(key, value) for _, key, value in pairs if overriding.is_literal(key, value)}
    words = [word if key in groups() else f"++{word}" for word, key, _ in pairs if key not in texts]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(conf, overrides=words)
    OmegaConf.register_new_resolver(WRITTEN, list(texts.values()).__getitem__, replace=True)
    OmegaConf.register_new_resolver("oc.env", _from_environment, replace=True)
    for place, key in enumerate(texts):
        OmegaConf.update(composed, key, f"${{{WRITTEN}:{place}}}", force_add=True)
    _complete_sources(composed)
    return composed


def _from_environment(name: str, *default: str | None) -> str | None:
    """OmegaConf's own `oc.env`; what it gives, nobody is told but who uses it."""
    from omegaconf.resolvers import oc

    if name in os.environ:
        hide(os.environ[name])
    found: str | None = oc.env(name, *default)
    return found


def _complete_sources(composed: Any) -> None:
    """Give each source of a mixture what `conf/data/` says of it alone, where it is not said otherwise."""
    from omegaconf import OmegaConf

    sources = OmegaConf.select(composed, "data.sources")
    for place, source in enumerate(sources or ()):
        name = source.get("source") if OmegaConf.is_dict(source) else None
        if name in get_args(SourceName) and name != MIXTURE:
            conf = OmegaConf.load(CONF / "data" / f"{name}.yaml")
            own = {key: conf._get_node(key) for key in ("metadata", "scores", "filters", name) if key in conf}
            sources[place] = OmegaConf.merge(own, source)


def _check_override(word: str) -> None:
    """Refuse what Hydra would accept but we do not: its prefixes, its own keys, unknown options of a group."""
    key, separator, value = word.partition("=")
    if not separator:
        raise UsageError(f"'{word}' is neither a flag nor key=value")
    if key.startswith(("+", "~", "hydra.")):
        raise UsageError(f"{word}: {key} is no key of the config; give key=value without any prefix")
    overriding.check_places(key)
    if key in groups() and value not in groups()[key]:
        options = groups()[key]
        raise UsageError(f"{word}: there is no such option{nearest(value, options)}; {key} has {', '.join(options)}")


def _explain_hydra(error: Exception) -> str:
    """Hydra's or OmegaConf's error as a sentence with the key or the word."""
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    text = str(error).splitlines()[0]
    if isinstance(error, OmegaConfBaseException):
        key = re.sub(r"\[(\d+)\]", r".\1", str(error.full_key))  # items of lists, as overrides name them
        missing = f"a value is needed; give {key}=..."
        return f"{key}: {missing if isinstance(error, MissingMandatoryValue) else text}"
    text = text.replace("++", "")
    ambiguous = re.match("Ambiguous value for argument '(.*)'", text)
    unreadable = ambiguous[1] if ambiguous else getattr(error, "override", "").removeprefix("++")
    if unreadable:
        key, _, value = unreadable.partition("=")
        return f"{unreadable}: not readable{overriding.hint_at_quotes(key, value, _read)}"
    if text.startswith(merging := "Error merging override "):
        return f"{text.removeprefix(merging)}: a list on the way there has no such item"
    return text


def _read(word: str) -> Any:
    """The value in an override, as Hydra reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"++{word}").value()
    except HydraException as error:
        raise ValueError(str(error)) from None


def explain(error: ValidationError, tree: dict[str, Any]) -> str:
    """The first three errors of pydantic, each as a sentence with its dotted key."""
    found: dict[str, list[Any]] = {}
    for item in error.errors():
        found.setdefault(_dotted(item, tree), []).append(item)
    exact = [key for key in found if not any(other.startswith(f"{key}.") for other in found)]
    return _printable("; ".join(_sentence(key, found[key], tree) for key in exact[:3]))


def _dotted(item: Any, tree: dict[str, Any]) -> str:
    """The key of an error, without the names of union members that pydantic puts into its path."""
    node: Any = tree
    parts = []
    for part in item["loc"]:
        if (isinstance(node, list) and part in range(len(node))) or (isinstance(node, dict) and part in node):
            node = node[part]
            parts.append(str(part))
    if item["type"] == "missing":
        parts.append(str(item["loc"][-1]))
    return ".".join(parts)


def _sentence(key: str, items: list[Any], tree: dict[str, Any]) -> str:
    """What is said against a key's value, which is several things where it may be of several types."""
    item, *others = items
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        known = dict.fromkeys(name for name in (*_fields(Config), *flatten(tree)) if not is_below(name, key))
        hint = overriding.hint_at_group(key, tree.get(key), groups())
        return f"{key}: there is no such key{hint or overriding.hint_at_key(key, known, tree, _fits)}"
    if not key:
        return message
    if item["loc"][-1] == "[key]":
        return f"{key}: {message.replace('String', 'the name')}"
    message = PLAINER.get(item["type"], message).removesuffix(", unable to parse string as an integer")
    silent = item["type"] in ("value_error", "missing") or isinstance(item["input"], dict | list)
    value = "" if silent else f"={_shown(item['input'])}"
    words = [f" or {other['ctx']['expected']}" for other in others if other["type"] == "literal_error"]
    return f"{key}{value}: {message[0].lower()}{message[1:]}{''.join(words)}"


def _fits(tree: dict[str, Any], key: str) -> bool:
    """Whether nothing is said against a key's value."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return not any(is_below(_dotted(item, tree), key) for item in error.errors())
    return True


def _shown(value: Any) -> str:
    """A value as it is written in YAML, not too long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _printable(text: str) -> str:
    """A text without what would move the cursor or change colours."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of a model's fields, and of the models in them."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                item = "0." if get_origin(field.annotation) in (tuple, list) else ""
                yield from _fields(part, f"{prefix}{name}.{item}")
