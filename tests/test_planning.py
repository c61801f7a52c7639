"""What plans are made of: machines, counts against hand counts, HLO as the partitioner writes it, the roofline."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from uae_jax.errors import UserError
from uae_jax.models.attention import splash
from uae_jax.planning import compiler, flops, partitioned, roofline, topology

# ---- machines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, slices, chips",
    [("v5e:4x4", 1, 16), ("v5p:4x4x8", 1, 128), ("v6e:16x16", 4, 1024), ("h100:8", 1, 8), ("h200:1", 1, 1)],
)
def test_topologies(name, slices, chips):
    found = topology.parse(name, slices)
    assert found.chips == chips and found.slices == slices
    assert found.chip.hbm < found.chip.hbm_bandwidth and found.chip.dcn < found.chip.ici < found.chip.hbm_bandwidth


@pytest.mark.parametrize(
    "name, slices",
    [
        *((name, 1) for name in ("v5e", "v5e:", "v9z:4x4", "v5e:4x4x4", "v5p:4x4", "h100:2x4", "v5e:0x4", "v5e:4x-4")),
        ("v5e:4x4", 0),
        ("h100:8", 2),
        ("h100:12", 1),
        ("v5p:64x64x64", 1),
    ],
)
def test_no_such_topology(name, slices):
    with pytest.raises(UserError, match=r"--(topology|slices)="):
        topology.parse(name, slices)


# ---- FLOPs on the jaxpr ----------------------------------------------------------------------------------------------


def test_kernels_and_what_devices_do_each_for_themselves():
    """A shard_map's body is one device's part; a Pallas kernel runs once a cell of its grid, and hides no FLOPs."""
    mesh = jax.sharding.AbstractMesh((4, 2), ("b", "c"))
    spec = jax.sharding.PartitionSpec(("b", "c"))
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    assert count(split, (16, 5), (5, 7), with_batch=[True, False]).split_flops == 2 * 16 * 5 * 7

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    tiled = pl.pallas_call(
        kernel,
        grid=(4, 3),
        in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 24), jnp.float32),
    )
    found = count(tiled, (32, 16), (16, 24))
    assert found.split_flops == 2 * 32 * 16 * 24 and found.split_bytes == 4 * (32 * 16 + 16 * 24 + 32 * 24)


def test_splash_attention_is_counted():
    """Two products of [t, h] by [h, s] a head, whole blocks of heads padded to 128 channels."""
    b, t, n, h = 2, 512, 2, 128
    q = jax.ShapeDtypeStruct((b, t, n, h), jnp.bfloat16)
    seen = jax.ShapeDtypeStruct((b, t), jnp.bool_)
    jaxpr = jax.make_jaxpr(lambda q, k, v, seen: splash(q, k, v, seen, scale=1.0))(q, q, q, seen)
    found = flops.count(jaxpr, [True] * 4, flops.Known(1))
    assert found.split_flops == pytest.approx(4 * b * n * t * t * h, rel=0.02)


def count(function, *shapes, with_batch=None, trips=1, rows=(), dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    known = flops.Known(trips, frozenset(rows))
    return flops.count(jax.make_jaxpr(function)(*arguments), with_batch or [True] * len(shapes), known)


def test_products():
    """2 m n k of each, times the batch; a convolution by its kernel."""
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)).split_flops == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), (2, 3, 5), (2, 5, 7)).split_flops == 2 * 2 * 3 * 5 * 7
    strided = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(strided, (4, 8, 8, 3), (2, 2, 3, 6)).split_flops == 2 * (4 * 4 * 4 * 6) * (2 * 2 * 3)
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)).split_bytes == 4 * (15 + 35 + 21)
    assert count(lambda a, b: a @ b, (3, 5), (5, 7), dtype=jnp.bfloat16).split_bytes == 2 * (15 + 35 + 21)


def test_weights_are_told_from_the_batch():
    """Operands without a batch count whole on every chip; products of such, too."""
    found = count(lambda w, v, x: x @ (w @ v), (5, 7), (7, 11), (3, 5), with_batch=[False, False, True])
    assert found.whole_flops == 2 * 5 * 7 * 11 and found.split_flops == 2 * 3 * 5 * 11
    assert found.whole_bytes == 4 * (35 + 77 + 55) + 4 * 55 and found.split_bytes == 4 * (15 + 33)
    assert found.flops(4) == found.split_flops / 4 + found.whole_flops


def test_constants_repeated_along_the_batch_are_split_with_it():
    """As a noise level is, for every row of the batch and for both branches of guidance."""

    def embedded(w, level):
        return jnp.broadcast_to(level, (2, 3, 4, 5)) @ w

    arguments = {"with_batch": [False, False]}
    assert count(embedded, (5, 7), (5,), **arguments).whole_flops == 2 * 24 * 5 * 7
    found = count(embedded, (5, 7), (5,), rows=[(3, 4)], **arguments)
    assert found.split_flops == 2 * 24 * 5 * 7 and found.whole_flops == 0


def test_loops_count_as_often_as_they_run():
    once = 2 * 4 * 8 * 8

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    assert count(scanned, (4, 8), (6, 8, 8)).split_flops == 6 * once

    def nested(x, ws):
        return jax.lax.scan(lambda x, _: (jax.jit(scanned)(x, ws), None), x, None, length=5)[0]

    assert count(nested, (4, 8), (6, 8, 8)).split_flops == 30 * once

    def until(x, w):
        return jax.lax.while_loop(lambda x: (x @ w).sum() < 1, lambda x: x @ w @ w, x)

    found = count(until, (4, 8), (8, 8), with_batch=[True, False], trips=7)
    assert found.split_flops == 7 * 2 * once + 8 * once
    assert found.carried == 4 * 32 and found.held == 2 * 4 * 64

    def branched(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(branched, (4, 8), (8, 8)).split_flops == 2 * once


def test_what_a_loop_carries_becomes_batch():
    """A carry that starts without a batch and gets one counts as one, in all rounds."""

    def function(w, x):
        return jax.lax.scan(lambda c, _: (c @ w + x, None), jnp.zeros((4, 8)), None, length=3)[0]

    found = count(function, (8, 8), (4, 8), with_batch=[False, True])
    assert found.split_flops == 3 * 2 * 4 * 8 * 8 and found.whole_flops == 0


def test_remat_counts_as_executed():
    """Forward, and backward with two products each; recomputing adds the forward ones whose results it needs."""
    once = 2 * 4 * 8 * 8

    def layers(block):
        return lambda x, ws: jax.lax.scan(lambda x, w: (block(x, w), None), x, ws)[0].sum()

    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    plain = count(jax.grad(layers(block), argnums=1), (4, 8), (6, 8, 8)).split_flops
    recomputed = count(jax.grad(layers(jax.checkpoint(block)), argnums=1), (4, 8), (6, 8, 8)).split_flops
    assert plain == 6 * (2 + 4) * once
    assert recomputed == 6 * (2 + 4 + 2) * once


# ---- the partitioned program -----------------------------------------------------------------------------------------

HLO = """HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[4,64], bf16[64,32])) -> (s32[], bf16[4,64], bf16[64,32]) {
  %p = (s32[], bf16[4,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[4,64]{1,0} get-tuple-element(%p), index=1
  %w = bf16[64,32]{1,0} get-tuple-element(%p), index=2
  %all-gather = bf16[64,64]{1,0} all-gather(%w), channel_id=1, replica_groups=GATHERED, dimensions={1}
  %dot = bf16[4,64]{1,0} dot(%x, %all-gather), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], bf16[4,64]{1,0}, bf16[64,32]{1,0}) tuple(%next, %dot, %w)
}

%cond (p.1: (s32[], bf16[4,64], bf16[64,32])) -> pred[] {
  %p.1 = (s32[], bf16[4,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(9)
  %lt = pred[] compare(%i.1, %limit), direction=LT
  %done = pred[] custom-call(%i.1), custom_call_target="done"
  %every = pred[] all-reduce(%done), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %go = pred[] and(%lt, %every)
}

ENTRY %main (x.2: bf16[4,64], w.2: bf16[64,32]) -> f32[] {
  %x.2 = bf16[4,64]{1,0} parameter(0)
  %w.2 = bf16[64,32]{1,0} parameter(1)
  %first = s32[] constant(START)
  %start = (s32[], bf16[4,64]{1,0}, /*index=2*/bf16[64,32]{1,0}) tuple(%first, %x.2, %w.2)
  %loop = (s32[], bf16[4,64]{1,0}, bf16[64,32]{1,0}) while(%start), condition=%cond, body=%body
  %y = bf16[4,64]{1,0} get-tuple-element(%loop), index=1
  %zero = f32[] constant(0)
  %f = f32[4,64]{1,0} convert(%y)
  %sum = f32[] reduce(%f, %zero), dimensions={0,1}, to_apply=%add
  ROOT %total = f32[] all-reduce(%sum), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def read(start=0, gathered="[4,2]<=[8]", slice_size=8, step=1):
    text = HLO.replace("START", str(start)).replace("GATHERED", gathered).replace("constant(1)", f"constant({step})")
    return partitioned.read(text, lambda partition: partition // slice_size, 8)


@pytest.mark.parametrize("start, step, rounds", [(0, 1, 9), (3, 1, 6), (0, 2, 5), (3, 2, 3)])
def test_reads_loops_and_collectives(start, step, rounds):
    found = read(start, step=step)
    assert found.flops == rounds * 2 * 4 * 64 * 64 and found.unknown_loops == 0
    assert found.bytes == rounds * 2 * (4 * 64 + 64 * 64 + 4 * 64)
    inside = {(c.kind, c.depth): c for c in found.collectives}
    gather, every, total = inside["all-gather", 1], inside["all-reduce", 1], inside["all-reduce", 0]
    assert (gather.places, gather.executed, gather.bytes, gather.group) == (1, rounds, 2 * 64 * 64, 2)
    assert gather.received == rounds * 2 * 64 * 64 / 2
    assert (every.executed, every.bytes, every.group) == (rounds, 1, 8)
    assert total.executed == 1 and total.received == 2 * 4 * 7 / 8
    assert gather.received_dcn == 0


def test_a_loop_without_a_counter_is_reported():
    found = partitioned.read(HLO.replace("direction=LT", "direction=NE").replace("START", "0"), lambda _: 0, 8)
    assert found.unknown_loops == 1 and found.flops == 2 * 4 * 64 * 64


@pytest.mark.parametrize(
    "notation, expected",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups(notation, expected):
    assert sorted(partitioned.groups(f"), channel_id=1, {notation}, dimensions={{0}}", 8)) == sorted(expected)


def test_what_crosses_slices():
    """Two slices of four: a gather inside one stays there, one across brings each chip its share of what is missing."""
    assert {c.slices for c in read(gathered="[4,2]<=[8]", slice_size=4).collectives if c.kind == "all-gather"} == {1}
    across = next(c for c in read(gathered="[1,8]<=[8]", slice_size=4).collectives if c.kind == "all-gather")
    assert across.slices == 2
    assert across.received_dcn == 9 * (2 * 64 * 64 / 2) / 4 and across.received == 9 * 2 * 64 * 64 * 3 / 4


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("all-gather", 3 / 4),
        ("all-reduce", 2 * 3 / 4),
        ("reduce-scatter", 3),
        ("all-to-all", 3 / 4),
        ("collective-permute", 1),
    ],
)
def test_bytes_received(kind, expected):
    assert partitioned.received(kind, 1024.0, 4) == 1024 * expected


# ---- memory and time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, arguments, expected",
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (20.12G) exceeds available HBM (15.75G). HLO module: jit__lambda.",
            2**30,
            20.12 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 2**30, 19.5 * 2**30),
        ("RESOURCE_EXHAUSTED: something else", 2**30, 0.0),
    ],
)
def test_reads_the_compilers_message(message, arguments, expected):
    assert compiler.beyond_arguments(message, arguments) == pytest.approx(expected)
    failed = compiler.Compiled(1.0, arguments, None, message, None)
    assert failed.beyond_arguments == pytest.approx(expected)


def test_the_slowest_resource_is_the_time():
    chip = topology.CHIPS["cpu"]
    load = roofline.Load(flops=2e11, hbm=1e10, ici=1e8, dcn=5e8)
    found = roofline.estimate(load, chip)
    assert found == roofline.Estimate(2.0, 1.0, 0.1, 5.0)
    assert found.seconds == 5.0 and found.bound == "dcn"
    assert roofline.estimate(load._replace(dcn=0.0), chip).bound == "compute"
