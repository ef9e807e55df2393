"""Megatron's block of experts on one rank: tokens go to the ranks of their experts, through them, and back.

megatron-core 0.16.1, transformer/moe: moe_layer.py, token_dispatcher.py, experts.py and shared_experts.py. No token is
dropped, and all experts are taken to get equally many. That is the least that the fullest rank can get: if all tokens
chose experts of one rank, it would get as many times more as there are ranks of different experts.
"""

from __future__ import annotations

from advisor.specs.model import Experts
from advisor.step.megatron_operators import Cut, activate, column_linear, linear, row_linear, weighted_activation
from advisor.step.megatron_router import INDEX_BYTES, route
from advisor.step.operators import add, cast, copy, scale_rows, unary
from advisor.step.tape import Gradients, Tape, Tensor, Weight

Named = dict[str, Weight]
MAP_BYTES = 4


def mixture(tape: Tape, hidden: Tensor, spec: Experts, weights: Named, cut: Cut) -> Tensor:
    """The experts of each token of *hidden*, which is this rank's piece of the normalised stream."""
    shared = _shared(tape, hidden, weights, cut) if spec.shared else None
    scores, chosen = route(tape, hidden, spec, weights["mlp.router.weight"], balances=cut.experts.balances)
    dispatch = _gathered if cut.experts.dispatcher == "allgather" else _exchanged
    output = dispatch(tape, hidden, scores, chosen, spec, weights, cut)
    return add(tape, output, shared) if shared else output


def _shared(tape: Tape, hidden: Tensor, weights: Named, cut: Cut) -> Tensor:
    """The expert of every token, cut over the tensor-parallel ranks as a dense block is."""
    inner = column_linear(tape, hidden, weights["mlp.shared_experts.linear_fc1.weight"], cut)
    inner = activate(tape, inner, None, gated=True)
    output = row_linear(tape, inner, weights["mlp.shared_experts.linear_fc2.weight"], cut)
    gate = weights.get("mlp.shared_experts.gate_weight")
    if gate is None:
        return output
    # A product of torch's own, which hands its gradient over.
    logits = linear(tape, hidden, gate, Cut(fuses_gradient_sums=False))
    return scale_rows(tape, output, unary(tape, logits, saves="output"))


def _exchanged(
    tape: Tape, hidden: Tensor, scores: Tensor, chosen: Tensor, spec: Experts, weights: Named, cut: Cut
) -> Tensor:
    """``MoEAlltoAllTokenDispatcher``. What was sent and what came stay until the block is over."""
    ranks, slices = cut.experts.ranks, cut.experts.slices
    tokens = chosen.numel // spec.count
    width = hidden.numel // tokens
    pairs, several = tokens * spec.active, spec.count > ranks
    if cut.experts.fuses_permutation:
        # TransformerEngine, pytorch/triton/permutation.py: for each token the rows and numbers of its experts.
        order = [tape.new(tokens * (2 * spec.count + 1), MAP_BYTES)]
        picked = _selected(tape, scores, pairs, order)
    else:
        order = [tape.new(pairs, INDEX_BYTES)]
        picked = _selected(tape, scores, pairs, [tape.like(scores), tape.like(chosen)])
    tape.left += [scores, chosen, *order]
    permuted = _permuted(tape, hidden, pairs * width, order)
    received, shares = permuted, picked
    if ranks > 1:
        received, shares = _moved(tape, permuted, permuted.numel), _moved(tape, picked, picked.numel)
    inputs = received
    if slices > 1:
        inputs, shares = _moved(tape, inputs, inputs.numel * slices), _moved(tape, shares, shares.numel * slices)
    if several:
        mapped = pairs * slices * cut.experts.fuses_permutation
        inputs, shares = _sorted(tape, inputs, mapped), _sorted(tape, shares, 0)
    computed = _experts(tape, inputs, shares, spec, weights, cut, several)
    del inputs, shares
    output = _sorted(tape, computed, pairs * slices * cut.experts.fuses_permutation) if several else computed
    if slices > 1:
        # Sums of slices are formed in the format of the scores.
        output = cast(tape, output, scores.element_bytes)
        output = cast(tape, _moved(tape, output, output.numel // slices), hidden.element_bytes)
    del computed
    if ranks > 1:
        output = _moved(tape, output, output.numel)
    return _unpermuted(tape, output, hidden.numel, order)


def _gathered(
    tape: Tape, hidden: Tensor, scores: Tensor, chosen: Tensor, spec: Experts, weights: Named, cut: Cut
) -> Tensor:
    """``MoEAllGatherTokenDispatcher``: all tokens lie in a buffer that is never given back, and sums of outputs go to
    their ranks."""
    together, ranks = cut.experts.ranks * cut.experts.slices, cut.experts.ranks
    tokens, local = chosen.numel // spec.count, spec.count // ranks
    width = hidden.numel // tokens
    pairs = tokens * together * spec.active // ranks
    whole = hidden
    if together > 1:
        marks = tape.new(chosen.numel * together, 1)
        scores = _moved(tape, scores, scores.numel * together)
        whole = _in_buffer(tape, hidden, together)
        chosen = marks
        del marks
    if ranks > 1:
        chosen, scores = tape.new(tokens * together * local, 1), _moved(tape, scores, tokens * together * local)
    order = [tape.new(pairs, INDEX_BYTES)]
    permuted = _permuted(tape, whole, pairs * width, order)
    shares = _selected(tape, scores, pairs, [tape.like(scores), tape.like(chosen)])
    tape.left += [chosen, shares, *order]
    output = _experts(tape, permuted, shares, spec, weights, cut, local > 1)
    del permuted, shares
    output = _unpermuted(tape, output, whole.numel, order)
    return _moved(tape, output, hidden.numel) if together > 1 else output


def _experts(
    tape: Tape, inputs: Tensor, shares: Tensor, spec: Experts, weights: Named, cut: Cut, several: bool
) -> Tensor:
    """The experts of this rank over their rows, weighted by *shares* before the second product: in one kernel, or one
    after another, whose outputs are then joined."""
    apart = several and not cut.experts.grouped
    inputs = _split(tape, inputs) if apart else inputs
    inner = linear(tape, inputs, weights["mlp.experts.linear_fc1.weight"], cut)
    del inputs
    inner = weighted_activation(tape, inner, shares, gated=spec.gated)
    output = linear(tape, inner, weights["mlp.experts.linear_fc2.weight"], cut)
    return copy(tape, output) if apart else output


def _moved(tape: Tape, x: Tensor, numel: int) -> Tensor:
    """*x* after a transfer, in *numel* elements of its own; its gradient goes the other way."""
    output, before = tape.new(numel, x.element_bytes), x.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return (tape.new(before, gradient.element_bytes),)

    return tape.attach(output, [x], backward, saves="nothing")


def _in_buffer(tape: Tape, x: Tensor, times: int) -> Tensor:
    """*x* of all ranks in the buffer for gathers; so are the sums of its gradients."""
    nothing = tape.new(0, x.element_bytes)
    output = Tensor(x.numel * times, x.element_bytes, True, nothing.storage)
    numel = x.numel

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        return (Tensor(numel, gradient.element_bytes, True, tape.new(0, gradient.element_bytes).storage),)

    return tape.attach(output, [x], backward, saves="nothing")


def _sorted(tape: Tape, x: Tensor, mapped: int) -> Tensor:
    """Rows in another order, of which one kernel keeps where *mapped* of them went (TransformerEngine,
    pytorch/triton/permutation.py ``make_chunk_sort_map``)."""
    output = tape.like(x)
    places = [tape.new(mapped, MAP_BYTES)] if mapped else []
    tape.work(x, output, *places)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        back = tape.like(gradient)
        tape.work(gradient, back, *places)
        return (back,)

    return tape.attach(output, [x], backward, saves="outputs" if places else "nothing")


def _split(tape: Tape, x: Tensor) -> Tensor:
    """Views of *x*, whose gradients are then joined."""
    output = Tensor(x.numel, x.element_bytes, True, x.storage)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        joined = tape.like(gradient)
        tape.work(gradient, joined)
        return (joined,)

    return tape.attach(output, [x], backward, saves="nothing")


def _permuted(tape: Tape, hidden: Tensor, numel: int, order: list[Tensor]) -> Tensor:
    """Rows of tokens, expert by expert; backward adds up those of one token."""
    output, before = tape.new(numel, hidden.element_bytes), hidden.numel
    tape.work(output, output, *order)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        summed = tape.new(before, gradient.element_bytes)
        tape.work(gradient, *order, summed, kernels=2)
        return (summed,)

    return tape.attach(output, [hidden], backward, saves="outputs")


def _selected(tape: Tape, scores: Tensor, pairs: int, kept: list[Tensor]) -> Tensor:
    """The scores of chosen experts, one for each row."""
    output, before = tape.new(pairs, scores.element_bytes), scores.numel
    tape.work(scores, output, kernels=2)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(before, gradient.element_bytes)
        tape.work(gradient, *kept, spread, kernels=2)
        return (spread,)

    return tape.attach(output, [scores], backward, saves="outputs")


def _unpermuted(tape: Tape, x: Tensor, numel: int, order: list[Tensor]) -> Tensor:
    """Each token's rows, added up."""
    output, rows = tape.new(numel, x.element_bytes), x.numel
    tape.work(x, *order, output, kernels=2)

    def backward(tape: Tape, gradient: Tensor) -> Gradients:
        spread = tape.new(rows, gradient.element_bytes)
        tape.work(gradient, *order, spread)
        return (spread,)

    return tape.attach(output, [x], backward, saves="outputs")
