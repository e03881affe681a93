"""`infra render`: the files that hand a run to KubeRay, Slurm, AWS or plain hosts, from what the config says of them.

`conf/cluster/*.yaml` is the one truth about a cluster; the templates say what a platform makes of it. What is in
`infra/` is rendered by the commands that its README tells. To add a platform: a folder in `templates/`, its word in
`settings.resources.Job`, a conf, and a row of its README.
"""

import importlib.metadata
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.models.known_weights import FOLDER, how_to_get
from pipeline.plan.dag import order
from pipeline.plan.table import table
from pipeline.plan.weights import needed_files
from pipeline.run.delivery import deliver
from pipeline.settings import compose
from pipeline.settings.config import Config
from pipeline.settings.resources import POOL_LABEL, WORKERS, Job, Nodes
from pipeline.settings.words import Words
from pipeline.terminal import console
from pipeline.verbs.infra import monitoring, phases
from settings import TABLE

TEMPLATES = Path(__file__).parent / "templates"
IMAGE_FOLDER = "/opt/wuerstchen"  # the checkout in the image, see infra/docker/Dockerfile
ON_A_STORE = ("kuberay", "aws")  # platforms whose nodes share no disk


def handle(words: Words) -> None:
    """Write the files of the cluster's platform into `out=`.

    Raises:
        UsageError: another word, no `out=`, a cluster that needs none, or something that its nodes could not read.
    """
    if words.rest != ["render"]:
        raise UsageError("infra knows: render conf=NAME cluster=NAME out=DIR, and the overrides of the run")
    if not (out := words.own.get("out")):
        raise UsageError("infra render needs out=DIR, the folder for the files")
    config = compose.load(words.required_conf(), words.overrides)
    files = dict(render(config, words.root, f"run {words.same}"))
    deliver(((name, text.encode) for name, text in files.items()), storage.absolute(out))
    for name in files:
        console.print(storage.join(storage.absolute(out), name), markup=False)


def render(config: Config, root: str, run: str) -> Iterator[tuple[str, str]]:
    """The files of the platform that `config.cluster.job` names: name and text of each.

    `run` is the command that the job is to do, the words after `python -m pipeline`, quoted for a shell.
    """
    job, nodes = config.cluster.job, config.cluster.nodes
    if job is None or nodes is None:
        those = ", ".join(name for name in compose.groups()["cluster"] if _is_handed_over(name))
        raise UsageError(f"cluster.job and cluster.nodes say to what a run is handed, and are null; take {those}")
    _check_readable(config, job, root)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / job.platform),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"quoted": shlex.quote, "whole": math.ceil}
    values = _values(config, job, nodes, root, run)
    for template in environment.list_templates():
        if text := environment.get_template(template).render(values):  # some are for several pools only
            yield template, text
    if job.platform == "slurm":
        for name, only in phases.parts(config).items():
            file, own = f"{name}.sbatch", config.cluster.pools[name].nodes
            part = {"file": file, "pool": name, "nodes": own, "only": only}
            yield file, environment.get_template("job.sbatch").render(values | part)
    yield from monitoring.files(config, job, values["name"])


def _values(config: Config, job: Job, nodes: Nodes, root: str, run: str) -> dict[str, Any]:
    """What the templates may name."""
    return {
        "job": job,
        "nodes": nodes,
        "name": "wuerstchen-" + "-".join(target.replace("_", "-") for target in config.targets[:1]),
        "command": f"python -m pipeline {run}",
        "same": run.removeprefix("run "),
        "arguments": shlex.split(run)[1:],
        "root": root.rstrip("/"),
        "tracking": config.tracking.uri,
        "ray": importlib.metadata.version("ray"),
        "folder": IMAGE_FOLDER,
        "seconds": math.ceil(job.hours * 3600),
        "time": "{}:{:02}:00".format(*divmod(math.ceil(job.hours * 60), 60)),
        "pools": {WORKERS: nodes} | {name: pool.nodes for name, pool in config.cluster.pools.items()},
        "starts": config.cluster.starts_nodes,
        "label": POOL_LABEL,
        "file": "job.sbatch",
        "only": "",
        "drain_s": job.save_s - job.save_s // 6,  # of the grace period; the rest is for the processes to end in
    }


def _is_handed_over(cluster: str) -> bool:
    return bool(compose.compose("stage_c", [f"cluster={cluster}"])["cluster"].get("job"))


def _check_readable(config: Config, job: Job, root: str) -> None:
    """Refuse what lies on this machine alone, before anything is allocated.

    Raises:
        UsageError: names the key, and how it gets to where nodes can read it.
    """
    on_a_store = job.platform in ON_A_STORE

    def readable(place: str) -> bool:
        return storage.is_remote(place) or (not on_a_store and Path(place).is_absolute())

    kind = "a URI, such as s3://bucket/prefix" if on_a_store else "an absolute path that all nodes mount, or a URI"
    if not readable(root):
        raise UsageError(f"root={root}: the nodes of {job.platform} share no such folder; give {kind}")
    steps = order(table(config), config.targets)
    for key, place in (config.paths(TABLE) | needed_files(config, steps)).items():
        if not readable(place):
            there = storage.join(root, FOLDER, place.removeprefix(f"{FOLDER}/"))
            raise UsageError(f"{key}={place} lies on this machine; give {key}={there}, and {how_to_get(there)}")
