"""The hosts' own text -> image against diffusers' pipelines, from prompts to latents and to pictures on disk."""

import shutil

import jax
import numpy as np
import pytest

from uae_jax import from_text, sharding
from uae_jax.umm import host

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

from tests import tiny  # noqa: E402
from tests.parity import whole  # noqa: E402

PROMPTS = ["a b c", "h"]
SHAPE = (16, 16, 4)


@pytest.fixture(scope="module", params=["sd3", "flux"])
def pipeline(request, tmp_path_factory):
    """(kind, folder)"""
    return request.param, whole.write_pipeline(tmp_path_factory.mktemp(request.param) / "pipeline", request.param)


def reference(kind, folder, with_t5=True):
    """diffusers' pipeline of the folder."""

    def load(library, name, path):
        return getattr(library, name).from_pretrained(folder / path)

    clip = "CLIPTextModelWithProjection" if kind == "sd3" else "CLIPTextModel"
    parts = {
        "scheduler": load(diffusers, "FlowMatchEulerDiscreteScheduler", "scheduler"),
        "vae": load(diffusers, "AutoencoderKL", "vae"),
        "text_encoder": load(transformers, clip, "text_encoder"),
        "tokenizer": load(transformers, "AutoTokenizer", "tokenizer"),
    }
    more = {"_2": clip, "_3": "T5EncoderModel"} if kind == "sd3" else {"_2": "T5EncoderModel"}
    for suffix, name in more.items():
        parts[f"text_encoder{suffix}"] = load(transformers, name, f"text_encoder{suffix}")
        parts[f"tokenizer{suffix}"] = load(transformers, "AutoTokenizer", f"tokenizer{suffix}")
    if not with_t5:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    name = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}[kind]
    parts["transformer"] = load(diffusers, name, "transformer")
    built = {"sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}[kind](**parts)
    built.set_progress_bar_config(disable=True)
    return built


def config_of(folder, kind, **changes):
    return tiny.config(
        folder,
        data__image_size=whole.SIZE,
        redraw__steps=3,
        redraw__guidance=4.0 if kind == "sd3" else 1.0,
        redraw__distilled_guidance=1.5,  # see test_flux.py
        **changes,
    )


def ours(folder, config, noise):
    """Latents [b, h, w, c] of the prompts from noise of that shape."""
    mesh = sharding.make_mesh(config)
    found, params, tokenizers = from_text.load_host(folder, config, mesh)
    ids = from_text.tokens(found, tokenizers, PROMPTS)
    negative = {name: x[0] for name, x in from_text.tokens(found, tokenizers, [""]).items()}
    run = jax.jit(lambda p, n: host.latents(found, p, ids, negative, n, config.redraw))
    return np.asarray(run(params, noise[:, None]))[:, 0]


def theirs(kind, built, noise, config):
    x = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    if kind == "flux":
        x = diffusers.FluxPipeline._pack_latents(x, 2, 4, 16, 16)
    guidance = config.redraw.guidance if kind == "sd3" else config.redraw.distilled_guidance
    out = built(
        PROMPTS, height=whole.SIZE, width=whole.SIZE, num_inference_steps=config.redraw.steps, guidance_scale=guidance,
        latents=x, output_type="latent",
    ).images  # fmt: skip
    if kind == "flux":
        out = diffusers.FluxPipeline._unpack_latents(out, whole.SIZE, whole.SIZE, built.vae_scale_factor)
    return out.detach().numpy().transpose(0, 2, 3, 1)


def test_latents_are_the_pipelines(pipeline):
    kind, folder = pipeline
    config = config_of(folder, kind)
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    expected = theirs(kind, reference(kind, folder), noise, config)
    found = ours(folder, config, noise)
    assert np.abs(expected - noise).max() > 0.5 and np.abs(expected[0] - expected[1] - noise[0] + noise[1]).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if kind == "sd3":
        twice = config.copy_and_resolve_references()
        twice.redraw.two_passes = True
        np.testing.assert_allclose(ours(folder, twice, noise), expected, rtol=0, atol=1e-4)


def test_an_sd3_without_its_t5(pipeline, tmp_path):
    kind, folder = pipeline
    if kind == "flux":
        pytest.skip("FLUX has no other states")
    shutil.copytree(folder, tmp_path / "p")
    shutil.rmtree(tmp_path / "p" / "text_encoder_3")
    config = config_of(folder, kind)
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    expected = theirs(kind, reference(kind, folder, with_t5=False), noise, config)
    np.testing.assert_allclose(ours(tmp_path / "p", config, noise), expected, rtol=0, atol=1e-4)
