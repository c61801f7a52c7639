"""Work counted on a jaxpr, loops included as often as they run: FLOPs of products, and bytes these read and write.

The compiler's own count sees a loop's body once. Values that depend on the batch are told from those that do not (the
weights): the work of the first is split over all chips, that of the second is done on each.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core


class Work(NamedTuple):
    """FLOPs of matrix products and convolutions, a multiply-add as two, and the bytes of their operands and results."""

    split_flops: float = 0.0  # of products with a batch: divided by the number of chips
    whole_flops: float = 0.0  # of products without: the same on every chip
    split_bytes: float = 0.0  # of operands and results with a batch
    whole_bytes: float = 0.0  # ... without: weights
    carried: float = 0.0  # bytes with a batch that the token loop carries: the cache
    held: float = 0.0  # bytes without a batch that the token loop reads: the decode view

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """The sum; what loops hold is not added up, the larger counts."""
        sums = [a + times * b for a, b in zip(self[:4], other[:4], strict=True)]
        held = [max(self.carried, other.carried), max(self.held, other.held)]
        return Work(*sums, *held)

    def flops(self, chips: int) -> float:
        """FLOPs of one chip."""
        return self.split_flops / chips + self.whole_flops

    def bytes(self, chips: int) -> float:
        """Bytes of one chip."""
        return self.split_bytes / chips + self.whole_bytes


class Known(NamedTuple):
    """What a jaxpr does not say."""

    trips: int  # runs of the body of a loop whose end the data decides; a scan says its own
    rows: frozenset[tuple[int, ...]] = frozenset()  # batch axes, as (b, g); constants repeated along them are split too


def count(jaxpr: core.ClosedJaxpr, with_batch: Sequence[bool], known: Known) -> Work:
    """The work of one call.

    Args:
      with_batch: for each argument, whether it depends on the batch.
    """
    return _walk(jaxpr.jaxpr, list(with_batch), known)[0]


def _bytes(variable: Any) -> float:
    aval = variable.aval
    size = math.prod(aval.shape)
    try:
        return float(size * np.dtype(aval.dtype).itemsize)
    except TypeError:  # a typed key
        return float(size * 8)


# Products [t, s, h] that a call of cuDNN's attention does for each head; backward it does the first again.
_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def _product_flops(equation: Any) -> float:
    """FLOPs of dot_general, conv_general_dilated, and cuDNN's attention; 0 of anything else."""
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
    if name in _ATTENTION:
        (*batch, t, n, h), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[-3]
        return 2.0 * _ATTENTION[name] * math.prod(batch) * t * s * n * h
    return 0.0


def _closed(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _walk(jaxpr: Any, with_batch: list[bool], known: Known) -> tuple[Work, list[bool]]:
    """The work of a jaxpr, and which of its results depend on the batch."""
    depends: dict[Any, bool] = dict(zip(jaxpr.invars, with_batch, strict=True))

    def of(variable: Any) -> bool:
        return not isinstance(variable, core.Literal) and depends.get(variable, False)

    work = Work()
    for equation in jaxpr.eqns:
        inputs = [of(x) for x in equation.invars]
        done, outputs = _equation(equation, inputs, known)
        work = work.plus(done)
        depends |= dict(zip(equation.outvars, outputs, strict=True))
    return work, [of(x) for x in jaxpr.outvars]


def _equation(equation: Any, inputs: list[bool], known: Known) -> tuple[Work, list[bool]]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, inputs, known)
    if name == "while":
        return _while(equation, inputs, known)
    if name == "cond":
        branches = [_walk(_closed(branch), inputs[1:], known) for branch in params["branches"]]
        work = max((work for work, _ in branches), key=lambda w: w.split_flops + w.whole_flops)
        return work, [inputs[0] or any(found) for found in zip(*(outputs for _, outputs in branches), strict=True)]
    if name == "shard_map":  # its body is one device's
        work, _ = _walk(_closed(params["jaxpr"]), [True] * len(inputs), known)
        split = any(inputs)
        return Work().plus(work, params["mesh"].size), [split] * len(equation.outvars)
    if name == "pallas_call":
        return _kernel(equation, any(inputs), known)
    inner = [_closed(x) for x in params.values() if hasattr(_closed(x), "eqns")]
    for jaxpr in inner:  # jit, checkpoint, custom_vjp_call, ...: called once, with these arguments
        if len(jaxpr.invars) == len(inputs) and len(jaxpr.outvars) == len(equation.outvars):
            return _walk(jaxpr, inputs, known)
    split = any(inputs) or (name == "broadcast_in_dim" and _repeated(equation.outvars[0].aval.shape, known))
    flops = _product_flops(equation)
    if not flops:
        return Work(), [split] * len(equation.outvars)
    moved = [(_bytes(x), depends) for x, depends in zip(equation.invars, inputs, strict=True)]
    moved += [(_bytes(x), split) for x in equation.outvars]
    with_batch, without = (sum(size for size, depends in moved if depends is side) for side in (True, False))
    return Work(flops * split, flops * (not split), with_batch, without), [split] * len(equation.outvars)


def _repeated(shape: tuple[int, ...], known: Known) -> bool:
    """Whether an array has the batch's axes, first or behind the branches of guidance: its layout is then theirs."""
    return any(shape[at : at + len(rows)] == rows for rows in known.rows for at in (0, 1))


def _kernel(equation: Any, split: bool, known: Known) -> tuple[Work, list[bool]]:
    """A kernel runs once a cell of its grid, and moves its operands and results."""
    jaxpr = _closed(equation.params["jaxpr"])
    once, _ = _walk(jaxpr, [True] * len(jaxpr.invars), known)
    flops = once.split_flops * math.prod(equation.params["grid_mapping"].grid)
    moved = sum(map(_bytes, (*equation.invars, *equation.outvars)))
    work = Work(flops * split, flops * (not split), moved * split, moved * (not split))
    return work, [split] * len(equation.outvars)


def _until_stable(body: Any, consts: list[bool], carry: list[bool], rest: list[bool], known: Known) -> Any:
    """The work of a loop's body, and which results depend on the batch once it has gone round."""
    while True:
        work, outputs = _walk(body, consts + carry + rest, known)
        grown = [a or b for a, b in zip(carry, outputs, strict=False)]
        if grown == carry:
            return work, carry, outputs[len(carry) :]
        carry = grown


def _scan(equation: Any, inputs: list[bool], known: Known) -> tuple[Work, list[bool]]:
    params = equation.params
    consts, carried = params["num_consts"], params["num_carry"]
    parts = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
    work, carry, stacked = _until_stable(_closed(params["jaxpr"]), *parts, known)
    return Work().plus(work, params["length"]), carry + stacked


def _while(equation: Any, inputs: list[bool], known: Known) -> tuple[Work, list[bool]]:
    params = equation.params
    before, consts = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    work, carry, _ = _until_stable(_closed(params["body_jaxpr"]), inputs[before:consts], inputs[consts:], [], known)
    condition, _ = _walk(_closed(params["cond_jaxpr"]), inputs[:before] + carry, known)
    held = sum(_bytes(x) for x, split in zip(equation.invars[:consts], inputs[:consts], strict=True) if not split)
    carried = sum(_bytes(x) for x, split in zip(equation.invars[consts:], carry, strict=True) if split)
    total = Work().plus(work, known.trips).plus(condition, known.trips + 1)
    return total._replace(carried=max(total.carried, carried), held=max(total.held, held)), carry
