"""The step on eight virtual devices: same numbers as on one, and no weights gathered inside the token loop."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import devices, tiny

FAMILIES = ("diffusion", "autoregressive")
ROOT = Path(__file__).parents[1]


def body_of(text: str, name: str) -> str:
    """One computation of an HLO module."""
    return text[text.index(f"\n%{name} (") :].split("\n}", 1)[0]


def reachable(text: str, name: str) -> str:
    """A computation with all that it calls, other loops included."""
    seen, todo = {}, [name]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen[current] = body_of(text, current)
            todo += re.findall(r"(?:calls|body|condition|to_apply)=%([\w.\-]+)", seen[current])
    return "\n".join(seen.values())


def collectives(text: str) -> list[str]:
    return re.findall(r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w\-]*\(", text)


def worker(weights: str, janus: str, data: int, fsdp: int, tensor: int) -> dict:
    """Runs in a process of its own: two steps on a mesh, the collectives of the token loops, and what is donated.

    Args:
      weights: of the diffusion family, and towers.
      janus: weights of the autoregressive family, if it is that which runs.
    """
    import jax
    import jax.numpy as jnp

    from tests.test_step import make
    from uae_jax import sharding, system

    jax.config.update("jax_default_matmul_precision", "highest")
    sharding.SMALLEST_SHARDED = 0  # everything is small here
    changes = {
        "data__batch_size": 8,
        "rl__group_size": 2,
        "mesh__data": data,
        "mesh__fsdp": fsdp,
        "mesh__tensor": tensor,
        "rl__rollout_microbatches": 1 if tensor == 1 else 2,
        "redraw__gather": "layer" if tensor == 1 else "once",
        "eval__batch_size": 8,
        "rl__scale_by_std": False,  # two captions of nearly one reward: their deviation would magnify rounding
        "optimizer__learning_rate": 5e-6,  # Adam steps as far for a gradient that is but rounding as for any
    }
    both = {"train": "both", "text_encoder": "live", "redraw__same_noise": False, "redraw__guidance": 2.0}
    config = tiny.ar_config(janus, weights, **changes, **both) if janus else tiny.config(weights, **changes)
    mesh = sharding.make_mesh(config, jax.devices()[: data * fsdp * tensor])
    built = system.load(config, mesh)
    state, function = make(config, built, mesh)
    state = sharding.place(state, mesh, built.rules)
    split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    batch = sharding.place_batch({"image": tiny.scenes(8)}, mesh)
    compiled = sharding.jit_step(function, state, mesh).lower(state, built.frozen, batch).compile()
    text = compiled.as_text()
    # The token loop is the one that stops early: its condition looks at a bool of every device.
    loops = re.findall(r"while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)", text)
    early = [
        (c, b) for c, b in loops if "pred[] all-reduce" in reachable(text, c) or "all-reduce(" in reachable(text, c)
    ]
    # Image tokens are of one number, so their loop counts up to it.
    counted = [b for c, b in loops if f"constant({tiny.CODES})" in reachable(text, c)]
    rows = []
    for _ in range(2):
        state, metrics = compiled(state, built.frozen, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
    return {
        "rows": rows,
        "early": len(early),
        "counted": len(counted),
        "inside": [found for b in [*(b for _, b in early), *counted] for found in collectives(reachable(text, b))],
        "split": len(split),
        "copied": [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, x in jax.tree_util.tree_leaves_with_path((state, built.frozen))
            if x.ndim > 1 and x.sharding.is_fully_replicated
        ],
        "donated": [
            compiled.memory_analysis().alias_size_in_bytes,
            sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state))),
        ],
        "norm": float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(state.params)))),
    }


def run(call: str) -> dict:
    environment = devices.environment(8, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    code = f"import json; from tests.test_sharded_step import worker; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unsharded(weights, tmp_path_factory):
    """{family: (Janus' weights, the worker's findings on one device)}, as they are asked for."""

    class Findings(dict):
        def __missing__(self, family):
            janus = str(tiny.write_janus(tmp_path_factory.mktemp("janus"))) if family == "autoregressive" else ""
            self[family] = janus, run(f"worker({str(weights)!r}, {janus!r}, 1, 1, 1)")
            return self[family]

    return Findings()


@pytest.mark.parametrize("mesh", [pytest.param((2, 4, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_equals_unsharded_and_gathers_outside_the_token_loops(weights, unsharded, family, mesh):
    janus, one = unsharded[family]
    eight = run(f"worker({str(weights)!r}, {janus!r}, {', '.join(map(str, mesh))})")
    assert eight["split"] > 0 and one["split"] == 0
    assert eight["early"] == 1
    assert eight["counted"] == (1 if janus else 0)
    # Of heads, widths and words that tensor splits, the parts are summed; and the likeliest code of each part compared.
    kinds = {kind for _, kind in eight["inside"]}
    shapes = " ".join(shape for shape, kind in eight["inside"] if kind == "all-gather")
    compared = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", shapes)]
    assert kinds - {"all-gather"} == (set() if mesh[2] == 1 else {"all-reduce"}), eight["inside"]
    rows = 8 * 2 // 2 // 4  # of a rollout's half, on each of four devices
    assert len(compared) == (2 if janus and mesh[2] > 1 else 0) and all(n == rows * mesh[2] for n in compared)
    assert not [path for path in eight["copied"] if path.endswith(("kernel", "embedding", "lora_a", "lora_b"))]
    assert eight["donated"][0] >= eight["donated"][1] > 0
    for name in ("reward/mean", "caption/length", "loss", "kl", "grad_norm", "logp/sampler_gap"):
        for a, b in zip(one["rows"], eight["rows"], strict=True):
            assert abs(a[name] - b[name]) < 1e-4 * max(1.0, abs(a[name])), name
    assert abs(one["norm"] - eight["norm"]) < 1e-3
