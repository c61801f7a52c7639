"""Plans with the TPU's own compiler, and of the update of a network wide enough to be split."""

import importlib.util
import json

import pytest

from tests.test_plan import WITH_TINY_DECODER, process
from uae_jax.plan import PARTS


@pytest.mark.parametrize("batch, code", [(16, 0), pytest.param(2**16, 3, marks=pytest.mark.slow)])
def test_plans_for_a_tpu(tmp_path, batch, code):
    """The tiny world on 16 chips; and with a batch whose activations no chip holds, in the compiler's own words."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    file = tmp_path / "plan.json"
    sizes = [f"--config.data.batch_size={batch}", "--config.eval.batch_size=16", "--config.mesh.fsdp=16"]
    done = process(
        *("-m", "uae_jax.plan", "--config=configs/tiny.py", "--topology=v5e:4x4", f"--json={file}"),
        *(*sizes, "--config.mesh.data=1"),
    )
    assert done.returncode == code, done.stderr[-3000:]
    values = json.loads(file.read_text())
    assert values["fits"] == (code == 0)
    loop = [c for c in values["collectives"] if c["phase"] == "sample" and c["executed"] >= 31]
    assert [(c["kind"], c["depth"], c["bytes"]) for c in loop] == [("all-reduce", 1, 1.0)]
    messages = [phase["compiler_message"] for phase in values["phases"].values()]
    assert any("RESOURCE_EXHAUSTED" in message for message in messages) == (code == 3)
    if code == 3:
        assert values["peak_gib_per_chip"] > values["hbm_gib_per_chip"] == 15.75 and values["advice"]


LAYERS = """
from configs import uae_qwen2_5_vl_3b_sd3_5_large as real


def get_config():
    config = real.get_config()
    config.unlock()
    config.models.captioner.num_hidden_layers = 4
    config.models.captioner.vision_config.depth = 4
    config.models.captioner.vision_config.fullatt_block_indexes = (3,)
    config.models.transformer.num_layers = 4
    config.models.clip.text_config.num_hidden_layers = config.models.clip.vision_config.num_hidden_layers = 4
    config.data.batch_size = config.eval.batch_size = 16
    config.mesh.tensor = 2
    config.rl.max_tokens = 64
    return config.lock()
"""


@pytest.mark.parametrize("parts", [("sample",), pytest.param(PARTS, marks=pytest.mark.slow)])
def test_four_layers_of_real_width_on_a_tpu(tmp_path, parts):
    """UAE's networks at their widths, four layers each, on 16 chips of v5e: what chips say to each other, and when."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    (tmp_path / "layers.py").write_text(LAYERS)
    file = tmp_path / "plan.json"
    arguments = (f"--config={tmp_path / 'layers.py'}", "--topology=v5e:4x4", f"--parts={','.join(parts)}")
    done = process("-m", "uae_jax.plan", *arguments, f"--json={file}")
    assert done.returncode == 0, done.stderr[-3000:]
    values = json.loads(file.read_text())
    phases = {name: values["phases"][name] for name in parts}
    assert all(phase["compiled"] and phase["unknown_loops"] == 0 for phase in phases.values())
    # In the token loop no weight is gathered: sums over tensor's pairs, of activations, and one bit over all chips.
    loop = [c for c in values["collectives"] if c["phase"] == "sample" and c["executed"] >= 63]
    assert {c["kind"] for c in loop} <= {"all-reduce", "all-gather", "collective-permute", "all-to-all"}
    assert all(c["group"] == 2 for c in loop if c["bytes"] > 1)
    # A chip does its share and no more: what the partitioner left it is near what the jaxpr asks for.
    for name, phase in phases.items():
        assert phase["flops_per_chip_partitioned"] < 1.3 * phase["flops_per_chip"], name


NARROW = (
    WITH_TINY_DECODER
    + """
def get_config():
    config = start(512, batch=16)
    captioner = config.models.captioner
    sizes = {"vocab_size": 18992, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token", "bos_token", "eos_token")
    ids = {f"{name}_id": 18000 + i for i, name in enumerate(names)}
    captioner.update(num_attention_heads=4, **sizes, **ids)
    vision = {"depth": 2, "fullatt_block_indexes": (1,), "hidden_size": 256, "intermediate_size": 512, "num_heads": 4}
    captioner.vision_config.update(out_hidden_size=512, **vision)
    captioner.rope_scaling.mrope_section = (16, 24, 24)
    config.rl.max_tokens = 64
    config.rl.logit_chunk = 32
    config.rl.group_size = 4
    config.mesh.update(fsdp=4, tensor=2)
    return config.lock()
"""
)


@pytest.mark.slow
def test_chips_keep_their_part_of_the_batch_in_the_update(tmp_path):
    """Over fsdp weights are gathered and gradients of adapters summed; activations are summed over tensor alone."""
    (tmp_path / "narrow.py").write_text(NARROW)
    file, config = tmp_path / "plan.json", f"--config={tmp_path / 'narrow.py'}"
    done = process("-m", "uae_jax.plan", config, "--topology=cpu:8", "--parts=update", f"--json={file}")
    assert done.returncode == 0, done.stderr[-3000:]
    inside = [c for c in json.loads(file.read_text())["collectives"] if c["depth"]]
    assert {c["group"] for c in inside if c["kind"] == "all-reduce" and c["bytes"] >= 2**18} == {2}
