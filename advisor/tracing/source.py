"""What a model's parts do, traced: the real code on fake tensors in place of formulas.

A :class:`TracedSource` records the real model in each mode that it is asked for, and :func:`traced_model` says which
of its layers do the same. Any causal language model that transformers builds will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from advisor.catalog.families.parts import runs_of
from advisor.catalog.models import FoundConfiguration
from advisor.errors import ConfigError, SpecError
from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, Buffer, ModelSpec, Parameter, UndescribedLayer
from advisor.step.recording import INDEX_BYTES, HeadRecording, Mode, Recording, mode_of
from advisor.step.tape import Event
from advisor.tracing.passes import EMBEDDING, HEAD
from advisor.tracing.real_model import (
    Description,
    attention_of,
    decoder_layers,
    described,
    failures_explained,
    needs_torch,
    quiet,
    real_model,
    recompute_layers,
    settings_of,
)
from advisor.tracing.recordings import FEWER, MORE, Recordings, recordings
from advisor.tracing.sameness import keep_first, representatives


@dataclass(frozen=True, slots=True)
class TracedSource:
    """Recordings of the model described, made when they are first asked for."""

    description: Description

    def inputs(self, model: ModelSpec, mode: Mode) -> tuple[Event, ...]:
        """Token ids and labels; whatever else a model makes of them is in its own recordings."""
        return (Event("take", "token ids and labels", "activations", 2 * INDEX_BYTES * mode.sequence_length, True),)

    def embedding(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> Recording:
        return _recorded(self, mode, checkpointed)[1].embedding

    def layer(
        self, layer: AnyLayer, hidden_size: int, mode: Mode, checkpointed: bool, selective: bool = False
    ) -> Recording:
        assert isinstance(layer, UndescribedLayer)
        if selective:
            raise SpecError("selective checkpointing is not traced layer by layer; take --checkpointing none or full")
        facts, found = _recorded(self, mode, checkpointed)
        return found.layers[facts.kinds[layer.number]]

    def head(self, model: ModelSpec, mode: Mode, checkpointed: bool) -> HeadRecording:
        return _recorded(self, mode, checkpointed)[1].head


@dataclass(frozen=True, eq=False)
class Facts:
    """What the model is, beside what it does."""

    names: Mapping[str, Parameter]
    """Every weight by its full name; a layer's own begins within the layer."""
    prefix: str
    """What the full names of all weights of layers begin with."""
    tied: str | None
    """The full name of the embedding, where the output matrix is the same tensor."""
    kinds: tuple[int, ...]
    """For each layer the number of the layer that was traced for it."""
    hidden_size: int
    vocabulary_size: int
    maximum_positions: int | None
    eager_only: bool
    buffers: tuple[Buffer, ...]


def traced(found: FoundConfiguration, job: Job, trust_remote_code: bool) -> ModelSpec:
    """The model found, as its code runs in *job*'s number format."""
    source = TracedSource(described(found.config, found.weights_from, trust_remote_code))
    return traced_model(source, mode_of(job, job.compute_bytes), found.name, found.source)


def traced_model(source: TracedSource, mode: Mode, name: str, origin: str) -> ModelSpec:
    """The model with its parameters by part, layers that do the same standing for each other."""
    facts, found = _recorded(source, mode, False)
    note = "what its layers do was traced from transformers' own code, not computed by formulas"
    return _model(facts, found.owners, source.description.family, name, origin, note)


def undescribed(found: FoundConfiguration, trust_remote_code: bool) -> ModelSpec:
    """The model found with its parameters alone: the whole of it on the meta device, nothing run."""
    description = described(found.config, found.weights_from, trust_remote_code)
    needs_torch("counting a model's parameters")
    import torch

    with quiet(), failures_explained(description.family), torch.device("meta"):
        settings = settings_of(description)
        model = real_model(settings, description, torch.float32, "eager")
        kinds, _ = representatives(decoder_layers(model), settings)
        facts = _facts(model, kinds, False)
    return _model(facts, {}, description.family, found.name, found.source, "its parameters alone are known")


def _model(facts: Facts, owners: Mapping[str, str | int], family: str, name: str, origin: str, note: str) -> ModelSpec:
    parts: dict[str | int, list[Parameter]] = {}
    for full, parameter in facts.names.items():
        parts.setdefault(_part_of(full, facts.prefix, owners), []).append(parameter)
    embedding = parts.get(EMBEDDING, [])
    if facts.tied is not None:
        matrix = facts.names[facts.tied]
        embedding.sort(key=lambda parameter: parameter != matrix)

    def layer(kind: int) -> UndescribedLayer:
        return UndescribedLayer(number=kind, eager_only=facts.eager_only, parameters=tuple(parts.get(kind, ())))

    return ModelSpec(
        name=name,
        family=family,
        objective="causal",
        hidden_size=facts.hidden_size,
        vocabulary_size=facts.vocabulary_size,
        maximum_positions=facts.maximum_positions,
        tied_embeddings=facts.tied is not None,
        embedding=tuple(embedding),
        runs=runs_of(facts.kinds, layer),
        final_norm=None,
        head=tuple(parts.get(HEAD, ())),
        buffers=facts.buffers,
        source=origin,
        notes=(note,),
    )


def _part_of(name: str, prefix: str, owners: Mapping[str, str | int]) -> str | int:
    """A weight belongs to the layer that holds it, else to where its gradient is completed, else to the embedding."""
    if name.startswith(prefix):
        return int(name[len(prefix) :].partition(".")[0])
    owner = owners.get(name, EMBEDDING)
    return EMBEDDING if isinstance(owner, int) else owner


@lru_cache(maxsize=32)
def _recorded(source: TracedSource, mode: Mode, checkpointed: bool) -> tuple[Facts, Recordings]:
    """The parts in one mode. Only as many layers run as there are kinds, unless they reach beyond neighbours."""
    facts, found = _run(source.description, mode, checkpointed, shortened=True)
    return (facts, found) if found.local else _run(source.description, mode, checkpointed, shortened=False)


def _run(description: Description, mode: Mode, checkpointed: bool, shortened: bool) -> tuple[Facts, Recordings]:
    needs_torch("tracing a model")
    if mode.padded:
        raise SpecError("padded batches are not traced layer by layer; leave out --padded or --trace")
    if mode.loss != "full":
        raise SpecError(f"the {mode.loss} loss is not traced apart from the layers; leave out --loss or --trace")
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from advisor.tracing.flash_attention import flash_attn_installed
    from advisor.tracing.gpu_operators import gpu_operators, masks_for
    from advisor.tracing.recorder import Recorder, record

    # Sizes are what is recorded, and fp16's are bf16's.
    dtype = torch.float32 if mode.parameter_bytes == 4 else torch.bfloat16
    with (
        quiet(),
        failures_explained(description.family),
        masks_for(padded=False),
        gpu_operators(),
        flash_attn_installed(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        settings = settings_of(description)
        _refuse_other_than_causal(settings, description.family)
        model = real_model(settings, description, dtype, mode.attention)
        eager_only = mode.attention != "eager" and attention_of(settings, "causal", mode.attention) == "eager"
        layers = decoder_layers(model)
        kinds, count = representatives(layers, settings) if shortened else (tuple(range(len(layers))), len(layers))
        facts = _facts(model, kinds, eager_only)
        keep_first(model, layers, count)
        recorder = Recorder()
        recorder.weights = frozenset(tuple(each.shape) for each in model.parameters())
        recorder.vocabulary = facts.vocabulary_size
        if checkpointed:
            recompute_layers(model)
        with recorder:
            recorder.include((*model.parameters(), *model.buffers()))
            few, many = (torch.zeros(batch, mode.sequence_length, dtype=torch.long) for batch in (FEWER, MORE))
            fewer, more = (record(recorder, model, ids, mode.autocast) for ids in (few, many))
    return facts, recordings(fewer, more, count, facts.names, facts.tied)


def _refuse_other_than_causal(settings: Any, family: str) -> None:
    if settings.is_encoder_decoder or any("MaskedLM" in each for each in settings.architectures or ()):
        raise ConfigError(f"family {family} is no causal language model, and only those are traced for their layers")


def _facts(model: Any, kinds: tuple[int, ...], eager_only: bool) -> Facts:
    layers, text = decoder_layers(model), model.config.get_text_config()
    prefix = next(f"{name}." for name, module in model.named_modules() if module is layers)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    shared = embedding.weight if output is not None and embedding.weight is output.weight else None
    names: dict[str, Parameter] = {}
    for name, parameter in model.named_parameters():
        own = name[len(prefix) :].partition(".")[2] if name.startswith(prefix) else name
        names[name] = Parameter(own, tuple(parameter.shape))
    return Facts(
        names=names,
        prefix=prefix,
        tied=next((name for name, each in model.named_parameters() if each is shared), None),
        kinds=kinds,
        hidden_size=text.hidden_size,
        vocabulary_size=text.vocab_size,
        maximum_positions=getattr(text, "max_position_embeddings", None),
        eager_only=eager_only,
        buffers=tuple(_buffer(name, each) for name, each in model.named_buffers()),
    )


def _buffer(name: str, tensor: Any) -> Buffer:
    formats: dict[str, Literal["fp32", "int64", "bool"]] = {
        "torch.float32": "fp32",
        "torch.int64": "int64",
        "torch.bool": "bool",
    }
    return Buffer(name, tensor.numel(), formats.get(str(tensor.dtype), "weights"))
