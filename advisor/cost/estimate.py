"""One plan, priced: every reading of its step program, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from advisor.catalog import legality
from advisor.catalog.request import Describe, Words, by_formulas, with_nvme
from advisor.catalog.trainers import refusal_of_plan, refusal_of_strategy
from advisor.cost.memory import memory, short_by
from advisor.cost.money import beyond_limits, training_cost
from advisor.cost.question import ask, program
from advisor.cost.results import Estimate, Memory, Verdict
from advisor.cost.schedule import step_time
from advisor.errors import SpecError
from advisor.specs.cuts import KeyValueExchange
from advisor.specs.hardware import Cluster
from advisor.specs.job import Job
from advisor.specs.megatron import ContextExchange, MegatronSettings
from advisor.specs.model import Experts, ModelSpec
from advisor.specs.plan import (
    OWN_STRATEGIES,
    Checkpointing,
    FsdpSettings,
    GradientFormat,
    Offload,
    OffloadPlace,
    OffloadSettings,
    Plan,
    Strategy,
    ZeroSettings,
    zero_settings,
)
from advisor.specs.question import Input, Question
from advisor.step import cut_legality, zero_plus
from advisor.step.build import StepProgram
from advisor.step.nvme import swap_buffers
from advisor.step.schemes import gradients_modelled
from advisor.step.zero_plus import all_parts

Choice = TypeVar("Choice", bound=Enum)

if TYPE_CHECKING:
    from typing_extensions import Unpack

GIB = 2**30
OWN = tuple(each.value for each in OWN_STRATEGIES)


class PlanWords(Words, total=False):
    """What may be said of one plan beside its strategy."""

    offload: str
    offload_to: str
    nvme: float | str | None
    """GiB per machine, or a folder on the NVMe whose free space is read. Absent or None: assumed."""
    micro_batch: int
    grad_accum: int | None
    """Absent or None: the accumulation steps that make up the global batch."""
    checkpointing: str
    bucket_size: int | None
    """DeepSpeed's ``reduce_bucket_size`` in elements."""
    grad_accum_dtype: str | None
    """DeepSpeed's ``data_types.grad_accum_dtype``; None for the format that the model computes in."""
    fsdp_version: int
    shard_ranks: int | None
    """GPUs that HSDP cuts states over; None for those of a machine."""
    cp: int
    """With FSDP2 or trainer ``megatron``."""
    cp_exchange: str
    """With FSDP2, ``allgather`` or ``alltoall``: accelerate's ``cp_comm_strategy``."""
    sp: int
    """With ZeRO: ranks that share a sequence by Ulysses."""
    tp: int
    """Of trainer ``megatron``, as are those up to ``sequence_parallel``."""
    pp: int
    vpp: int
    """Virtual stages of each pipeline stage."""
    decoder_first_pipeline_num_layers: int
    """Layers of the first pipeline stage; absent or 0: as many as the others have."""
    decoder_last_pipeline_num_layers: int
    cp_comm_type: str
    """How context-parallel ranks exchange tokens: ``p2p`` or ``a2a``."""
    ep: int
    etp: int | None
    """GPUs that cut each expert; absent or None: as many as cut the other weights."""
    sequence_parallel: bool
    config: str | None
    """A DeepSpeed JSON, accelerate YAML or launch script to read; the other words win over it."""
    trace: bool
    """Whether transformers' own code stands in for formulas; needs the extra ``run``."""
    trust_remote_code: bool
    """Whether that code may come from the model's repository."""


def estimate(
    model: str, *, strategy: str | None = None, rank: int | None = None, **words: Unpack[PlanWords]
) -> Estimate:
    """One plan for *model*, priced for *rank*, or for the rank that holds most.

    Words: those of :func:`advisor.recommend`, and ``offload``, ``offload_to``, ``nvme``, ``micro_batch``,
    ``grad_accum``, ``checkpointing``, ``bucket_size``, ``grad_accum_dtype``, ``fsdp_version``, ``shard_ranks``,
    ``trainer``, ``tp``, ``cp``, ``cp_exchange``, ``sp``, ``pp``, ``vpp``, ``decoder_first_pipeline_num_layers``,
    ``decoder_last_pipeline_num_layers``, ``cp_comm_type``, ``ep``, ``etp``, ``sequence_parallel``, ``config``,
    ``trace``, ``trust_remote_code``. Raises SpecError for a plan that contradicts itself or the job, ConfigError for a
    configuration that cannot be read.
    """
    return price(*plan_of(model, strategy=strategy, **words), rank)


def plan_of(
    model: str, *, strategy: str | None = None, describe: Describe = by_formulas, **words: Unpack[PlanWords]
) -> tuple[Question, Plan]:
    """The question and the one plan that *words* describe. *describe* makes the model where it is not traced."""
    ask_about = partial(
        ask,
        describe=describe,
        trace=words.pop("trace", False),
        trust_remote_code=words.pop("trust_remote_code", False),
    )
    config = words.pop("config", None)
    if _is_for_megatron(words):
        if config is not None or strategy is not None:
            raise SpecError("--trainer megatron has a plan of its own; leave --strategy and --config out")
        return _megatron_plan(model, words, ask_about)
    if config is not None:
        return _plan_from_config(model, config, {"strategy": strategy, **words}, ask_about)
    if strategy is None:
        raise SpecError(f"no strategy; give --strategy ({', '.join(OWN)}), or --config with a file that says it")
    question = ask_about(model, **_asked(words))
    micro_batch, steps = words.get("micro_batch", 1), words.get("grad_accum")
    kind = _own_strategy("--strategy", strategy)
    offload = _member(Offload, "--offload", words.get("offload", "none"))
    if reason := unsupported(question, kind, offload):
        raise SpecError(f"{kind.title} cannot train {question.model.name}: {reason}")
    to, nvme = _one_of(OffloadPlace, "--offload-to", words.get("offload_to", "cpu")), words.get("nvme")
    if to == "nvme" and not offload.optimizer:
        raise SpecError("--offload-to nvme says where, not what; give --offload optimizer or optimizer+params too")
    summed_in = words.get("grad_accum_dtype")
    gradient_format = _one_of(GradientFormat, "--grad-accum-dtype", summed_in) if summed_in is not None else None
    zero = zero_settings(kind, words.get("bucket_size"), gradient_format)
    tensor, context, ulysses = words.get("tp", 1), words.get("cp", 1), words.get("sp", 1)
    cut = max(tensor, 1) * max(context, 1) * max(ulysses, 1)
    plan = Plan(
        strategy=kind,
        gpus=question.cluster.gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps if steps is not None else _accumulation(question, micro_batch, cut),
        checkpointing=_member(Checkpointing, "--checkpointing", words.get("checkpointing", "none")),
        offload=offload,
        offload_to=to,
        offload_settings=_offload_settings(question.model, question.cluster.gpus, nvme),
        zero=_on_machines(zero, kind, question),
        fsdp=FsdpSettings(
            version=words.get("fsdp_version") or legality.usual_fsdp_version(question.job, kind),
            shard_ranks=_shard_ranks(kind, words.get("shard_ranks"), question.cluster),
            context_exchange=_one_of(KeyValueExchange, "--cp-exchange", words.get("cp_exchange", "allgather")),
        ),
        tensor_parallel=tensor,
        context_parallel=context,
        ulysses_parallel=ulysses,
    )
    _check(question, plan)
    return with_nvme(question, nvme, to == "nvme"), plan


def _on_machines(zero: ZeroSettings, strategy: Strategy, question: Question) -> ZeroSettings:
    """*zero* for the machines that are there; all of ZeRO++ where that is the strategy and nobody says which parts."""
    machine_gpus = question.cluster.gpus_per_node
    if strategy is not Strategy.ZERO3_PLUS:
        return zero
    if zero.is_plus:
        return replace(zero, machine_gpus=machine_gpus)
    return all_parts(zero, question.model, question.job, question.cluster.gpus, machine_gpus)


def _check(question: Question, plan: Plan) -> None:
    """Raises SpecError where the frameworks' code, or the model of the step, cannot train by *plan*."""
    for refusal in (zero_plus.refusal, cut_legality.refusal):
        if reason := refusal(question.model, question.job, plan):
            raise SpecError(reason)


def _asked(words: Mapping[str, Any]) -> Words:
    """Those of *words* that say what is asked, not by which plan."""
    own = PlanWords.__annotations__.keys() - Words.__annotations__.keys()
    return cast(Words, {name: value for name, value in words.items() if name not in own})


def _is_for_megatron(words: PlanWords) -> bool:
    trainer = words.get("trainer", "advisor")
    cuts = [name for name in ("tp", "pp", "vpp", "ep", "etp") if words.get(name) not in (None, 1)]
    if trainer != "megatron" and (cuts or words.get("sequence_parallel")):
        flags = ", ".join(f"--{name}" for name in cuts or ("sequence-parallel",))
        raise SpecError(
            f"{flags}: trainer {trainer} runs models that no pipeline or tensor-parallel group can cut; a plan with "
            f"{flags} is launched through Megatron-LM: give --trainer megatron, and leave --strategy out"
        )
    return trainer == "megatron"


def _own_strategy(flag: str, value: str) -> Strategy:
    """A strategy of advisor's own trainer."""
    if reason := legality.why_not_run(value):
        raise SpecError(f"{flag} {value}: {reason}")
    if value not in OWN:
        raise SpecError(f"{flag} must be one of {', '.join(OWN)}, got {value!r}")
    return Strategy(value)


def _megatron_plan(model: str, words: PlanWords, ask_about: Callable[..., Question]) -> tuple[Question, Plan]:
    """The question and Megatron's plan. What it does not have is refused."""
    others: tuple[tuple[str, Any], ...] = (("offload", "none"), ("bucket_size", None), ("grad_accum_dtype", None))
    for name, usual in (*others, ("compile", False), ("sp", 1), ("cp_exchange", "allgather")):
        if words.get(name, usual) != usual:
            raise SpecError(f"--{name.replace('_', '-')} is not for --trainer megatron; leave it out")
    question = ask_about(model, **_asked(words))
    micro_batch, steps = words.get("micro_batch", 1), words.get("grad_accum")
    tensor, pipeline, context = words.get("tp", 1), words.get("pp", 1), words.get("cp", 1)
    cut = max(tensor, 1) * max(pipeline, 1) * max(context, 1)
    plan = Plan(
        strategy=Strategy.MEGATRON,
        gpus=question.cluster.gpus,
        micro_batch=micro_batch,
        accumulation_steps=steps if steps is not None else _accumulation(question, micro_batch, cut),
        checkpointing=_member(Checkpointing, "--checkpointing", words.get("checkpointing", "none")),
        tensor_parallel=tensor,
        sequence_parallel=words.get("sequence_parallel", False),
        pipeline_parallel=pipeline,
        virtual_stages=words.get("vpp", 1),
        context_parallel=context,
        expert_parallel=words.get("ep", 1),
        expert_tensor_parallel=_expert_slices(question.model, words.get("etp"), tensor),
        megatron=MegatronSettings(
            first_stage_layers=words.get("decoder_first_pipeline_num_layers", 0),
            last_stage_layers=words.get("decoder_last_pipeline_num_layers", 0),
            context_exchange=_one_of(ContextExchange, "--cp-comm-type", words.get("cp_comm_type", "p2p")),
        ),
    )
    from advisor.step.megatron_shard import check  # of use to no other plan

    check(question.model, question.job, plan)
    if plan.expert_parallel > 1:
        even = (
            "all experts are taken to get equally many tokens; were all tokens for experts of one of the "
            f"{plan.expert_parallel} ranks, these would take {plan.expert_parallel} times the activations and time"
        )
        question = replace(question, warnings=(*question.warnings, even))
    return question, plan


def _expert_slices(model: ModelSpec, given: int | None, tensor: int) -> int:
    """Ranks that cut each expert: those of *tensor* where nobody says otherwise, as Megatron has it."""
    mixed = any(isinstance(layer.feed_forward, Experts) for layer in model.described_layers)
    return given if given is not None else tensor if mixed else 1


def _plan_from_config(
    model: str, config: str, words: Mapping[str, Any], ask_about: Callable[..., Question]
) -> tuple[Question, Plan]:
    """The question and the plan of a training configuration, with *words* over it."""
    from advisor.catalog.training_config.read import read_config
    from advisor.catalog.training_config.settle import (
        batch,
        fsdp_of,
        offload_settings_of,
        sequence_ranks,
        settle,
        shown,
        zero_of,
    )

    settled = settle(read_config(config), {word: value for word, value in words.items() if word != "nvme"})
    found = dict(settled.found)
    known = {name: found[name].value for name in Words.__annotations__ if name in found and name != "global_batch"}
    question = ask_about(model, **cast(Words, known))
    cut = sequence_ranks(found)
    sizes = batch(found, max(1, question.cluster.gpus // cut))
    found |= sizes.found
    if "global_batch" in found:
        question = replace(question, job=replace(question.job, global_batch=int(found["global_batch"].value)))
    if "strategy" not in found:
        raise SpecError(f"{config} does not say the strategy; give --strategy")
    kind = _own_strategy("the strategy", str(found["strategy"].value))

    def chosen(name: str, usual: Any) -> Any:
        return found[name].value if name in found else usual

    offload = _member(Offload, "--offload", chosen("offload", "none"))
    if reason := unsupported(question, kind, offload):
        raise SpecError(f"{kind.title} cannot train {question.model.name}: {reason}")
    width, job = question.model.hidden_size, question.job
    micro_batch = int(chosen("micro_batch", 1))
    plan = Plan(
        strategy=kind,
        gpus=question.cluster.gpus,
        micro_batch=micro_batch,
        accumulation_steps=int(found["grad_accum"].value)
        if "grad_accum" in found
        else _accumulation(question, micro_batch, cut),
        checkpointing=_member(Checkpointing, "--checkpointing", chosen("checkpointing", "none")),
        offload=offload,
        offload_to=_one_of(OffloadPlace, "--offload-to", chosen("offload_to", "cpu")),
        offload_settings=offload_settings_of(found),
        zero=_on_machines(zero_of(found, kind, width, job.precision), kind, question),
        fsdp=fsdp_of(found),
        context_parallel=int(chosen("cp", 1)),
        ulysses_parallel=int(chosen("sp", 1)),
    )
    _check(question, plan)
    question = with_nvme(question, words.get("nvme"), plan.swaps)
    question = replace(
        question,
        inputs=_with_sources(question.inputs, shown(found, width)),
        warnings=(*question.warnings, *settled.warnings, *sizes.warnings, *_beyond_the_model(job, plan)),
    )
    if not gradients_modelled(job, plan):
        plan = replace(plan, zero=replace(plan.zero, gradient_format=None))
    return question, plan


def _beyond_the_model(job: Job, plan: Plan) -> Iterator[str]:
    """What a configuration may ask for and the step program has no terms for."""
    if not gradients_modelled(job, plan):
        yield f"gradients in {plan.zero.gradient_format} are not modelled; what follows assumes the model's own format"


def _with_sources(resolved: tuple[Input, ...], settled: list[Input]) -> tuple[Input, ...]:
    """The *resolved* inputs, each as *settled* where it was, and what else was settled after them."""
    by_name = {each.name: each for each in settled}
    names = {each.name for each in resolved}
    return tuple(by_name.get(each.name, each) for each in resolved) + tuple(
        each for each in settled if each.name not in names
    )


def _shard_ranks(strategy: Strategy, given: int | None, cluster: Cluster) -> int | None:
    """GPUs that HSDP cuts states over: those of a machine, where nobody says; None for another strategy."""
    if strategy is Strategy.HSDP:
        ranks = given if given is not None else cluster.gpus_per_node
        if ranks == cluster.gpus:
            raise SpecError(
                f"hsdp that cuts states over all {ranks} GPUs holds no second copy of them, and so is fsdp: take "
                f"--strategy fsdp, or give --shard-ranks less than {ranks}"
            )
        return ranks
    if given is not None:
        raise SpecError(f"--shard-ranks is for hsdp; {strategy.title} cuts states over all GPUs or none")
    return None


def _offload_settings(model: ModelSpec, gpus: int, nvme: float | str | None) -> OffloadSettings:
    """DeepSpeed's own, with swap buffers of the size and number that the weights ask for."""
    usual = OffloadSettings(nvme_path=nvme) if isinstance(nvme, str) else OffloadSettings()
    size, count = swap_buffers(model, gpus, usual, ZeroSettings())
    return replace(usual, parameter_buffer=size, parameter_buffers=count)


def unsupported(question: Question, strategy: Strategy, offload: Offload) -> str | None:
    """Why the frameworks' code, or the job's trainer, cannot run what is asked by *strategy*, or None."""
    reason = legality.refusal(question.job, question.cluster.gpu, question.model, strategy, offload)
    return reason or refusal_of_strategy(question.job, strategy)


def _accumulation(question: Question, micro_batch: int, cut: int = 1) -> int:
    """The accumulation steps that make up the global batch, with each copy of the model *cut* over so many GPUs."""
    if micro_batch < 1:
        raise SpecError(f"--micro-batch must be at least 1, got {micro_batch}")
    copies = question.cluster.gpus // cut or 1
    at_once = copies * micro_batch
    if question.job.global_batch % at_once:
        holders = f"{copies} GPUs" if cut == 1 else f"{copies} copies of the model"
        raise SpecError(
            f"a global batch of {question.job.global_batch} is no multiple of {holders} x "
            f"micro-batch {micro_batch} = {at_once}; change --global-batch or --micro-batch, or give --grad-accum"
        )
    return question.job.global_batch // at_once


def _one_of(literal: Any, flag: str, value: str) -> Any:
    if value not in get_args(literal):
        raise SpecError(f"{flag} must be one of {', '.join(get_args(literal))}, got {value!r}")
    return value


def _member(kind: type[Choice], flag: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise SpecError(f"{flag} must be one of {_choices(kind)}, got {value!r}") from None


def _choices(kind: type[Enum]) -> str:
    return ", ".join(each.value for each in kind)


def price(question: Question, plan: Plan, rank: int | None = None) -> Estimate:
    """All readings of a single plan, for *rank* or the rank that holds most.

    Raises SpecError for a plan that the job's trainer or its optimizer does not run.
    """
    job = question.job
    unfit = legality.refusal_of_optimizer(job, plan.strategy, plan.offload, plan.fsdp.version)
    if reason := unfit or refusal_of_plan(job, plan):
        raise SpecError(reason)
    step = program(question, plan, rank)
    held = memory(step, plan, question.cluster, question.calibration, fullest=rank is None, squeezed=True)
    return priced(question, plan, step, held)


def priced(question: Question, plan: Plan, step: StepProgram, held: Memory) -> Estimate:
    """The same where *step*, the program of *plan*, and what it holds are known."""
    timed = step_time(step.pace, question.job, plan, question.cluster, question.calibration, step.slowest_excess)
    time, training = timed.at(0), None
    verdict, why = judge(held, question.margin_share(plan))
    if question.training:
        tokens_per_step = int(plan.global_batch) * question.job.sequence_length
        training = training_cost(question.training, tokens_per_step, time, question.cluster)
        beyond = beyond_limits(question.training, training, time)
        if beyond:
            verdict, why = "no", f"{why}; {beyond}" if verdict == "no" else beyond
    return Estimate(
        model=question.model,
        job=question.job,
        cluster=question.cluster,
        plan=plan,
        inputs=question.inputs,
        memory=held,
        traffic=timed.traffic_at(0),
        time=time,
        verdict=verdict,
        why=why,
        warnings=question.warnings,
        training=training,
    )


def shortages(held: Memory, margin_share: float) -> tuple[int, int, int]:
    """Bytes that the device lacks beside its margin, the host and the NVMe; at most 0 where there is enough."""
    device = short_by(held.device_used_bytes, held.capacity_bytes, margin_share)
    return int(device), held.host_bytes - held.host_capacity_bytes, held.nvme_bytes - held.nvme_capacity_bytes


def judge(held: Memory, margin_share: float) -> tuple[Verdict, str]:
    """Whether *held* fits its device with the margin free, its host and NVMe, with the arithmetic that says so."""
    used, capacity = held.device_used_bytes, held.capacity_bytes
    device, host, nvme = shortages(held, margin_share)
    there = f"{capacity / GIB:.1f} GiB there less {100 * margin_share:.3g} % kept free"
    lacking = []
    if device > 0:
        lacking.append(f"{used / GIB:.1f} GiB needed per GPU, {there}: {device / GIB:.1f} GiB short")
    if host > 0:
        lacking.append(
            f"{held.host_bytes / GIB:.1f} GiB of host memory needed per machine, "
            f"{held.host_capacity_bytes / GIB:.1f} GiB there: {host / GIB:.1f} GiB short"
        )
    if nvme > 0:
        lacking.append(
            f"{held.nvme_bytes / GIB:.1f} GiB of NVMe needed per machine, "
            f"{held.nvme_capacity_bytes / GIB:.1f} GiB there: {nvme / GIB:.1f} GiB short"
        )
    if host > 0 or nvme > 0 or (used > capacity and held.cache_releases is None):
        return "no", "; ".join(lacking)
    if held.cache_releases:
        lacking.append(f"runs if torch gives cached memory back {held.cache_releases} times in two steps, a stall each")
        return "tight", "; ".join(lacking)
    if lacking:
        return "tight", lacking[0]
    return (
        "fits",
        f"{used / GIB:.1f} of {capacity / GIB:.1f} GiB used per GPU, {100 * (1 - used / capacity):.0f} % free",
    )


def explained(estimate: Estimate, why: str) -> Estimate:
    """The same estimate with another reason."""
    return replace(estimate, why=why)
