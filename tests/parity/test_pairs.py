"""Stage `decoder` on pictures with captions, from pairs to a folder of weights."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from uae_jax import config as configs
from uae_jax import sharding, train
from uae_jax.convert import __main__ as convert
from uae_jax.convert import folder, pooled
from uae_jax.data.pairs import PairBatches, read_pairs
from uae_jax.errors import UserError
from uae_jax.stages import build, pairs

pytest.importorskip("torch", reason="pip install '.[parity]'")
pytest.importorskip("diffusers", reason="pip install '.[parity]'")

from tests.parity import whole


class Words:
    """A tokenizer of one id a character."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        return [type("Encoding", (), {"ids": [ord(c) for c in text]}) for text in texts]


@pytest.fixture
def file(tmp_path):
    """Six pairs, of which the picture of the third is broken."""
    lines = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(path)
        lines.append(json.dumps({"image": path.name, "caption": "abcdefghij"[: i + 1]}))
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path / "pairs.jsonl"


def batches(file, **changes):
    values = {
        "image_size": 16,
        "batch_size": 3,
        "length": 4,
        "end_token": 0,
        "dropout": 0.0,
        "negative": (7,),
        "seed": 1,
    }
    return PairBatches(read_pairs(file), Words(), **(values | changes))


def test_every_epoch_holds_every_pair_and_a_step_repeats_itself(file):
    found = batches(file)
    orders = []
    for epoch in range(2):
        parts = [found[2 * epoch + i] for i in range(2)]
        shades = np.concatenate([part["image"][:, 0, 0, 0] for part in parts])
        lengths = np.concatenate([part["length"] for part in parts])
        # the broken picture is replaced by the next, with its caption
        assert sorted(shades) == [0, 40, 120, 120, 160, 200]
        np.testing.assert_array_equal(lengths, np.minimum(shades // 40 + 1, 3))
        orders.append(shades)
    assert (orders[0] != orders[1]).any()
    for name, value in batches(file)[3].items():
        np.testing.assert_array_equal(value, found[3][name])
    assert parts[0]["tokens"].shape == (3, 4) and (parts[0]["tokens"][:, 3] == 0).all()


def test_dropped_captions_are_the_negative_prompt(file):
    half = batches(file, dropout=0.5, batch_size=1)
    rows = [half[i] for i in range(60)]
    dropped = [row["tokens"].tolist() == [[7, 0, 0, 0]] and row["length"] == 1 for row in rows]
    assert 15 < sum(dropped) < 45
    assert all(row["tokens"][0, 0] == ord("a") for row, drop in zip(rows, dropped, strict=True) if not drop)


@pytest.mark.parametrize("line", ["{", '{"image": "x.png"}', "[1]", '{"image": 1, "caption": "x"}'])
def test_a_bad_line_is_named(file, line):
    file.write_text(file.read_text().rstrip() + "\n" + line)
    with pytest.raises(UserError, match=r"pairs.jsonl, line 7: expected") as caught:
        read_pairs(file)
    assert "\n" not in str(caught.value)


def test_no_pairs_and_no_pictures(file, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 6 pictures"):
        batches(file)[0]


def decoder_config(where, file, **changes):
    """A run of two steps on the weights of `where`."""
    c = whole.write(where, "sd3").unlock()
    c.stage, c.data.source = "decoder", "jsonl"
    c.data.path = str(file)
    c.decoder = configs.decoder()
    c.decoder.steps, c.decoder.batch_size, c.decoder.max_tokens, c.decoder.ema = 2, 2, 8, 0.5
    c.decoder.optimizer.warmup = 0
    for name, value in changes.items():
        c.decoder[name] = value
    return c.lock()


def test_projector_learns_and_its_average_is_written(file, tmp_path):
    c = decoder_config(tmp_path / "run", file)
    configs.validate(c)
    program = build.build("decoder", c, tmp_path / "work", sharding.make_mesh(c))
    state, history, losses = program.state, [jax.device_get(program.state.params)], []
    run = jax.jit(program.step)
    for i in range(2):
        state, metrics = run(state, program.frozen, {k: jax.numpy.asarray(v) for k, v in program.batches[i].items()})
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        losses.append(float(metrics["loss"]))
        history.append(jax.device_get(state.params))
    assert set(history[0]) == {"projector"}
    mean = jax.tree.map(lambda a, b, c: 0.25 * a + 0.25 * b + 0.5 * c, *history)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), mean, jax.device_get(state.ema))

    program.finish(state, type("Writer", (), {"message": lambda self, text: None})())
    written, start = tmp_path / "work" / "weights", tmp_path / "run" / "weights"
    learnt = folder.load_model(written / "projector").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), learnt, mean["projector"])
    before, after = (folder.open_model(x / "transformer").tensors for x in (start, written))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (written / "transformer" / pooled.FILE).is_file()
    assert (written / "captioner" / "config.json").is_file()

    # the same with the pictures encoded once
    c.unlock().decoder.latents = str(tmp_path / "kept")
    program = build.build("decoder", c.lock(), tmp_path / "work", sharding.make_mesh(c))
    batch = {k: jax.numpy.asarray(v) for k, v in program.batches[0].items()}
    assert "image" not in batch and batch["moments"].shape == (2, 16, 16, 8)
    _, metrics = jax.jit(program.step)(program.state, program.frozen, batch)
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=0, atol=1e-4)


def test_adapters_of_the_transformer_go_out_merged_and_as_diffusers_saves_them(file, tmp_path):
    c = decoder_config(tmp_path / "run", file, trainable="", ema=0.0, steps=1).unlock()
    c.decoder.lora.rank, c.decoder.lora.alpha, c.decoder.optimizer.learning_rate = 2, 6.0, 0.1
    configs.validate(c.lock())
    work = tmp_path / "work"
    train.run(c, work)
    start, written = (folder.open_model(x / "weights" / "transformer").tensors for x in (tmp_path / "run", work))
    different = {name for name in start if np.abs(start[name] - written[name]).max() > 1e-3}
    assert "transformer_blocks.0.attn.to_q.weight" in different and "transformer_blocks.1.ff.net.2.weight" in different
    assert all("transformer_blocks" in name and name.endswith("weight") and "norm_" not in name for name in different)

    source = tmp_path / "run" / "weights" / "transformer"
    convert.main(["", "export", str(work / "decoder"), str(tmp_path / "merged")])
    convert.main(["", "export", str(work / "decoder"), str(tmp_path / "adapter"), "--adapter"])
    adapter = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    convert.main(["", "import", str(source), str(tmp_path / "again"), f"--lora={adapter}"])
    for path in ("merged", "again"):
        for name, value in folder.open_model(tmp_path / path).tensors.items():
            np.testing.assert_allclose(value, written[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_both_parts_learn_through_the_loop(file, tmp_path):
    c = decoder_config(tmp_path / "run", file, trainable="(projector|transformer)/.*", ema=0.0)
    train.run(c, tmp_path / "work")
    written, start = tmp_path / "work" / "weights", tmp_path / "run" / "weights"
    for part in pairs.PARTS:
        before, after = (folder.open_model(x / part).tensors for x in (start, written))
        assert sum(not np.array_equal(before[name], after[name]) for name in before) > len(before) / 2


def test_the_weights_it_starts_from_are_not_overwritten(file, tmp_path):
    c = configs.default().unlock()
    c.weights = str(tmp_path / "weights")
    with pytest.raises(UserError, match="choose another --workdir"):
        pairs.build(c, tmp_path, None)


def test_captions_are_for_the_decoder_only(file, tmp_path):
    c = configs.default().unlock()
    c.data.source, c.data.path = "jsonl", str(file)
    with pytest.raises(UserError, match=r"data\.source"):
        configs.validate(c.lock())
