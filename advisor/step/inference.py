"""One call of transformers' ``generate`` on one rank: weights, the prompt at once, then token after token.

Every pass takes a model that caches keys and values through its layers and chooses the next token by the logits of the
last one (transformers 5.23, generation/utils.py ``_sample``, greedy). Of the passes over one token the first and the
last are laid out; those between differ from them by the length of the cache alone, which grows by as much in one go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from advisor.errors import SpecError
from advisor.specs.inference import Inference, InferencePlan
from advisor.specs.model import Layer, ModelSpec
from advisor.step.build import EMBEDDED, MASKS, StepProgram
from advisor.step.laying import Laid
from advisor.step.masks import shared_by
from advisor.step.passes import (
    CACHED_NUMBER,
    LOGITS_NUMBER,
    UNCACHED_NUMBER,
    Events,
    HeadPass,
    record_embedding,
    record_head,
    record_pass,
)
from advisor.step.program import (
    NOTHING,
    Amount,
    Block,
    Collective,
    Node,
    hold,
    phase,
    release,
    released,
    repeat,
    then,
)
from advisor.step.quantized import FEW_TOKENS
from advisor.step.recording import INDEX_BYTES, Mode
from advisor.step.tape import CacheFormat, Caching, Event
from advisor.step.tensor_parallel import rank_part

INDEX_TABLES = 4
"""Numbers of one token in int64: its id as given and with those that were added, its mask, and its position."""
BRANCHES = 2
"""Attention and feed-forward of a layer, whose partial sums tensor-parallel ranks add up."""


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A call of ``generate`` as a step program, and its passes by themselves."""

    program: StepProgram
    prefill: Node
    first: Node
    """The pass over the first new token."""
    last: Node
    """That over the last; the same where there is one."""
    prompt_cache_bytes: Amount
    """Keys and values after the prompt."""
    cache_bytes: Amount
    """The same after the last pass."""


def generation(model: ModelSpec, inference: Inference, plan: InferencePlan) -> Generation:
    """The program of a rank that holds its part of *model*.

    Raises SpecError for a model that is no causal one, of which only the parameters are known, or that cannot be cut.
    """
    if model.objective != "causal" or not model.described_layers:
        raise SpecError(f"generating is modelled for causal models of the known families, and {model.name} is none")
    if inference.static_cache and (inference.attention != "sdpa" or model.eager_only or _is_latent(model)):
        raise SpecError(
            f"a static cache is modelled for keys and values that torch's fused kernels read, and {model.name} has "
            f"others or is asked for {inference.attention}; leave the cache to grow"
        )
    sequences, vocabulary = inference.batch, model.vocabulary_size
    model = rank_part(model, plan.tensor_parallel)
    prompt, context = inference.prompt, inference.context
    held: CacheFormat = "fp8" if inference.fp8_cache else "as computed"
    laid = Laid(sequences, compiled=False)

    def one_pass(tokens: int, caching: Caching) -> _Pass:
        return _Pass(model, inference, plan, laid, tokens, caching, vocabulary)

    few = min(sequences, FEW_TOKENS + 1)
    capacity = context if inference.static_cache else None
    prefill = one_pass(prompt, Caching(0, True, held, capacity, few))
    first = one_pass(1, Caching(prompt, True, held, capacity, few))
    last, nodes = first, [prefill.node, first.node]
    if context - prompt > 1:
        last = one_pass(1, Caching(context - 1, False, held, capacity, few))
        nodes += [laid.whole(tuple(_growth(first, last))), last.node]
    ids = hold("token ids, mask and positions", "activations", INDEX_TABLES * INDEX_BYTES * context * sequences)
    holder = prefill if inference.static_cache else last
    step = then(ids, *nodes, laid.whole(tuple(holder.dropped())), released(ids))
    weights = _weights(model, inference)
    states = [hold(label, "parameters", sum(sizes)) for label, sizes in weights.items()]
    program = StepProgram(
        init=phase(
            "init", *states, hold("tables of the model", "buffers", model.tables_bytes(inference.compute_bytes))
        ),
        step=step,
        host=NOTHING,
        host_once=NOTHING,
        product_threads=1,
        tensor_sizes={label: partial(list, sizes) for label, sizes in weights.items()},
    )
    return Generation(
        program,
        prefill.node,
        first.node,
        last.node,
        prefill.cache_bytes * sequences,
        holder.cache_bytes * sequences,
    )


def _is_latent(model: ModelSpec) -> bool:
    return any(layer.attention.latent for layer in model.described_layers)


def _weights(model: ModelSpec, inference: Inference) -> dict[str, list[int]]:
    """Bytes of each tensor of weights, by how they are held."""
    found: dict[str, list[int]] = {}
    width = inference.compute_bytes
    sizes = {id(layer): [(each, each.held_bytes(width, width)) for each in layer.parameters] for layer in model.layers}
    inside = (pair for layer in model.layers for pair in sizes[id(layer)])
    outside = ((each, each.held_bytes(width, width)) for each in (*model.embedding, *model.head))
    for parameter, size_bytes in (*inside, *outside):
        label = "weights" if parameter.held == "as model" else f"weights in {inference.weights}"
        found.setdefault(label, []).append(size_bytes)
    return found


def _growth(first: _Pass, last: _Pass) -> Iterator[Event]:
    """What the passes between *first* and *last* add to the cache, layer by layer."""
    for layer in first.model.described_layers:
        after = {event.storage: event for event in first.held(layer)}
        for found in last.found(layer):
            yield found._replace(kind="take", newer=0)
            yield after[found.storage]._replace(kind="give", newer=first.layers)


class _Pass:
    """Lays out one pass over *tokens* of each sequence."""

    def __init__(
        self,
        model: ModelSpec,
        inference: Inference,
        plan: InferencePlan,
        laid: Laid,
        tokens: int,
        caching: Caching,
        vocabulary: int,
    ) -> None:
        self.model, self.plan, self.laid, self.caching, self.vocabulary = model, plan, laid, caching, vocabulary
        compute = inference.compute_bytes
        alone = inference.batch == 1
        self.mode = Mode(compute, compute, tokens, inference.attention, alone=alone, caching=caching)
        self.layers = len(model.described_layers)
        kinds = {id(layer): layer for layer in model.described_layers}
        self.recorded = {kind: self._record(layer) for kind, layer in kinds.items()}
        self.node = phase("decode" if caching.past else "prefill", *self._nodes())

    @property
    def cache_bytes(self) -> int:
        """Of one sequence, after the pass."""
        counts = Counter(map(id, self.model.described_layers))
        kinds = {id(layer): layer for layer in self.model.described_layers}
        return sum(counts[kind] * event.size_bytes for kind, layer in kinds.items() for event in self.held(layer))

    def held(self, layer: Layer) -> Iterator[Event]:
        """What the cache holds of *layer* after the pass."""
        return (each for each in self.recorded[id(layer)] if each.kind == "take" and _is_cached(each))

    def found(self, layer: Layer) -> Iterator[Event]:
        """What it held before, as it is given back."""
        return (each for each in self.recorded[id(layer)] if each.kind == "give" and _is_cached(each))

    def dropped(self) -> Iterator[Event]:
        """All that is there after the pass is given back."""
        for layer in reversed(self.model.described_layers):
            for event in reversed(tuple(self.held(layer))):
                yield event._replace(kind="give")
        (chosen,) = (event for event in self._head.choice if event.kind == "take")
        yield chosen._replace(kind="give")

    def _record(self, layer: Layer) -> Events:
        """The events of *layer*, of which those before in the cache are the oldest of all layers'."""
        recorded = record_pass(layer, self.model.hidden_size, self.mode)
        return tuple(
            event._replace(storage=event.storage - UNCACHED_NUMBER + CACHED_NUMBER, newer=self.layers)
            if event.storage <= UNCACHED_NUMBER
            else event
            for event in recorded
        )

    @cached_property
    def _head(self) -> HeadPass:
        return record_head(self.model, self.mode, self.vocabulary)

    def _nodes(self) -> Iterator[Node]:
        model, laid, mode = self.model, self.laid, self.mode
        length, width = mode.sequence_length, model.hidden_size
        masks = shared_by(model.described_layers, mode, laid.batch, checkpointed=False).made_bytes
        turned = model.described_layers[0].attention.rotary_dimensions
        tables = len(model.embedding) if len(model.embedding) > 1 else 1
        shared = [
            (MASKS, masks),
            ("rotary tables", 2 * model.rotary_kinds * length * turned * mode.parameter_bytes * laid.batch),
            (EMBEDDED, tables * length * width * mode.stream_bytes * laid.batch),
        ]
        yield laid.whole(record_embedding(model, mode))
        yield from (hold(label, "activations", size_bytes) for label, size_bytes in shared)
        for run in model.runs:
            body = [node for layer in run.layers if isinstance(layer, Layer) for node in self._layer(layer)]
            yield repeat(then(*body), run.repeats)
        yield laid.whole(self._head.norm)
        yield from (release(label, "activations", size_bytes) for label, size_bytes in shared)
        yield laid.whole(self._head.logits)
        yield from self._gathered()
        yield laid.whole(self._head.choice)
        yield laid.whole(tuple(self._chosen()))

    def _layer(self, layer: Layer) -> Iterator[Node]:
        yield self.laid.whole(self.recorded[id(layer)])
        if self.plan.tensor_parallel > 1:
            stream = self.mode.sequence_length * self.model.hidden_size * self.mode.stream_bytes * self.laid.batch
            yield _sent(Collective("sums of a layer", "all-reduce", BRANCHES * stream, BRANCHES, True, "tensor"))

    def _gathered(self) -> Iterator[Node]:
        """Logits of the whole vocabulary, where each rank has computed a part of them."""
        if self.vocabulary > self.model.vocabulary_size:
            size_bytes = self.vocabulary * self.mode.compute_bytes * self.laid.batch
            yield _sent(Collective("logits", "all-gather", size_bytes, 1, True, "tensor"))

    def _chosen(self) -> Iterator[Event]:
        """The model's own logits go, and what the token before was chosen of."""
        (chosen,) = (event for event in self._head.choice if event.kind == "take")
        if self.caching.past:
            yield chosen._replace(kind="give", newer=1)
        (logits,) = (event for event in self._head.logits if event.kind == "take" and event.storage == LOGITS_NUMBER)
        yield logits._replace(kind="give")


def _is_cached(event: Event) -> bool:
    return UNCACHED_NUMBER < event.storage <= CACHED_NUMBER


def _sent(collective: Collective) -> Block:
    return Block(collective.what, "temporaries", transfers=(collective,))
