"""The verb `data`: which of its own verbs is asked for, of what."""

from datasets.files import storage
from pipeline.errors import UsageError
from pipeline.settings.words import Words
from pipeline.verbs.configured import command, configured, configured_run
from pipeline.verbs.data import dedup, forget, funnel, lost, repair, retry, trace

BUILDING = (["repair"], ["retry"], ["dedup"])  # what ends in a run


def handle(words: Words) -> None:
    if words.rest == ["forget"]:  # concerns all that lies under the root, whatever its config
        if words.conf or words.overrides:
            raise UsageError("data forget takes keys=, urls=, from=FILE and root=; it concerns every conf's pictures")
        forget.forget(storage.absolute(words.root), words.own, words.json)
        return
    if words.own.keys() & {"keys", "urls", "from"}:
        raise UsageError("keys=, urls= and from= go with `data forget`")
    loaded, root = (configured_run if words.rest in BUILDING else configured)(words)
    match words.rest:
        case ["funnel"]:
            funnel.funnel(loaded, root, words.json)
        case ["verify"]:
            repair.verify(loaded, root, words)
        case ["repair"]:
            repair.repair(loaded, root, words, command())
        case ["lost"]:
            lost.lost(loaded, root, words.json)
        case ["retry"]:
            retry.retry(loaded, root, words, command())
        case ["dedup"]:
            dedup.dedup(loaded, root, words, command())
        case ["trace", key]:
            trace.trace(loaded, root, key, words.json)
        case _:
            raise UsageError("data needs one of: funnel, lost, verify, repair, trace KEY, retry, dedup, forget")
