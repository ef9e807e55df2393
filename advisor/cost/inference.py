"""Generating, priced: what a call of ``generate`` holds and how long it takes, and how far batch and context can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypedDict, cast, get_args

from advisor.catalog.quantized import FP8_CAPABILITY, as_held
from advisor.catalog.request import resolve
from advisor.cost.compute import load, rates
from advisor.cost.estimate import judge
from advisor.cost.kernels import Rates
from advisor.cost.memory import footprint, memory, short_by
from advisor.cost.results import Memory, Verdict
from advisor.cost.streams import LAUNCHES, Costs, waits
from advisor.cost.traffic import Ways, flows
from advisor.errors import SpecError
from advisor.specs.calibration import Calibration, likeness
from advisor.specs.hardware import Cluster
from advisor.specs.inference import CacheFormat, Inference, InferencePlan, WeightFormat
from advisor.specs.model import ModelSpec
from advisor.specs.question import Input, Question
from advisor.step.inference import Generation, generation
from advisor.step.program import Node
from advisor.step.tensor_parallel import replicated_heads

if TYPE_CHECKING:
    from typing_extensions import Unpack


class InferenceWords(TypedDict, total=False):
    """What may be said beside the model. Absent or None means: found on this machine, or assumed and said so."""

    gpu: str | None
    gpus: int | None
    nodes: int
    cluster: str | None
    link: str | None
    network: str | None
    host_memory: float | None
    margin: float | str
    calibration: str | None
    tp: int | None
    """GPUs that a copy of the model is cut over; all of them where nobody says."""
    batch: int
    context: int
    prompt: int | None
    """Tokens that come at once; all but the last of the context where nobody says, which needs most memory."""
    weights: str | None
    double_quant: bool
    kv_cache: str | None
    static_cache: bool
    """Whether memory for the whole context is taken at once."""
    precision: str | None
    attention: str


OWN = ("tp", "batch", "context", "prompt", "weights", "double_quant", "kv_cache", "static_cache", "attention")
"""Those that training knows nothing of, or means otherwise."""
OF_TRAINING = frozenset({"seq_len", "global_batch", "param_dtype", "optimizer", "attention", "precision"})


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """Seconds of one pass of a copy of the model, and what they are made of."""

    seconds: float
    low_s: float
    high_s: float
    compute_s: float
    """What the GPU is busy for."""
    launch_s: float
    """What it stands still for because kernels are launched slower than it runs them."""
    communication_s: float
    """Sums over tensor-parallel ranks."""
    tokens_per_s: float
    """Of all copies together: of the prompts that are read, or of new tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceEstimate:
    """One way to generate, priced."""

    model: ModelSpec
    inference: Inference
    cluster: Cluster
    plan: InferencePlan
    inputs: tuple[Input, ...]
    memory: Memory
    kv_cache_bytes: int
    """On one GPU, after the last token."""
    largest_batch: int
    """Most sequences of this context that fit beside the margin; 0 where not even one does."""
    longest_context: int
    """Most tokens in the cache of each of these sequences that fit, with an answer of the same length; 0 for none."""
    context_bound: int | None
    """What the model's positions admit, where that is less than the memory does."""
    prefill: PassTime
    decode: PassTime
    """The pass over the last token, behind the longest cache."""
    call_s: float
    """The whole call: every token takes as long as the first and the last on average."""
    verdict: Verdict
    why: str
    warnings: tuple[str, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Passes over one token."""
        return self.inference.context - self.inference.prompt

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all copies over the whole call."""
        return self.plan.copies * self.inference.batch * self.new_tokens / self.call_s


def estimate_inference(model: str, **words: Unpack[InferenceWords]) -> InferenceEstimate:
    """transformers' ``generate`` by *model*, priced: weights, cache of keys and values, the passes and their time.

    Words: ``gpu``, ``gpus``, ``nodes``, ``cluster``, ``link``, ``network``, ``host_memory``, ``margin``,
    ``calibration``, ``tp``, ``batch``, ``context``, ``prompt``, ``weights``, ``double_quant``, ``kv_cache``,
    ``static_cache``, ``precision``, ``attention``. Raises SpecError for a model, a format or a cut that transformers
    does not have.
    """
    if unknown := words.keys() - InferenceWords.__annotations__.keys():
        known = ", ".join(InferenceWords.__annotations__)
        raise TypeError(f"unknown words {', '.join(sorted(unknown))}; known: {known}")
    asked = {name: value for name, value in words.items() if name not in OWN}
    weights = words.get("weights")
    if weights in ("fp32", "bf16", "fp16"):
        asked["precision"] = _same_precision(weights, words.get("precision"))
    question = resolve(model, **asked)  # type: ignore[arg-type]
    inference = _inference(words, question)
    plan = InferencePlan(gpus=question.cluster.gpus, tensor_parallel=words.get("tp") or question.cluster.gpus)
    held = as_held(question.model, inference)
    return _Pricing(question, held, plan).estimate(inference, _inputs(words, question, inference, plan))


def _same_precision(weights: str, precision: str | None) -> str:
    if precision not in (None, weights):
        raise SpecError(f"weights in {weights} are multiplied in {weights}; leave --precision {precision} out")
    return weights


def _inference(words: InferenceWords, question: Question) -> Inference:
    precision = question.job.precision
    context = words.get("context", 2048)
    weights = words.get("weights") or precision
    cache = words.get("kv_cache") or precision
    if cache not in get_args(CacheFormat):
        raise SpecError(f"--kv-cache must be one of {', '.join(get_args(CacheFormat))}, got {cache!r}")
    if cache not in ("fp8", precision):
        raise SpecError(f"the cache holds what products compute, {precision}, or fp8; got {cache}")
    prompt = words.get("prompt")
    asked = Inference(
        batch=words.get("batch", 1),
        context=context,
        prompt=context - 1 if prompt is None else prompt,
        weights=cast(WeightFormat, weights),
        double_quant=words.get("double_quant", False),
        precision=precision,
        fp8_cache=cache == "fp8",
        static_cache=words.get("static_cache", False),
        attention=words.get("attention", "sdpa"),  # type: ignore[arg-type]
    )
    refuse(question.model, asked, question.cluster)
    return asked


def refuse(model: ModelSpec, inference: Inference, cluster: Cluster) -> None:
    """Raise SpecError for what transformers or the GPU cannot run."""
    windowed = [layer.attention.window for layer in model.described_layers if layer.attention.window]
    if inference.fp8_cache and windowed:
        raise SpecError(
            f"transformers quantizes the cache of models whose layers all see everything, and {model.name} has layers "
            f"with a window of {windowed[0]} tokens; leave --kv-cache out"
        )
    capability = tuple(int(each) for each in cluster.gpu.compute_capability.split(".") if each.isdigit())
    if inference.weights == "fp8" and len(capability) == len(FP8_CAPABILITY) and capability < FP8_CAPABILITY:
        raise SpecError(
            f"products in fp8 need compute capability 8.9, and {cluster.gpu.name} has "
            f"{cluster.gpu.compute_capability}; take --weights int8 or nf4"
        )
    if model.maximum_positions is not None and inference.context > model.maximum_positions:
        raise SpecError(
            f"{model.name} has positions for {model.maximum_positions:,} tokens, got a context of "
            f"{inference.context:,}; give --context {model.maximum_positions} or less"
        )


def _inputs(words: InferenceWords, question: Question, inference: Inference, plan: InferencePlan) -> tuple[Input, ...]:
    """What was taken, with where it came from; nothing of training."""

    def own(name: str, value: str | int) -> Input:
        return Input(name, value, "given" if words.get(name) is not None else "assumed")

    kept = [each for each in question.inputs if each.name not in OF_TRAINING]
    cache = "fp8" if inference.fp8_cache else inference.precision
    switches = [own(name, True) for name in ("double_quant", "static_cache") if getattr(inference, name)]
    kept[-1:-1] = [
        own("tp", plan.tensor_parallel),
        own("batch", inference.batch),
        own("context", inference.context),
        own("prompt", inference.prompt),
        own("weights", inference.weights),
        own("kv_cache", cache),
        own("precision", inference.precision),
        own("attention", inference.attention),
        *switches,
    ]
    return tuple(kept)


class _Pricing:
    """Prices calls of *model*, of which one rank of *plan* holds its part."""

    def __init__(self, question: Question, model: ModelSpec, plan: InferencePlan) -> None:
        self.question, self.model, self.plan = question, model, plan
        self.cluster: Cluster = question.cluster
        self.calibration: Calibration = question.calibration
        capability = self.cluster.gpu.compute_capability
        given = question.given_margin_share
        self.margin = self.calibration.margin_share(likeness(plan, capability)) if given is None else given

    def estimate(self, inference: Inference, inputs: tuple[Input, ...]) -> InferenceEstimate:
        found = generation(self.model, inference, self.plan)
        held = self._memory(found)
        verdict, why = judge(held, self.margin)
        prefill, first, last = (
            self._time(node, inference, tokens)
            for node, tokens in ((found.prefill, inference.prompt), (found.first, 1), (found.last, 1))
        )
        bound = self.model.maximum_positions
        longest = self._most(lambda context: _longer(inference, context), inference.context, bound)
        return InferenceEstimate(
            model=self.model,
            inference=inference,
            cluster=self.cluster,
            plan=self.plan,
            inputs=inputs,
            memory=held,
            kv_cache_bytes=int(found.cache_bytes),
            largest_batch=self._most(lambda batch: replace(inference, batch=batch), inference.batch, None),
            longest_context=longest,
            context_bound=bound if longest == bound else None,
            prefill=prefill,
            decode=last,
            call_s=prefill.seconds + (inference.context - inference.prompt) * (first.seconds + last.seconds) / 2,
            verdict=verdict,
            why=why,
            warnings=tuple(self._warnings()),
        )

    def _warnings(self) -> list[str]:
        found = list(self.question.warnings)
        if (several := replicated_heads(self.model, self.plan.tensor_parallel)) > 1:
            found.append(
                f"each key-value head is held by {several} GPUs, as vLLM does; transformers cannot cut fewer of them "
                f"than {self.plan.tensor_parallel}"
            )
        return found

    def _memory(self, found: Generation) -> Memory:
        return memory(found.program, self.plan, self.cluster, self.calibration, squeezed=True)

    def _might_fit(self, found: Generation) -> bool:
        """Whether a call fits if its tensors need no rounding and leave no gaps."""
        least = footprint(found.program, self.plan, self.cluster, self.calibration).device_used_bytes
        return bool(short_by(least, self.cluster.gpu.memory_bytes, self.margin) <= 0)

    def _most(self, of: Callable[[int], Inference | None], start: int, bound: int | None) -> int:
        """The largest number whose call fits, while one more does not or is beyond *bound*; 0 where none fits.

        What might fit bounds it from above; below that, the allocator says.
        """

        def call(number: int) -> Generation | None:
            asked = of(number) if bound is None or number <= bound else None
            return generation(self.model, asked, self.plan) if asked else None

        def might_fit(number: int) -> bool:
            found = call(number)
            return found is not None and self._might_fit(found)

        def fits(number: int) -> bool:
            found = call(number)
            return found is not None and judge(self._memory(found), self.margin)[0] == "fits"

        most = _bisected(might_fit, 0, start)
        if not most or fits(most):
            return most
        step = 1
        while step < most and not fits(most - step):
            step *= 2
        return _bisected(fits, max(most - step, 0), most - step // 2)

    def _time(self, node: Node, inference: Inference, tokens: int) -> PassTime:
        at: Rates = rates(self.cluster.gpu, inference.precision, self.calibration)
        ways = Ways(self.cluster, self.plan)
        costs = Costs(
            busy_s=lambda each: load(each, at).busy_s,
            launch_s=lambda each: load(each, at).kernels * at.kernel_launch_s,
            transfer_s=ways.seconds,
        )
        launch = float(waits(node, costs).get(LAUNCHES, 0.0))
        compute = float(load(node, at).busy_s)
        sent = sum(float(flow.seconds) for flow in flows(node, ways))
        seconds = compute + launch + sent
        low, high = self.calibration.time_range(likeness(self.plan, self.cluster.gpu.compute_capability))
        return PassTime(
            seconds=seconds,
            low_s=seconds * low,
            high_s=seconds * high,
            compute_s=compute,
            launch_s=launch,
            communication_s=sent,
            tokens_per_s=self.plan.copies * inference.batch * tokens / seconds,
        )


def _bisected(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from *low* on, which is known to do, for which *holds*; *high* is where to look first."""
    while holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _longer(inference: Inference, context: int) -> Inference | None:
    """*inference* with another context and an answer of the same length; None where that leaves no prompt."""
    prompt = context - (inference.context - inference.prompt)
    return replace(inference, context=context, prompt=prompt) if prompt > 0 else None
