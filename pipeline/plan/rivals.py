"""What steps that draw or measure would find: prompts that come again, rivals' or real pictures that lack.

Seen before anything is drawn or scored, as far as it can be: which captions of the data are drawn, only the data tell,
or the samples where these are there.
"""

import json
from collections.abc import Sequence

from datasets.reading import prompts
from datasets.reading.rivals import Rival, Wanted
from pipeline.errors import UsageError
from pipeline.models import contests
from pipeline.plan import recorded
from pipeline.plan.dag import Planned, to_do
from pipeline.plan.weights import gone_files, needed_files
from pipeline.settings.config import Config
from pipeline.settings.evaluation import RUN, samples_of
from pipeline.store.artifacts import Store
from pipeline.store.readers import asked_for


def remarks(config: Config, planned: Sequence[Planned]) -> list[str]:
    """What prompt files, rivals and real pictures lack, in sentences, of those that steps to do read.

    Of what is not there at all, nothing: that is `weights.missing`'s to tell.

    Raises:
        DataError: there are no prompts, or more of a rival's pictures are missing or no good than `eval.allow_missing`.
    """
    steps = to_do(planned)
    gone = gone_files(config, steps)
    read = needed_files(config, steps).keys() - gone.keys()
    places = [
        (name, place)
        for rival in config.eval.rivals
        for name in config.prompt_sets()
        if (place := config.eval.rival_path(rival, name)) and f"eval.{place[0]}" in read
    ]
    wanted: dict[str, list[Wanted]] = {}
    found, compared = [], {name for name, _ in places}
    for name, path in config.prompt_files().items():
        key = f"eval.prompts.{name}"
        if key in read or (name in compared and key not in gone):
            file = prompts.read(path, config.eval.limit, config.seed, key)
            wanted[name] = [(one.key, one.text) for one in file.prompts]
            if file.repeated:
                found.append(f"{key}: {file.repeated} of {file.read:,} prompts at {path} come again and count once")
            if file.blank:
                first = f"{file.blank:,} places in {path} have no prompt and are left out, the first {file.first_blank}"
                found.append(f"{key}: {first}")
    done = {item.step.output: item.artifact for item in planned if item.state == "done" and item.artifact}
    for name, place in places:
        if name not in wanted and (samples := done.get(samples_of(name))):
            wanted[name] = [(row["key"], row["caption"]) for row in json.loads(samples.read("captions.json"))]
        found += _lacking(config, place, name, wanted.get(name))
    for name, path in config.eval.distances.references.items():
        key = f"eval.distances.references.{name}"
        if key in read:
            good, told = contests.usable(Rival(path, key), [], name, config.eval.allow_missing)
            found += [f"{key}: {told}; {len(good):,} are compared with"] * bool(told)
    return found


def _lacking(config: Config, place: tuple[str, str], name: str, wanted: list[Wanted] | None) -> list[str]:
    """What a rival lacks for a prompt set, where it may; while the prompts are not known, what is wrong with any."""
    key, path = f"eval.{place[0]}", place[1]
    rival = Rival(path, key)
    if wanted is None:
        every = rival.everything()
        findings = rival.examine(every)
        return [f"{key}: of {len(every):,} pictures at {path}, {findings.told()}"] * bool(findings.lacking)
    findings = rival.examine(wanted)
    contests.require(findings, key, path, name, len(wanted), config.eval.allow_missing)
    left = f"{len(findings.usable):,} are compared"
    return [f"{key}: of {len(wanted):,} pictures for {name}, {findings.told()}; {left}"] * bool(findings.lacking)


def with_runs(config: Config, root: str) -> Config:
    """The same config with the samples of each rival that is another run of the root in its place.

    Raises:
        UsageError: there is no such run, or it has drawn none of the prompt sets.
    """
    rivals = dict(config.eval.rivals)
    for name, place in rivals.items():
        if isinstance(place, str) and place.startswith(RUN):
            rivals[name] = _samples(root, place.removeprefix(RUN), f"eval.rivals.{name}={place}", config)
    if rivals == config.eval.rivals:
        return config
    tree = config.model_dump()
    tree["eval"]["rivals"] = rivals
    return Config.model_validate(tree)


def _samples(root: str, run: str, asked: str, config: Config) -> dict[str, str]:
    try:
        digests = asked_for(recorded.record(root, run))
    except UsageError as error:
        raise UsageError(f"{asked}: {error}") from None
    found = {
        name: (output, digests[output]) for name in config.prompt_sets() if (output := samples_of(name)) in digests
    }
    made = {name: Store(root).find(*which) for name, which in found.items()}
    places = {name: artifact.path for name, artifact in made.items() if artifact}
    if not places:
        raise UsageError(f"{asked}: that run has drawn none of the prompt sets {', '.join(config.prompt_sets())}")
    return places
