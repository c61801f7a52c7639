"""`uae_jax.plan`: whole plans, in a process of its own with eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from configs import janus_pro_1b, tiny
from tests import devices
from tests.tiny import changed
from uae_jax import plan, sharding
from uae_jax.errors import UserError
from uae_jax.planning import compiler, table, topology

ROOT = Path(__file__).parents[1]


def small(**changes):
    """configs/tiny.py, briefer; `changes` are dotted fields with '__' for dots."""
    config = tiny.get_config()
    config.unlock()
    fields = {"rl__group_size": 2, "rl__max_tokens": 8, "data__batch_size": 16, "mesh__data": 2, "mesh__fsdp": 4}
    return changed(config, fields | {"eval__batch_size": 16} | changes)


def run(config, machine="cpu:8", sweep=False, **options):
    """Text and JSON of a plan (of all candidates of a sweep), or the error."""
    from uae_jax.planning import report, search

    call = search.sweep if sweep else search.plan
    try:
        with mock.patch.object(sharding, "_put", side_effect=AssertionError("devices of a plan take no arrays")):
            found = call(config, topology.parse(machine), search.Options(**options), lambda line: None)
    except UserError as error:
        return str(error), None
    if sweep:
        values = [candidate.changes | report.as_json(candidate.plan) for candidate in found]
        return report.columns(report.ranking(found, 12)), values
    return report.as_text(found), report.as_json(found)


def janus():
    """configs/janus_pro_1b.py on eight devices, its weights nowhere."""
    config = janus_pro_1b.get_config()
    config.unlock()
    return changed(config, {"data__batch_size": 8, "eval__batch_size": 8, "rl__rollout_microbatches": 2})


def worker(folder):
    found = {
        "plan": run(small(), whole=True, price=2.0),
        "stage": run(small(stage="tower")),
        "sizes": run(small(weights=f"{folder}/none")),
        "batch": run(small(data__batch_size=3)),
        "devices": run(small(), "cpu:16"),
    }
    with mock.patch.object(topology, "compiles", return_value=False):
        found["gpu"] = run(small(), "h100:8")
    found["there"] = run(small(offload_optimizer=True, offload_frozen=True), parts=())
    found["janus"] = run(janus(), parts=())
    memory = compiler.Memory(2.0**20, 0.0, 2.0**20, 0.0)
    with mock.patch.object(compiler, "compile_phase", return_value=compiler.Compiled(1.0, 2.0**20, memory, "", None)):
        found["sweep"] = run(small(rl__max_tokens=4), sweep=True)
    (Path(folder) / "found.json").write_text(json.dumps(found))


# A captioner of `width` channels in front of the tiny world's decoder and tower.
WITH_TINY_DECODER = """
from configs import qwen2_5_vl_3b, tiny_coldstart


def start(width, batch):
    config = qwen2_5_vl_3b.get_config()
    config.unlock()
    models = tiny_coldstart.get_config().models
    for name in ("projector", "transformer", "clip"):
        config.models[name] = models[name]
    config.models.projector.in_size = width
    config.data.image_size = config.models.transformer.sample_size = 56
    config.models.transformer.pos_embed_max_size = 7
    config.data.batch_size = config.eval.batch_size = batch
    config.mesh.data = 1
    config.weights = "nowhere"
    return config


"""
LARGE = (
    WITH_TINY_DECODER
    + """
def get_config():
    config = start(2048, batch=8)
    config.lora.rank = 0
    return config.lock()
"""
)


def process(*arguments):
    """Runs Python with eight virtual devices."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = devices.environment(8, PYTHONPATH=path)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    done = process("-c", f"from tests.test_plan import worker; worker({str(folder)!r})")
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def test_plan_of_the_tiny_world(found):
    """It fits; the parts add up; the whole step and its parts do the same work."""
    text, values = found["plan"]
    assert "fits: peak" in text
    assert values["fits"] and 0 < values["peak_gib_per_chip"] < values["hbm_gib_per_chip"]
    assert list(values["phases"]) == ["sample", "redraw", "score", "update", "step"]
    parts = [values["phases"][name] for name in ("sample", "redraw", "score", "update")]
    assert sum(part["seconds"] for part in parts) == pytest.approx(values["seconds_estimate"])
    assert sum(part["flops_per_chip"] for part in parts) == pytest.approx(values["flops_per_chip"])
    for part in parts:
        assert part["seconds"] == max(part["seconds_by_resource"].values())
        assert part["unknown_loops"] == 0
    # What the partitioner left to each chip is what the jaxpr says; in the update, the compiler reads images once that
    # the policy and its reference both see.
    ratios = [part["flops_per_chip_partitioned"] / part["flops_per_chip"] for part in parts]
    assert ratios[:3] == pytest.approx([1.0] * 3, rel=1e-3) and 0.8 < ratios[3] <= 1.0
    assert values["images_per_s"] == pytest.approx(16 / values["seconds_estimate"])
    assert values["tokens_per_s"] == pytest.approx(16 * 2 * 8 / values["seconds_estimate"])
    hours = values["seconds_estimate"] / 3600
    assert values["cost_per_1000_images"] == pytest.approx(2 * 8 * hours * 1000 / 16)
    step = values["phases"]["step"]
    assert step["flops_per_chip_partitioned"] == pytest.approx(
        sum(part["flops_per_chip_partitioned"] for part in parts), rel=0.01
    )


def test_what_lies_in_host_memory_is_not_on_the_chip(found):
    here, there = (found[name][1]["memory_gib_per_chip"] for name in ("plan", "there"))
    assert there["optimizer"] < 0.01 * here["optimizer"] and there["trained parameters"] == here["trained parameters"]
    assert 0 < there["frozen weights"] < here["frozen weights"]  # the captioner stays
    assert not any("not offloaded" in note for note in found["there"][1]["notes"])


def test_collectives_of_the_token_loop(found):
    """Inside it only the question whether all are done; weights are gathered before it."""
    _, values = found["plan"]
    loop = [c for c in values["collectives"] if c["phase"] == "sample" and c["executed"] >= 7]
    assert [(c["kind"], c["depth"], c["bytes"]) for c in loop] == [("all-reduce", 1, 1.0)]
    assert any(c["kind"] == "all-gather" and c["depth"] == 0 for c in values["collectives"] if c["phase"] == "sample")
    assert any(c["kind"] == "all-reduce" for c in values["collectives"] if c["phase"] == "update")


def test_what_does_not_fit_exits_3(tmp_path):
    """3.75 billion parameters with Adam on eight devices of 2 GiB: said without compiling, with what to change."""
    (tmp_path / "large.py").write_text(LARGE)
    file = tmp_path / "large.json"
    config = f"--config={tmp_path / 'large.py'}"
    done = process("-m", "uae_jax.plan", config, "--topology=cpu:8", f"--json={file}", "--config.mesh.fsdp=8")
    assert done.returncode == 3, done.stderr
    assert "DOES NOT FIT" in done.stdout and "config.lora.rank" in done.stdout
    values = json.loads(file.read_text())
    assert not values["fits"] and values["advice"] and not values["phases"]["sample"]["compiled"]
    # frozen weights in bfloat16 (captioner: 3.75 billion), the language model's 3.09 in float32, twice again for Adam
    memory = values["memory_gib_per_chip"]
    assert memory["frozen weights"] == pytest.approx(3.755e9 * 2 / 8 / 2**30, rel=0.02)
    assert memory["trained parameters"] == pytest.approx(3.086e9 * 4 / 8 / 2**30, rel=0.02)
    assert memory["optimizer"] == pytest.approx(2 * memory["trained parameters"], rel=1e-3)
    assert memory["decode view"] == pytest.approx(3.086e9 * 2 / 2**30, rel=0.05)
    assert values["peak_gib_per_chip"] > values["hbm_gib_per_chip"]
    assert values["prompt_tokens_estimated"]
    # two FLOPs a parameter and token: 8 x 8 captions of 256 tokens (the first comes from the prompt), and the prompts
    written = 2 * 3.086e9 * 64 * 255 / 8
    assert written < values["phases"]["sample"]["flops_per_chip"] < 1.2 * written


def test_an_image_is_written_token_by_token(found):
    """Janus-Pro-1B: 576 codes an image in both branches of guidance, by the language model's 1.2 billion weights."""
    text, values = found["janus"]
    assert "by arithmetic alone" in text and values["prompt_tokens_estimated"] and "fits: peak" not in text
    layers = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    one = 2 * layers * 8 * 8 / 8
    phases = values["phases"]
    # Besides, the prompt with its 576 features, the vision tower, the head of words, and attention.
    assert 255 * one < phases["sample"]["flops_per_chip"] < 2 * 255 * one
    # Besides, attention to what has been written, the head of codes, the prompt, and the VQ decoder.
    assert 2 * 575 * one < phases["redraw"]["flops_per_chip"] < 2 * 2 * 575 * one
    assert values["memory_gib_per_chip"]["decode view"] > 2 * layers / 2**30
    # Keys and values for 4 images of 8 captions on eight devices: features and words, and the prompt.
    cache = 2 * 24 * 2048 * 2 * 4 * 8 / 8 * (576 + 256) / 2**30
    assert cache < values["memory_gib_per_chip"]["cache"] < 1.2 * cache


def test_the_table_of_plans(found, tmp_path, capsys):
    files = [tmp_path / name for name in ("plan.json", "janus.json")]
    for file in files:
        file.write_text(json.dumps(found[file.stem][1] | {"config": file.stem}))
    table.main(["table", *map(str, files)])
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == list(table.HEADER) and len(rows) == 4
    compiled, reckoned = (dict(zip(table.HEADER, row, strict=True)) for row in rows[2:])
    assert compiled["config"] == "plan" and compiled["fits"] == "yes" and reckoned["fits"] == "no"
    assert reckoned["GiB a chip"].startswith("~ ") and not compiled["GiB a chip"].startswith("~")
    assert float(compiled["PFLOP a step"]) == pytest.approx(8 * found["plan"][1]["flops_per_chip"] / 1e15, rel=0.01)
    for arguments in ([], [str(tmp_path / "none.json")]):
        with pytest.raises(UserError, match="plan"):
            table.main(["table", *arguments])


def test_gpus_by_arithmetic(found):
    text, values = found["gpu"]
    assert "not compiled" in text and values["collectives"] == []
    assert values["flops_per_chip"] == pytest.approx(found["plan"][1]["flops_per_chip"])


@pytest.mark.parametrize(
    "name, says",
    [("stage", "config.stage = 'tower'"), ("sizes", "config.models"), ("batch", "= 3 images"), ("devices", "own")],
)
def test_what_cannot_be_planned(found, name, says):
    message, values = found[name]
    assert values is None and says in message and "\n" not in message


def test_sweep_ranks_and_compiles_three(found):
    text, tried = found["sweep"]
    assert "compiler" in text and "arithmetic" in text
    keys = [tuple(t[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")) for t in tried]
    assert set(keys) == {(d, f, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * f * t == 8}
    # 16 images of two captions over eight devices: in up to four parts; over one, in up to 16
    parts = {
        (t["rl.rollout_microbatches"], t["rl.microbatches"]) for t, key in zip(tried, keys, strict=True) if key[2] == 1
    }
    assert parts == {(a, b) for a in (1, 2, 4) for b in (1, 2, 4)}
    assert sum(key[2] == 8 for key in keys) == 25
    compiled = [all(phase["compiled"] for phase in t["phases"].values()) for t in tried]
    assert compiled == [True] * 3 + [False] * (len(tried) - 3)
    assert np.all(np.diff([t["seconds_estimate"] for t in tried[3:] if t["fits"]]) >= 0)
    # Four times the microbatches: a cache of a quarter of the size, weights read so often.
    of = {(*key, t["rl.rollout_microbatches"], t["rl.microbatches"]): t for key, t in zip(keys, tried, strict=True)}
    one, two = of[2, 4, 1, 1, 4], of[2, 4, 1, 4, 4]
    assert one["memory_gib_per_chip"]["cache"] == 4 * two["memory_gib_per_chip"]["cache"] > 0
    read = [x["phases"]["sample"]["bytes_per_chip"]["hbm"] for x in (one, two)]
    assert read[0] < read[1] < 4 * read[0]
    # Over tensor a chip holds a part of the decode view, and says so to others.
    whole, split = of[1, 8, 1, 1, 1], of[1, 4, 2, 1, 1]
    assert split["memory_gib_per_chip"]["decode view"] < 0.7 * whole["memory_gib_per_chip"]["decode view"]


def test_a_machine_must_be_named():
    with pytest.raises(UserError, match="--topology"):
        plan.main(["plan", "--config=configs/tiny.py", "--topology=v5e:4y4"])
