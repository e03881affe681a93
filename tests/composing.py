"""Hydra's composition of the same files, each once: it takes a third of a second, and hundreds of tests want one.

Only what a conf and its groups choose is kept. Hydra itself reads and applies plain values anew each time.
"""

import copy
import re
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from pipeline.settings import compose

CHECKOUT = str(compose.CONF)
_compose = hydra.compose
_made: dict[tuple[str, ...], Any] = {}


def once(config_name: str, overrides: list[str]) -> Any:
    """What `hydra.compose` makes of the confs of this checkout; of those that a test has made, it is asked itself."""
    if str(compose.CONF) != CHECKOUT:
        return _compose(config_name, overrides)
    plain = [word for word in overrides if re.match(r"\+\+[\w.]+=", word)]
    chosen = [word for word in overrides if word not in plain]
    loader = GlobalHydra.instance().config_loader()
    values = OverridesParser.create(loader).parse_overrides(plain)
    loader.validate_sweep_overrides_legal(values, RunMode.RUN, from_shell=False)
    if (key := (config_name, *chosen)) not in _made:
        _made[key] = _compose(config_name, chosen)
    config = copy.deepcopy(_made[key])
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config
