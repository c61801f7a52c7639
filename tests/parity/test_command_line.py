"""By commands alone: Qwen2.5-VL and SD3 as their libraries save them, imported, redraw pictures and draw prompts."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from uae_jax.convert import folder

pytest.importorskip("torch", reason="pip install '.[parity]'")
pytest.importorskip("diffusers", reason="pip install '.[parity]'")

from tests.parity import whole


def command(module, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"uae_jax.{module}", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_two_folders_to_pictures(tmp_path):
    weights = tmp_path / "weights"
    whole.write_captioner(tmp_path / "qwen")
    whole.write_pipeline(tmp_path / "sd3", "sd3")
    folder.save_model(weights / "projector", *whole.projector_of(whole.JOINT["sd3"]))
    whole.write_tower(weights / "clip")
    command("convert", "import", tmp_path / "qwen", weights / "captioner")
    command("convert", "import", tmp_path / "sd3", weights)

    picture, prompts = tmp_path / "picture.png", tmp_path / "prompts.jsonl"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    system = [
        "--config=configs/qwen2_5_vl_3b.py", f"--config.weights={weights}", f"--config.data.image_size={whole.SIZE}",
        "--config.dtype=float32", "--config.rl.max_tokens=6", "--config.redraw.steps=2",
    ]  # fmt: skip
    printed = command("reconstruct", *system, f"--out={tmp_path}/out.png", picture)
    assert re.search(rf"^{picture}\n  .+?\n  clip -?0\.\d", printed, re.DOTALL | re.MULTILINE)
    assert np.asarray(Image.open(tmp_path / "out.png")).std() > 10

    prompts.write_text("".join(json.dumps({"prompt": text, "tag": "x"}) + "\n" for text in ("a red circle", "a b")))
    for out, more in (("drawn", []), ("baseline", [f"--baseline={tmp_path / 'sd3'}"])):
        command("reconstruct", *system, f"--from_text={prompts}", "--samples=2", f"--out={tmp_path / out}", *more)
    pictures = [
        np.asarray(Image.open(tmp_path / out / f"{i:05}" / "samples" / f"{k:05}.png")).astype(int)
        for out in ("drawn", "baseline")
        for i in range(2)
        for k in range(2)
    ]
    assert json.loads((tmp_path / "drawn" / "00001" / "metadata.jsonl").read_text()) == {"prompt": "a b", "tag": "x"}
    for i, one in enumerate(pictures):
        assert one.shape == (whole.SIZE, whole.SIZE, 3) and one.std() > 10
        assert all(np.abs(one - other).max() > 10 for other in pictures[:i])
