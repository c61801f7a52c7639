"""Reads an HLO module as the SPMD partitioner left it: what one chip computes and says to others, by loop depth.

This is the place to count collectives: later passes turn gathers into reductions or hide them in fusions and
asynchronous calls. Loops count as often as they run.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


class Collective(NamedTuple):
    """One kind of exchange, of one size, at one depth."""

    kind: str
    depth: int  # loops round it
    places: int  # in the program
    executed: float  # runs of all of them
    bytes: float  # of the result of one, on a chip
    group: int  # chips that take part
    slices: int  # slices they lie in
    received: float  # bytes that a chip receives in all runs over the links of its slice, at the least
    received_dcn: float  # ... from other slices, had each chip of a slice fetched an equal part of what it lacks


class Partitioned(NamedTuple):
    """What one chip does."""

    flops: float  # of products
    bytes: float  # that products read and write
    collectives: list[Collective]
    unknown_loops: int  # whose number of rounds could not be read, and which count once


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str  # operands and attributes, as written


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}}, the result last, and the entry's name."""
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[1]
            computations[current] = {}
            entry = current if line.startswith("ENTRY") else entry
        elif current and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
            computations[current][name] = Instruction(name, shape, opcode, operands, rest)
            if line.lstrip().startswith("ROOT "):
                roots[current] = name
    for computation, root in roots.items():
        computations[computation][root] = computations[computation].pop(root)
    return computations, entry


def size(shape: str) -> float:
    """Bytes of a shape, tuples included."""
    return sum(_BYTES.get(kind, 0) * math.prod(_dims(dims)) for kind, dims in _SHAPE.findall(shape))


def _dims(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _shape_of(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    return _dims(found[2]) if found else []


def _attribute(instruction: Instruction, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", instruction.rest)
    return _dims(found[1]) if found else []


def product_flops(instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of a dot or a convolution; 0 of anything else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    out = math.prod(_shape_of(instruction.shape))
    if instruction.opcode == "dot":
        left = _shape_of(scope[instruction.operands[0]].shape)
        return 2.0 * out * math.prod(left[i] for i in _attribute(instruction, "lhs_contracting_dims"))
    kernel = _shape_of(scope[instruction.operands[1]].shape)
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.rest)
    outputs = kernel[labels[1].index("o")] if labels else 1
    return 2.0 * out * math.prod(kernel) / outputs


def groups(attributes: str, partitions: int) -> list[list[int]]:
    """The groups of partitions of a collective, in whichever of HLO's notations they are written."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return [_dims(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids = np.arange(math.prod(axes.values())).reshape(list(axes.values()))
        if order := re.search(r"device_ids=\(([\d,]+)\)|device_ids=\[([\d,]+)\]", mesh[2]):
            ids = np.array(_dims(order[1] or order[2])).reshape(ids.shape)
        return _along(ids, list(axes), mesh[3])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(math.prod(_dims(iota[2]))).reshape(_dims(iota[2]))
        ids = ids.transpose(_dims(iota[3])) if iota[3] else ids
        return ids.reshape(_dims(iota[1])).tolist()
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    found = [_dims(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []
    return found or [list(range(partitions))]


def _along(ids: np.ndarray, names: list[str], text: str) -> list[list[int]]:
    """Groups along some axes of a mesh; `'a':(2)4` is a part of an axis: after a factor of 2, a factor of 4."""
    chosen: list[tuple[str, int, int]] = []
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text):
        length = ids.shape[names.index(name)]
        chosen.append((name, int(before or 1), int(part or length)))
    shape, moving = [], []
    for name, length in zip(names, ids.shape, strict=True):
        parts, done = sorted((before, part) for axis, before, part in chosen if axis == name), 1
        for before, part in parts:
            shape.append(before // done)
            moving.append(len(shape))
            shape.append(part)
            done = before * part
        shape.append(length // done)
    split = np.moveaxis(ids.reshape(shape), moving, range(-len(moving), 0))
    return split.reshape(-1, math.prod(shape[i] for i in moving)).tolist()


def received(kind: str, result: float, group: int) -> float:
    """Bytes that a chip of a group receives at the least (rings): `result` is the size of what it ends up with."""
    share = (group - 1) / group
    return {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": result * (group - 1),
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]


def _constant(name: str, scope: dict[str, Instruction]) -> int | None:
    instruction = scope.get(name)
    while instruction is not None and instruction.opcode in ("copy", "convert", "bitcast", "reshape"):
        instruction = scope.get(instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"(-?\d+)\)", instruction.rest)
    return int(value[1]) if value else None


def trips(loop: Instruction, scope: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]) -> int:
    """Rounds of a loop that counts up to a constant, whatever else may end it earlier; 0 where not known."""
    condition, body = (
        computations.get(found[1], {}) if (found := re.search(rf"{part}=%?([\w.\-]+)", loop.rest)) else {}
        for part in ("condition", "body")
    )
    for instruction in condition.values():
        if instruction.opcode != "compare" or "direction=LT" not in instruction.rest:
            continue
        counter, end = condition.get(instruction.operands[0]), _constant(instruction.operands[1], condition)
        index = counter is not None and re.search(r"index=(\d+)", counter.rest)
        if end is None or counter is None or counter.opcode != "get-tuple-element" or not index:
            continue
        step = _increment(list(body.values())[-1], int(index[1]), body)
        start = scope.get(loop.operands[0])
        begin = _constant(start.operands[int(index[1])], scope) if start and start.opcode == "tuple" else None
        return -(-max(end - (begin or 0), 0) // step) if step else 0
    return 0


def _increment(root: Instruction, index: int, body: dict[str, Instruction]) -> int:
    """What a round adds to an entry of the loop's tuple; 0 where not known."""
    total, at = 0, body.get(root.operands[index]) if root.opcode == "tuple" else None
    while at is not None and at.opcode == "add":
        values = [_constant(name, body) for name in at.operands]
        if values.count(None) != 1:
            return 0
        total += next(value for value in values if value is not None)
        at = body.get(at.operands[values.index(None)])
    return total if at is not None and at.opcode == "get-tuple-element" else 0


def read(text: str, slice_of: Callable[[int], int], partitions: int, times: int = 1) -> Partitioned:
    """Counts a module.

    Args:
      text: of an HLO module after SPMD partitioning.
      slice_of: the slice in which a partition lies.
      partitions: number of chips.
      times: how often it is run.
    """
    computations, entry = parse(text)
    flops = moved = 0.0
    unknown = 0
    found: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    spans: dict[str, tuple[int, int]] = {}

    def visit(name: str, depth: int, times: float) -> Iterator[tuple[Instruction, dict[str, Instruction], int, float]]:
        nonlocal unknown
        scope = computations[name]
        for instruction in scope.values():
            yield instruction, scope, depth, times
            if instruction.opcode == "while":
                rounds = trips(instruction, scope, computations)
                unknown += not rounds
                for part in re.findall(r"(?:condition|body)=%?([\w.\-]+)", instruction.rest):
                    yield from visit(part, depth + 1, times * (rounds or 1))
            elif instruction.opcode in ("call", "fusion", "conditional"):
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                called = re.findall(r"(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)", instruction.rest)
                for part in re.findall(r"%([\w.\-]+)", listed[1]) if listed else called:
                    yield from visit(part, depth, times)

    for instruction, scope, depth, runs in visit(entry, 0, float(times)):
        done = product_flops(instruction, scope)
        if done:
            flops += runs * done
            operands = sum(size(scope[name].shape) for name in instruction.operands[:2])
            moved += runs * (operands + size(instruction.shape))
        kind = instruction.opcode
        if kind in KINDS:
            attributes = instruction.rest[instruction.rest.index(")") :]
            if attributes not in spans:
                listed = groups(attributes, partitions)
                spans[attributes] = (max(map(len, listed)), max(len({slice_of(i) for i in group}) for group in listed))
            group, slices = spans[attributes]
            if group > 1:
                entry_of = found[kind, depth, size(instruction.shape), group, slices]
                entry_of[0] += 1
                entry_of[1] += runs
    collectives = []
    for (kind, depth, result, group, slices), (n, executed) in found.items():
        inside, alone = group // slices, kind in ("all-to-all", "collective-permute")
        across = received(kind, result, slices) / (1 if alone else inside) if slices > 1 else 0.0
        within = received(kind, result, inside if slices > 1 else group)
        exchange = executed * within, executed * across
        found_here = Collective(kind, depth, int(n), executed, result, group, slices, *exchange)
        collectives.append(found_here)
    return Partitioned(flops, moved, sorted(collectives, key=lambda c: -c.received), unknown)
