"""The sections of the config that say with what a run works: devices, time, where it is tracked."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from settings import PLACE, Settings, Text

Work = Literal["data", "text", "encode", "train", "evaluate"]
WORKERS = "workers"  # the pool of `cluster.nodes`
POOL_LABEL = "wuerstchen-pool"  # of a node, in Ray


class Encoders(Settings):
    """The pool of encoding and sampling actors."""

    min: Annotated[int, Field(ge=1, le=100_000)]
    """Actors from the start."""
    max: Annotated[int, Field(ge=1, le=100_000)]
    """Actors at most."""
    gpus: float = Field(1.0, gt=0.0, le=1.0)
    """Share of a GPU that each actor takes, where there are any."""

    @model_validator(mode="after")
    def _min_is_below_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; lower it, or raise max")
        return self


class Cache(Settings):
    """Files of artifacts on the own disk of each node that trains, hashed once a node."""

    folder: Annotated[Text | None, PLACE] = None
    """A local folder on each node; null: no cache.

    Without one, local files are read in place, those of an object store anew each epoch."""
    gib: float = Field(100.0, ge=0.001, le=10.0**6)
    """Room that the cache may take, GiB; what was read longest ago goes first."""


class Nodes(Settings):
    """The nodes of a cluster that work; a head on which the driver alone runs is not among them."""

    count: Annotated[int, Field(ge=1, le=100_000)]
    """Nodes."""
    gpus: Annotated[int, Field(ge=0, le=64)]
    """GPUs of each."""
    cpus: Annotated[int, Field(ge=1, le=4096)]
    """CPU cores of each that Ray may use."""
    memory_gib: Annotated[float, Field(ge=0.5, le=65_536.0)]
    """Memory of each that Ray may use, GiB; a quarter of it is shared memory, for Ray's object store and NCCL."""
    kind: Text | None = None
    """What the platform calls such a node: an instance type of AWS, a feature of Slurm, on Kubernetes the value of the
    label `nvidia.com/gpu.product`; null: any."""


class Pool(Settings):
    """Nodes of their own for some kinds of work, beside `cluster.nodes`, which take the trainings and all others."""

    work: Annotated[tuple[Literal["data", "text", "encode", "evaluate"], ...], Field(min_length=1)]
    """What runs there: `data` (fetch, download, deduplicate, select), `text` (hidden states of captions), `encode`
    (latents, captions and scores of pictures), `evaluate` (drawing, measuring, the release)."""
    nodes: Nodes
    """Its nodes; `count` at most, where they are started as they are needed."""


class Alerts(Settings):
    """When Prometheus calls somebody, beside what `cluster.stall_s` and `data.download.max_lost` say."""

    checkpoint_minutes: Annotated[float, Field(gt=0.0, le=100_000.0)] = 60.0
    """Minutes without a new checkpoint of a training that goes on."""
    mfu: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Share of the devices' peak FLOP/s below which a training is slow."""


class Job(Settings):
    """How a run is handed to a platform, for `infra render`."""

    platform: Literal["kuberay", "slurm", "aws", "hosts"]
    """What the files are made for."""
    image: Text = "wuerstchen:0.1.0"
    """Container image of head, workers and submitter, where there are containers."""
    postgres_image: Text = "postgres:17-bookworm"
    """Image of the Postgres behind Kubernetes' MLflow server: one that is made on Debian, best by its digest."""
    hours: Annotated[float, Field(gt=0.0, le=100_000.0)] = 24.0
    """Hours after which the platform ends a job; Slurm's are queued again, and go on."""
    save_s: Annotated[int, Field(ge=10, le=86_400)] = 120
    """Seconds that a node is given to save before it is taken away: longer than the largest checkpoint takes."""
    restarts: Annotated[int, Field(ge=0, le=1000)] = 10
    """How often a failed job is started again; never where the config or the data are to blame."""
    queue: Text | None = None
    """Kueue's local queue, or Slurm's partition."""
    account: Text | None = None
    """Slurm's account."""
    priority: Text | None = None
    """Kubernetes' priority class, or Slurm's quality of service."""
    secret_name: Text | None = None
    """Kubernetes' secret with the store's credentials as environment; null: pods have a role."""
    pull_secret_name: Text | None = None
    """Kubernetes' secret for the image's registry."""
    fabric: dict[Text, Annotated[int, Field(ge=1, le=64)]] = Field(default_factory=dict)
    """Network cards of a node that NCCL uses: on Kubernetes the names of the resources, such as
    `vpc.amazonaws.com/efa`, on AWS `efa`, each with how many; none: Ethernet."""
    region: Text | None = None
    """AWS's region."""
    alerts: Alerts = Alerts()
    """When Prometheus calls somebody."""
    hosts: tuple[Text, ...] = ()
    """Names of plain hosts that are reached by ssh; the first is the head, and works too."""


class Cluster(Settings):
    """Where the work runs. Nothing here changes a result, so nothing here enters a fingerprint."""

    address: Text | None
    """Address of a running Ray (`auto` on one of its nodes); null: one is started here and stopped at the end."""
    num_cpus: Annotated[int, Field(ge=1, le=100_000)] | None
    """CPU cores that a Ray started here may use (a running one knows its own); null: all."""
    device: Literal["auto", "cpu", "cuda"]
    """What models run on; auto: GPUs where there are any. cuda refuses a cluster without GPUs."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=100_000)]
    """Cores of a training rank on a running Ray; on one started here, ranks share all of them."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=64)]
    """GPUs of a training rank, where there are any."""
    gpu_memory_gib: Annotated[float, Field(ge=0.1, le=4096.0)] | None = None
    """Memory of a GPU, GiB, against which `plan` and `run` hold what a training needs; null: unknown, no check."""
    price_per_hour: Annotated[float, Field(ge=0.0, le=10_000.0)] | None = None
    """Price of a device-hour, in any currency, for what `plan` and `report hours` tell; null: unknown."""
    nodes: Nodes | None = None
    """What the cluster is made of, for `infra render`; trainings are held against it. null: unknown."""
    pools: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9-]{0,19}$")], Pool] = Field(default_factory=dict)
    """Nodes of their own for some kinds of work, by name: small letters, digits, dashes.

    KubeRay and AWS then start the nodes of each, and of `cluster.nodes`, as they are needed, from none on; on Slurm
    each is a job, the trainings' after the others."""
    job: Job | None = None
    """How a run is handed to it, for `infra render`; null: it is there already."""
    encoders: Encoders
    """The pool of encoding and sampling actors."""
    cache: Cache = Cache()
    """Where nodes keep what trainings read; worth it where the root is far away."""
    stall_s: Annotated[float, Field(ge=1.0, le=604_800.0)] = 600.0
    """Seconds without a sign of progress from a rank, after which a training is ended and tried again.

    It must be longer than a checkpoint takes to be read."""
    patience_s: Annotated[float, Field(ge=0.0, le=604_800.0)] = 600.0
    """Seconds for which a root that is away, a store or a shared disk, is waited for: so long a request is made again
    while it fails for a reason that may pass."""
    retries: Annotated[int, Field(ge=0, le=1000)]
    """Further attempts at a step after a failure of the infrastructure; counted anew where it got further meanwhile."""
    min_workers: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewest ranks that a training goes on with once nodes are lost; null: it waits for new nodes.

    One that has no more ranks than that anyway (`ranks`) waits too."""
    replacement_s: Annotated[float, Field(ge=0.0, le=604_800.0)] = 600.0
    """Seconds that lost nodes have to be replaced in, before a training goes on with fewer ranks."""
    code: Literal["there", "sent"] = "there"
    """How our code gets to the nodes of a running Ray. there: they have it, in an image or on a disk that they share;
    sent: Ray sends the driver's."""

    @model_validator(mode="after")
    def _each_work_has_one_pool(self) -> Self:
        taken: dict[str, str] = {}
        for name, pool in self.pools.items():
            for work in pool.work:
                if taken.setdefault(work, name) != name:
                    raise ValueError(f"pools: {taken[work]} and {name} both take {work}; leave it to one of them")
        if self.pools and (self.nodes is None or self.job is None):
            raise ValueError("pools are beside nodes, for a job; give cluster.nodes and cluster.job too")
        if taboo := {WORKERS, "job", "head"}.intersection(self.pools):
            raise ValueError(f"pools: {min(taboo)} is what something else is called; give the pool another name")
        if self.pools and self.job and self.job.platform == "hosts":
            raise ValueError("pools: plain hosts are there anyway; leave cluster.pools out")
        if self.starts_nodes and self.job and self.job.queue:
            raise ValueError("pools: Kueue admits a whole cluster at once, and none that grows; leave job.queue out")
        return self

    @property
    def starts_nodes(self) -> bool:
        """Whether the platform starts the nodes of each pool as they are needed, with the label of their pool."""
        return bool(self.pools) and self.job is not None and self.job.platform in ("kuberay", "aws")

    def pool_of(self, work: Work) -> str:
        """The pool that takes a kind of work."""
        return next((name for name, pool in self.pools.items() if work in pool.work), WORKERS)

    def nodes_for(self, work: Work | None) -> list[Nodes]:
        """The nodes of the pool that takes a kind of work; None: of all pools."""
        own = [self.nodes] if self.nodes else []
        if work is None:
            return own + [pool.nodes for pool in self.pools.values()]
        name = self.pool_of(work)
        return [self.pools[name].nodes] if name in self.pools else own


class Budget(Settings):
    """What a run may cost. Nothing here changes a result, so nothing here enters a fingerprint."""

    hours: Annotated[float, Field(gt=0.0, le=10.0**9)] | None = None
    """Device-hours for all that the targets need, those of runs before included; null: as many as it takes.

    Once they are used up, the run saves and ends with exit code 6; with a larger budget it goes on."""


class Tracking(Settings):
    """MLflow, to which runs are reported."""

    uri: Text | None
    """Address of an MLflow server; null: an sqlite store under the root, which is then local."""
    experiment: Text
    """Name of the MLflow experiment."""
