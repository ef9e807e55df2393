"""Work of the matrix products in a stretch of the step program."""

from __future__ import annotations

from typing import NamedTuple

from advisor.step.program import Amount, Block, Node, Repeat, read_once, total


class Flop(NamedTuple):
    """Work of matrix products."""

    done: Amount
    whole: Amount
    """With whole scores matrices under a causal mask."""


@read_once
def flop(node: Node) -> Flop:
    """The work of *node*, of whatever phase."""
    if isinstance(node, Block):
        return Flop(
            total(each.flop for each in node.matmuls), total(each.flop / each.flop_share for each in node.matmuls)
        )
    if isinstance(node, Repeat):
        done, whole = flop(node.body)
        return Flop(node.times * done, node.times * whole)
    steps = [flop(step) for step in node.steps if not isinstance(step, Block) or step.matmuls]
    return Flop(total(each.done for each in steps), total(each.whole for each in steps))
