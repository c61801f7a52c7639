"""Qwen with SD3 and with FLUX, from their libraries' folders to RL steps and redrawn pictures."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from uae_jax import reconstruct, sharding, step, system
from uae_jax.convert import __main__ as convert
from uae_jax.convert import folder, pooled, transfer, umm
from uae_jax.data.text import encode_captions
from uae_jax.errors import UserError
from uae_jax.sampling.tokens import Segment
from uae_jax.stages import rl
from uae_jax.umm import decoder

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

from tests.parity import whole  # noqa: E402


@pytest.fixture(scope="module", params=["sd3", "flux"])
def run(request, tmp_path_factory):
    """(kind, workdir, config)"""
    where = tmp_path_factory.mktemp(request.param)
    return request.param, where, whole.write(where, request.param)


def test_pooled_vector_is_that_of_an_empty_prompt(run):
    kind, where, _ = run
    tokens = torch.tensor([[48, 49] + [0] * 10])
    expected = []
    for tower in ("text_encoder", "text_encoder_2") if kind == "sd3" else ("text_encoder",):
        name = "CLIPTextModelWithProjection" if kind == "sd3" else "CLIPTextModel"
        out = getattr(transformers, name).from_pretrained(where / "pipeline" / tower).eval()(tokens)
        expected.append((out.text_embeds if kind == "sd3" else out.pooler_output)[0].detach().numpy())
    found = pooled.read(where / "weights" / "transformer" / pooled.FILE, sum(map(len, expected)))
    assert np.abs(found).max() > 0.5
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-4)


def test_a_step_and_a_picture(run, tmp_path, capsys):
    _, where, config = run
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    state, optimizer = rl.start(config, built)
    before = jax.device_get(state.params)
    update = step.make_step(
        config, built.family(config, mesh), built.towers, optimizer, end_token=built.prompts.end_token, mesh=mesh
    )
    images = np.random.default_rng(0).integers(0, 256, (1, whole.SIZE, whole.SIZE, 3), dtype=np.uint8)
    state, metrics = jax.jit(update)(state, built.frozen, {"image": images})
    assert all(np.isfinite(value).all() for value in jax.device_get(metrics).values())
    assert metrics["reward/group_std"] > 0 and metrics["bad_steps"] == 0
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, jax.device_get(state.params))
    assert max(jax.tree.leaves(moved)) > 0

    Image.fromarray(images[0]).save(tmp_path / "picture.png")
    out = tmp_path / "out.png"
    reconstruct.main(["", f"--workdir={where}", f"--out={out}", str(tmp_path / "picture.png")])
    assert "picture.png" in capsys.readouterr().out and np.asarray(Image.open(out)).std() > 1


def broken(config, where, part, change):
    """The weights with one folder changed, and the config that names them."""
    shutil.copytree(config.weights, where)
    change(where / part)
    other = config.copy_and_resolve_references()
    other.weights = str(where)
    return other


def rewrite(**fields):
    def change(path):
        file = next(path.glob("*config.json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scheduler", rewrite(_class_name="DDIMScheduler"), "DDIMScheduler"),
        ("transformer", rewrite(_class_name="AutoencoderKL"), "holds a AutoencoderKL"),
        ("transformer", lambda path: (path / pooled.FILE).unlink(), "import the whole pipeline"),
        ("vae", shutil.rmtree, "vae is missing"),
        ("projector", lambda path: folder.save_model(path, *whole.projector_of(7)), "gives 7 channels"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(run, tmp_path, part, change, said):
    kind, _, config = run
    if kind == "flux":
        pytest.skip("one kind is enough")
    config = broken(config, tmp_path / "weights", part, change)
    with pytest.raises(UserError, match=said) as caught:
        system.load_decoder(tmp_path / "weights", config, sharding.make_mesh(config))
    assert "\n" not in str(caught.value)


def test_a_transformer_of_another_kind_than_the_config_says(run, tmp_path):
    kind, where, config = run
    other = config.copy_and_resolve_references().unlock()
    other.models = {"transformer": (whole.FLUX if kind == "sd3" else whole.SD3).to_hf()}
    with pytest.raises(UserError, match=r"models\.transformer says"):
        system.load_decoder(where / "weights", other, sharding.make_mesh(config))


def test_images_that_are_no_whole_patches(run):
    _, _, config = run
    other = config.copy_and_resolve_references()
    other.data.image_size = 30
    mesh = sharding.make_mesh(config)
    with pytest.raises(UserError, match="multiples of 4"):
        system.load(other, mesh).family(other)


def test_an_import_is_whole_or_nothing(run, tmp_path):
    _, where, _ = run
    with pytest.raises(UserError, match="exists"):
        convert.main(["", "import", str(where / "pipeline"), str(where / "weights")])
    source = tmp_path / "pipeline"
    shutil.copytree(where / "pipeline", source)
    shutil.rmtree(source / "text_encoder")
    with pytest.raises(UserError, match="text_encoder"):
        convert.main(["", "import", str(source), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    convert.main(["", "import", str(source / "scheduler"), str(tmp_path / "scheduler")])
    rewrite(_class_name="DDIMScheduler")(source / "scheduler")
    with pytest.raises(UserError, match="DDIMScheduler"):
        convert.main(["", "import", str(source / "scheduler"), str(tmp_path / "other")])


def load_page(where):
    """The exported run.py as a module."""
    spec = importlib.util.spec_from_file_location("exported_page", where / umm.PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page.UMM(where)


def test_the_exported_page_captions_and_draws_the_same(run, tmp_path):
    """Greedy words, and a picture from the same noise: all of the drawing path against transformers and diffusers."""
    _, where, config = run
    convert.main(["", "export", str(where), str(tmp_path / "out"), "--umm"])
    model = load_page(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("# Qwen2_5_VLForConditionalGeneration and ")
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    family = built.family(config, temperature=0.0)
    image = np.random.default_rng(0).integers(0, 256, (whole.SIZE, whole.SIZE, 3), dtype=np.uint8)
    keys = step.sample_keys(jax.random.key(3), 0, 1, 1)
    shape = decoder.latent_shape(built.modules.transformer, built.modules.vae, whole.SIZE, whole.SIZE)
    noise = np.asarray(decoder.initial_noise(keys, shape, same=False))[0]
    text = "red"  # the tokenizer of the test has few words
    tokens, mask = encode_captions(built.tokenizer, [text], config.rl.max_tokens, built.prompts.end_token)
    assert mask.sum() < config.rl.max_tokens  # there is padding

    @jax.jit
    def both(frozen, pictures):
        captions = family.generate(step.STARTING_WEIGHTS, frozen, pictures, keys)
        segment = Segment(tokens[None], mask[None], np.zeros(mask[None].shape, np.float32))
        return captions.actions, family.redraw(step.STARTING_WEIGHTS, frozen, segment, pictures, keys)[0]

    written, drawn = jax.device_get(both(built.frozen, image[None] / np.float32(255)))
    expected = model.draw(text, torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())).numpy()
    assert expected.shape == (whole.SIZE, whole.SIZE, 3) and expected.std() > 0.05
    np.testing.assert_allclose(drawn[0, 0], expected, rtol=0, atol=1e-4)
    found = built.tokenizer.decode(written[0, 0].tolist(), skip_special_tokens=True)
    assert model.caption(Image.fromarray(image)) == found and found


def test_a_trained_captioner_goes_out_with_the_weights_that_read_it(run, tmp_path):
    kind, where, config = run
    if kind == "flux":
        pytest.skip("one kind is enough")
    start = where / "weights" / "captioner"
    found = folder.open_model(start)
    entry = next(e for e in found.table if e.path.startswith("language") and e.path.endswith("norm/scale"))
    value = np.full(folder.tables.param_shape(entry), 3.0, np.float32)
    trained = transfer.Trained({entry.path: value.shape}, {entry.path: value}.__getitem__, 1.0)
    umm.export(config, tmp_path / "out", trained, "a test")
    before, after, read = (
        folder.open_model(path).tensors
        for path in (start, tmp_path / "out" / "encoder", tmp_path / "out" / "text_encoder")
    )
    different = {name for name in before if not np.array_equal(before[name], after[name])}
    assert different == set(folder.tables.flat_names(entry.names))
    assert all(np.array_equal(before[name], read[name]) for name in before)
    assert json.loads((tmp_path / "out" / umm.SETTINGS).read_text())["text_encoder"] == "text_encoder"


def test_what_the_page_cannot_run_is_refused(run, tmp_path):
    _, _, config = run
    other = config.copy_and_resolve_references()
    other.redraw.prediction = "sample"
    with pytest.raises(UserError, match="published parts"):
        umm.export(other, tmp_path / "out", transfer.NOTHING, "a test")
