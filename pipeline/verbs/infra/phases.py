"""The parts of a run that go before its trainings, on nodes of their own (`cluster.pools`): one for each pool."""

import shlex

from pipeline.errors import UsageError
from pipeline.plan.dag import order
from pipeline.plan.table import table, work_of
from pipeline.settings.config import Config


def parts(config: Config) -> dict[str, str]:
    """By pool, in their order, the words that leave a run to what the pool takes, quoted for a shell.

    A step belongs to a part if all that it needs is in that part or in one before it; the rest is for the trainings'.

    Raises:
        UsageError: nothing of the run belongs to a pool.
    """
    steps, ahead, found = order(table(config), config.targets), set[str](), dict[str, str]()
    for name, pool in config.cluster.pools.items():
        outputs = []
        for step in steps:
            if work_of(step) in pool.work and ahead.issuperset(step.inputs):
                ahead.add(step.output)
                outputs.append(step.output)
        if not outputs:
            raise UsageError(f"cluster.pools.{name}: no step of this run can be done there before the trainings")
        device = "" if pool.nodes.gpus else " cluster.device=cpu"
        found[name] = shlex.quote(f"targets=[{','.join(outputs)}]") + device
    return found
