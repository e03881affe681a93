"""Fingerprints of every conf at every scale, as they are in roots that people have: who changes one makes work stale.

They are of the first roots, whose inputs counted by less than their content (`store.earlier`); all else counts as ever.
A change on purpose (a step's version is raised, say) is written by `python -m tests.pipeline.plan.test_fingerprints`.
"""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.plan.dag import fingerprints, order
from pipeline.plan.table import table
from pipeline.settings import compose
from pipeline.store import earlier

GOLDEN = Path(__file__).with_name("fingerprints.json")
SCALES = ("local", "micro", "single_gpu", "paper")
CONFS = {  # with what they cannot be composed without; weights need not be there. Other confs only name targets.
    "stage_c": ["data=openmoji"],
    "finetune_c": ["data=openmoji"],
    "interpolate": ["data=openmoji", "interpolate.first=w/a.safetensors", "interpolate.second=w/b.safetensors"],
}


def digests(conf: str, scale: str) -> dict[str, str]:
    """Fingerprint of every artifact that a conf can make."""
    config = compose.load(conf, [f"scale={scale}", *CONFS[conf]])
    steps = table(config)
    prints = fingerprints(
        order(steps, [step.output for step in steps]), lambda key: config.lookup(key, earlier.identify)
    )
    return {name: fingerprint.digest for name, fingerprint in prints.items()}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("conf", CONFS)
def test_fingerprints_are_those_of_the_roots_that_people_have(conf, scale):
    assert digests(conf, scale) == json.loads(GOLDEN.read_text())[conf][scale]


def test_the_other_confs_only_name_targets():
    for conf in compose.names():
        own = yaml.safe_load((compose.CONF / f"{conf}.yaml").read_text())
        assert conf in CONFS or own.keys() == {"defaults", "targets"}, conf


if __name__ == "__main__":
    found = {conf: {scale: digests(conf, scale) for scale in SCALES} for conf in CONFS}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
