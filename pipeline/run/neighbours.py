"""Other runs on the same root: what is planned as done must still be there, and what they read must stay."""

from collections.abc import Iterable

from pipeline.errors import LeaseHeld
from pipeline.store import claims, deleting, readers
from pipeline.store.artifacts import Artifact, Store
from pipeline.terminal import console


def tell(text: str) -> None:
    """Say something about another run."""
    console.print(text, markup=False)


def check_standing(store: Store, artifacts: Iterable[Artifact]) -> None:
    """Look again at what was done when a run was planned, now that its record keeps `gc` away from it; and tidy up.

    Raises:
        LeaseHeld: it is gone, or somebody has begun to delete it or to build it anew.
    """
    for artifact in artifacts:
        digest = artifact.manifest["fingerprint"]
        owner = claims.holder(store.root, claims.artifact(artifact.name, digest), tell)
        if owner and owner.doing != deleting.TIDIED:
            raise LeaseHeld(f"{artifact.path} is being {owner.doing} by {owner}; wait for that, then start again")
        if store.find(artifact.name, digest) is None:
            raise LeaseHeld(f"{artifact.path} was deleted while this run began; start it again")
        deleting.tidy_alone(store.root, artifact, tell)


def check_unread(store: Store, name: str, digest: str, own: str) -> None:
    """Refuse to build an artifact anew while a run other than `own` reads it.

    Raises:
        LeaseHeld: one that is at work wants it, or what is made from it.
    """
    for run in readers.runs(store.root, tell):
        if run.live and run.id != own and (name, digest) in readers.Wants(store).of([run]):
            raise LeaseHeld(
                f"{store.path(name, digest)} is in use by run {run.id} of {run.user}; wait for that run, or stop it"
            )
