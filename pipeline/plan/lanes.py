"""What ranks read of the data between them: told where it is much more than the data, with what would change it."""

from collections.abc import Iterator, Sequence

from datasets.reading.order import share_read
from pipeline.plan.dag import Planned
from pipeline.settings.config import TRAININGS, Config

USUAL = 64  # lanes: as many as the paper's ranks
MUCH = 1.25  # times the data


def remarks(planned: Sequence[Planned], config: Config) -> Iterator[str]:
    """A sentence for each training that is to run and whose ranks read the same shards."""
    for item in planned:
        if item.state == "done" or item.step.name not in TRAININGS:
            continue
        for key in TRAININGS[item.step.name]:
            training = config.trainings().get(key)
            world = config.ranks_of(item.step.name)
            if training is None or (times := share_read(training.shared_lanes, world)) <= MUCH:
                continue
            lanes, ranks = training.shared_lanes, config.ranks_key(item.step.name)
            yield (
                f"{item.step.name}: {world} workers read {times:.3g} times the data in each pass, since samples come "
                f"in {lanes} lane{'s' * (lanes > 1)}; {_remedy(key, training.lanes, lanes, world, ranks)}"
            )


def _remedy(key: str, asked: int, lanes: int, world: int, ranks: str) -> str:
    if asked > lanes:
        return f"{asked} are asked for ({key}.lanes), but no more divide all batches"
    fitting = [number for number in range(2, lanes + 1) if lanes % number == 0]
    fewer = f", or {ranks}={max((n for n in fitting if n < world), default=1)}" if lanes > 1 else ""
    return f"{key}.lanes={max(USUAL, world)} gives each its own{fewer}"
