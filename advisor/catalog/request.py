"""The words of a command line or a call to the question they mean, each input with its origin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast, get_args

from advisor.catalog.adapters import as_trained
from advisor.catalog.calibrations import calibration_of, find_calibration
from advisor.catalog.detect import Detected, detect
from advisor.catalog.gpus import find_gpu
from advisor.catalog.legality import refusal
from advisor.catalog.links import find_link
from advisor.catalog.models import FoundConfiguration, find_model
from advisor.catalog.trainers import differences, profile_of, refuse_job, versions_of
from advisor.catalog.training import TrainingWords, training_of
from advisor.errors import SpecError
from advisor.specs.calibration import Calibration
from advisor.specs.hardware import Cluster, Gpu, Link, Topology
from advisor.specs.job import Job, Trainer
from advisor.specs.model import ModelSpec
from advisor.specs.question import Input, Origin, Question

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from advisor.catalog.clusters import ClusterProfile

DEFAULT_GPU = "A100-80GB"
DEFAULT_NETWORK = "ib-hdr"
GIB = 2**30


class JobWords(TrainingWords, total=False):
    """What may be said beside the model and the number of GPUs. Absent or None means: found on this machine, or assumed
    and said so."""

    gpu: str | None
    link: str | None
    network: str | None
    host_memory: float | None
    """GiB per machine."""
    seq_len: int
    global_batch: int
    precision: str | None
    param_dtype: str
    optimizer: str
    galore_rank: int
    attention: str
    loss: str
    compile: bool
    padded: bool
    trainer: str
    method: str
    lora_rank: int
    lora_targets: str | Sequence[str]
    """Names, or one text of them joined by commas; ``all-linear``; absent or empty for peft's choice."""
    lora_dropout: float
    margin: float | str
    calibration: str | None
    """A name or a file; by default what was measured on this machine's GPU, if that is the one that is meant."""


class Words(JobWords, total=False):
    """The same with how many GPUs there are."""

    cluster: str | None
    """A name or a YAML file. It says what the other words do not."""
    gpus: int | None
    nodes: int


Describe = Callable[[FoundConfiguration, Job], ModelSpec]
"""What makes a model of its configuration, for a job."""


def by_formulas(found: FoundConfiguration, job: Job) -> ModelSpec:
    """The model as its family's function describes it, whatever the job."""
    return found.model


def resolve(model: str, *, describe: Describe = by_formulas, **words: Unpack[Words]) -> Question:
    """The question that *words* ask of *model*: a profile name, Hub id, folder or ``config.json``."""
    if unknown := words.keys() - Words.__annotations__.keys():
        raise TypeError(f"unknown words {', '.join(sorted(unknown))}; known: {', '.join(Words.__annotations__)}")
    found = find_model(model)
    profile = _profile(words.get("cluster"))
    machine = None if profile or (words.get("gpu") and words.get("gpus")) else detect()
    gpu, gpu_origin = _gpu(words.get("gpu"), profile, machine)
    calibration, calibration_origin = _calibration(words.get("calibration"), gpu, gpu_origin)
    gpus, gpus_origin, nodes, nodes_origin = _counts(words, profile, machine)
    job = _job(words, gpu)
    described = as_trained(describe(found, job), job)
    gpus_per_node = max(1, gpus // max(1, nodes))
    host_memory_bytes, host_origin = _host_memory(
        words.get("host_memory"), profile, machine, calibration.host_memory_bytes_per_gpu * gpus_per_node
    )
    here = machine if gpu_origin == "found" and machine and gpus_per_node <= len(machine.gpu_names) else None
    link, topology, link_origin = _inside(words.get("link"), profile, here, gpu)
    network, network_origin = _network(words.get("network"), profile, gpus_per_node)
    cluster = Cluster(
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        link=as_measured(link, calibration),
        host_link=as_measured(find_link(gpu.host_link), calibration),
        network=as_measured(network, calibration),
        host_memory_bytes=host_memory_bytes,
        cpu_memory_bandwidth_bytes_per_s=calibration.host_bandwidth_bytes_per_s_per_gpu * gpus_per_node,
        nvme_bytes=calibration.nvme_bytes_per_gpu * gpus_per_node,
        nvme_bandwidth_bytes_per_s=calibration.nvme_bandwidth_bytes_per_s_per_gpu * gpus_per_node,
        topology=topology and replace(topology, between=as_measured(topology.between, calibration)),
    )
    said_by = f"cluster {profile.name}" if profile else ""

    def named(name: str, value: str | int, origin: Origin) -> Input:
        return Input(name, value, origin, said_by if origin == "file" else "")

    hardware = [
        named("gpu", gpu.name, gpu_origin),
        named("gpus", gpus, gpus_origin),
        named("link", cluster.link.name, link_origin),
        named("host_memory_gib", round(host_memory_bytes / GIB), host_origin),
    ]
    if topology:
        islands = f"{topology.title} over {topology.between.name}"
        hardware.insert(-1, named("islands", islands, link_origin))
    if nodes > 1:
        hardware[2:2] = [named("nodes", nodes, nodes_origin), named("network", cluster.network.name, network_origin)]
    if profile:
        hardware.insert(0, Input("cluster", profile.name, "given"))
    inputs = [
        Input("model", found.weights_from, "given"),
        *hardware,
        Input("seq_len", job.sequence_length, _origin(words, "seq_len")),
        Input("global_batch", job.global_batch, _origin(words, "global_batch")),
        Input("precision", job.precision, "given" if words.get("precision") else "assumed"),
        Input("param_dtype", job.parameter_format, _origin(words, "param_dtype")),
        Input("optimizer", job.optimizer, _origin(words, "optimizer")),
        *([Input("galore_rank", job.galore_rank, _origin(words, "galore_rank"))] if job.optimizer == "galore" else []),
        Input("attention", job.attention, _origin(words, "attention")),
        Input("calibration", calibration.name, calibration_origin),
    ]
    if job.loss != "full":
        inputs.insert(-1, Input("loss", job.loss, "given" if "loss" in words else "assumed"))
    if job.compile:
        inputs.insert(-1, Input("compile", True, "given"))
    if job.padded:
        inputs.insert(-1, Input("padded", True, "given"))
    if job.trainer != "advisor":
        inputs.insert(-1, Input("trainer", job.trainer, "given"))
    inputs[-1:-1] = _adapter_inputs(words, job)
    training, training_inputs = training_of(cast(TrainingWords, words), job, gpu)
    inputs[-1:-1] = training_inputs
    return Question(
        model=described,
        config=found.config,
        weights_from=found.weights_from,
        job=job,
        cluster=cluster,
        calibration=calibration,
        given_margin_share=_margin(words.get("margin", "auto")),
        training=training,
        inputs=tuple(inputs),
        warnings=tuple(_warnings(found.note, described, job)),
    )


def usual_cluster(gpu: Gpu, gpus: int) -> Cluster:
    """So many GPUs in one machine that nothing else is known of."""
    calibration = find_calibration()
    return Cluster(
        gpu=gpu,
        gpus=gpus,
        nodes=1,
        link=find_link(gpu.link),
        host_link=find_link(gpu.host_link),
        network=find_link(DEFAULT_NETWORK, gpus),
        host_memory_bytes=calibration.host_memory_bytes_per_gpu * gpus,
        cpu_memory_bandwidth_bytes_per_s=calibration.host_bandwidth_bytes_per_s_per_gpu * gpus,
        nvme_bytes=calibration.nvme_bytes_per_gpu * gpus,
        nvme_bandwidth_bytes_per_s=calibration.nvme_bandwidth_bytes_per_s_per_gpu * gpus,
    )


def _origin(words: Words, name: str) -> Origin:
    return "given" if name in words else "assumed"


def _profile(name: str | None) -> ClusterProfile | None:
    if not name:
        return None
    from advisor.catalog.clusters import find_cluster

    return find_cluster(name)


def _gpu(name: str | None, profile: ClusterProfile | None, machine: Detected | None) -> tuple[Gpu, Origin]:
    if name:
        return find_gpu(name), "given"
    if profile:
        return profile.gpu, "file"
    if machine:
        if len(kinds := dict.fromkeys(machine.gpu_names)) > 1:
            raise SpecError(
                f"this machine has {' and '.join(kinds)}; advisor plans for one kind of GPU: "
                "leave one in CUDA_VISIBLE_DEVICES, or give --gpu and --gpus"
            )
        return find_gpu(machine.gpu_names[0]), "found"
    return find_gpu(DEFAULT_GPU), "assumed"


def _calibration(name: str | None, gpu: Gpu, gpu_origin: Origin) -> tuple[Calibration, Origin]:
    if name:
        return find_calibration(name), "given"
    return (calibration_of(gpu.name) if gpu_origin == "found" else find_calibration()), "found"


def as_measured(link: Link, calibration: Calibration) -> Link:
    """*link* with the bandwidth that the calibration measured, if it did."""
    bandwidth = calibration.link_bandwidth_bytes_per_s.get(link.name)
    if bandwidth is None:
        return link
    source = f"measured: calibration {calibration.name}"
    return replace(link, bandwidth_bytes_per_s=bandwidth, assumed=False, source=source)


def _counts(words: Words, profile: ClusterProfile | None, machine: Detected | None) -> tuple[int, Origin, int, Origin]:
    """GPUs in all and machines, each with its origin."""
    gpus, nodes = words.get("gpus"), words.get("nodes")
    if profile is None:
        found: tuple[int, Origin] = (len(machine.gpu_names), "found") if machine else (1, "assumed")
        return *((gpus, "given") if gpus is not None else found), nodes or 1, "given"
    whole = profile.gpus_per_node
    if nodes is not None:
        machines = nodes
    elif gpus is None:
        machines = profile.nodes or 1
    else:
        machines = max(1, gpus // whole)
        if gpus > whole and gpus % whole:
            raise SpecError(f"{gpus} GPUs do not fill machines of {whole}, as {profile.name} has; give --nodes too")
    total = machines * whole if gpus is None else gpus
    if total > machines * whole:
        raise SpecError(
            f"{total} GPUs on {machines} machines are more than the {whole} that each {profile.name} has; "
            f"give --nodes {-(-total // whole)} or at most --gpus {machines * whole}"
        )
    if profile.nodes is not None and machines > profile.nodes:
        raise SpecError(f"{machines} machines are more than the {profile.nodes} of {profile.name}; give fewer --nodes")
    return total, "file" if gpus is None else "given", machines, "file" if nodes is None else "given"


def _inside(
    name: str | None, profile: ClusterProfile | None, machine: Detected | None, gpu: Gpu
) -> tuple[Link, Topology | None, Origin]:
    """What joins the GPUs of a machine, *machine* if it is this one. A link that was named joins all of them."""
    if name:
        return find_link(name), None, "given"
    if profile:
        return profile.link, profile.topology, "file"
    if machine and machine.wiring:
        return *machine.wiring.links(gpu), "found"
    return find_link(gpu.link), None, "assumed"


def _network(name: str | None, profile: ClusterProfile | None, gpus_per_node: int) -> tuple[Link, Origin]:
    """What joins machines."""
    if name:
        return find_link(name, gpus_per_node), "given"
    if profile and (network := profile.network(gpus_per_node)):
        return network, "file"
    return find_link(DEFAULT_NETWORK, gpus_per_node), "assumed"


def _host_memory(
    gib: float | None, profile: ClusterProfile | None, machine: Detected | None, assumed_bytes: int
) -> tuple[int, Origin]:
    if gib is not None:
        if gib <= 0:
            raise SpecError(f"--host-memory must be a positive number of GiB per machine, got {gib}")
        return int(gib * GIB), "given"
    if profile and profile.host_memory_bytes is not None:
        return profile.host_memory_bytes, "file"
    return (machine.host_memory_bytes, "found") if machine else (assumed_bytes, "assumed")


def with_nvme(question: Question, nvme: float | str | None, used: bool) -> Question:
    """*question* with the NVMe that *nvme* says: GiB per machine, or a folder there, whose free space is taken.

    Where nothing is said the calibration's stays, which is named among the inputs if it is *used*. Raises SpecError.
    """
    origin: Origin = "given"
    if isinstance(nvme, str):
        import shutil

        try:
            size_bytes = shutil.disk_usage(nvme).free
        except OSError as error:
            raise SpecError(f"--nvme {nvme}: {error.strerror}; give a folder on the NVMe, or GiB per machine") from None
    elif nvme is not None:
        if nvme <= 0:
            raise SpecError(f"--nvme must be a positive number of GiB per machine, or a folder, got {nvme}")
        size_bytes = int(nvme * GIB)
    elif used:
        size_bytes, origin = question.cluster.nvme_bytes, "assumed"
    else:
        return question
    named = Input("nvme_gib", round(size_bytes / GIB), origin)
    return replace(
        question,
        cluster=replace(question.cluster, nvme_bytes=size_bytes),
        inputs=(*question.inputs[:-1], named, question.inputs[-1]),
    )


def _job(words: Words, gpu: Gpu) -> Job:
    """The job; precision is bf16 where the GPU has it, else fp16."""
    usual = "bf16" if gpu.has_bf16 else "fp16"
    precision = words.get("precision") or usual
    trainer = words.get("trainer", "advisor")
    if trainer not in get_args(Trainer):
        raise SpecError(f"--trainer must be one of {', '.join(get_args(Trainer))}, got {trainer!r}")
    job = Job(
        sequence_length=words.get("seq_len", 2048),
        global_batch=words.get("global_batch", 64),
        precision=precision,  # type: ignore[arg-type]
        parameter_format=words.get("param_dtype", "fp32"),  # type: ignore[arg-type]
        optimizer=words.get("optimizer", "adamw-fused"),  # type: ignore[arg-type]
        galore_rank=words.get("galore_rank", 128),
        attention=words.get("attention", "sdpa"),  # type: ignore[arg-type]
        loss=words.get("loss") or profile_of(trainer, versions_of(trainer)[0]).losses[0],  # type: ignore[arg-type]
        compile=words.get("compile", False),
        padded=words.get("padded", False),
        trainer=trainer,  # type: ignore[arg-type]
        method=words.get("method", "full"),  # type: ignore[arg-type]
        lora_rank=words.get("lora_rank", 8),
        lora_targets=_names(words.get("lora_targets", ())),
        lora_dropout=words.get("lora_dropout", 0.0),
    )
    refuse_job(job)
    if reason := refusal(job, gpu):
        raise SpecError(reason)
    return job


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    """*names* one by one, where they may be one text."""
    listed = names.split(",") if isinstance(names, str) else names
    return tuple(name for each in listed if (name := each.strip()))


def _adapter_inputs(words: Words, job: Job) -> list[Input]:
    """What was said of the method; nothing where every weight is trained."""
    if job.method == "full":
        return []
    targets = ",".join(job.lora_targets) or "peft's choice"
    return [
        Input("method", job.method, "given"),
        Input("lora_rank", job.lora_rank, _origin(words, "lora_rank")),
        Input("lora_targets", targets, "given" if job.lora_targets else "assumed"),
        *([Input("lora_dropout", job.lora_dropout, "given")] if job.lora_dropout else []),
    ]


def _margin(margin: float | str) -> float | None:
    """The share that was given; None for ``auto``."""
    if margin == "auto":
        return None
    try:
        share = float(margin)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise SpecError(f"--margin must be auto or a share of device memory from 0 to below 1, got {margin!r}")
    return share


def _warnings(note: str | None, model: ModelSpec, job: Job) -> list[str]:
    warnings = [note] if note else []
    if job.pages_moments:
        warnings.append(
            f"{job.optimizer}: times and host memory are those of moments that go to the host and back in every step; "
            "what the GPU has room for stays there"
        )
    if job.compile:
        warnings.append("memory is that of eager mode: torch.compile keeps other tensors for backward, mostly fewer")
    if model.maximum_positions is not None and job.sequence_length > model.maximum_positions:
        warnings.append(
            f"sequence length {job.sequence_length} is beyond the {model.maximum_positions} positions that "
            f"{model.name} was made for"
        )
    return [*warnings, *differences(job)]
