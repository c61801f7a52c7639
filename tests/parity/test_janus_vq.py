"""The image tokenizer of Janus against transformers' JanusVQVAE, and against what transformers leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax.convert import folder
from uae_jax.convert.table import load
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.janus.vq import VQConfig, VQModel
from uae_jax.models.janus.vq_weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

TINY = VQConfig(
    embed_dim=4,
    num_embeddings=50,
    latent_channels=12,
    base_channels=32,
    channel_multiplier=(1, 2, 1),
    num_res_blocks=1,
    num_patches=5,
    projection_dim=16,
    image_token_embed_dim=16,
)


def reference_of(config: VQConfig):
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    return JanusVQVAE(JanusVQVAEConfig.from_dict(config.to_hf())).eval()


def to_torch(x: np.ndarray):
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def from_torch(x) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def nearest(latents: np.ndarray, codebook: np.ndarray, normalised: bool) -> np.ndarray:
    """Indices of the nearest codes, in float64, with the norms of the original repository or without."""
    z, e = latents.astype(np.float64), codebook.astype(np.float64)
    if normalised:
        z, e = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, e))
    return ((z[..., None, :] - e) ** 2).sum(-1).argmin(-1)


@pytest.fixture(scope="module")
def tiny():
    """The reference with every parameter re-drawn, and ours with its weights."""
    reference = reference_of(TINY)
    redraw(reference)
    params = load(table(TINY), tensors(reference))

    def run(method):
        return jax.jit(lambda x: apply(VQModel(TINY), params, x, method=method))

    return reference, params, run


def test_latents(tiny):
    reference, _, run = tiny
    images = 0.5 * draw(2, 20, 12, 3)
    with torch.no_grad():
        expected = from_torch(reference.quant_conv(reference.encoder(to_torch(images))))
    found = run("encode")(images)
    assert found.shape == expected.shape == (2, 5, 3, 4) and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_codes_are_the_nearest_in_direction(tiny):
    """As the original repository's, and not as transformers', whose own differ."""
    reference, params, run = tiny
    images = 0.5 * draw(6, 20, 20, 3)
    latents = np.asarray(run("encode")(images))
    found = run("quantise")(latents)
    assert found.dtype == jnp.int32 and found.shape == (6, 5, 5)
    np.testing.assert_array_equal(found, nearest(latents, params["codebook"], normalised=True))
    with torch.no_grad():
        theirs = reference.encode(to_torch(images)).image_tokens.numpy().reshape(found.shape)
    np.testing.assert_array_equal(theirs, nearest(latents, params["codebook"], normalised=False))
    assert (np.asarray(found) != theirs).mean() > 0.1


def test_pixels(tiny):
    reference, _, run = tiny
    codes = np.random.default_rng(1).integers(0, 50, (2, 5, 5))
    with torch.no_grad():
        expected = from_torch(reference.decode(torch.from_numpy(codes.reshape(2, 25))))
    found = run("decode")(codes)
    assert found.shape == expected.shape == (2, 20, 20, 3) and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_gradient_of_a_decoded_image(tiny):
    reference, _, run = tiny
    latents, cotangent = draw(1, 4, 4, 4), draw(1, 16, 16, 3) / 32
    x = to_torch(latents).requires_grad_()
    (reference.decoder(reference.post_quant_conv(x)) * to_torch(cotangent)).sum().backward()
    decode = run("decode_latents")
    found = jax.grad(lambda z: (decode(z) * cotangent).sum())(latents)
    np.testing.assert_allclose(found, from_torch(x.grad), rtol=0, atol=1e-4)


def test_leading_axes_are_free(tiny):
    _, _, run = tiny
    images = draw(2, 3, 16, 8, 3) * np.array([0.1, 1, 3], np.float32)[:, None, None, None]
    grouped, flat = run("encode")(images), run("encode")(images.reshape(6, 16, 8, 3))
    np.testing.assert_allclose(grouped.reshape(flat.shape), flat, rtol=0, atol=1e-5)
    codes = run("quantise")(grouped)
    assert codes.shape == (2, 3, 4, 2)
    pixels = run("decode")(codes)
    assert pixels.shape == images.shape
    np.testing.assert_allclose(pixels[1:, 2], run("decode")(codes[1:, 2]), rtol=0, atol=1e-5)


def test_a_latent_of_nothing_has_a_gradient():
    """Its direction is 0, and nothing becomes NaN."""
    from uae_jax.models.janus.vq import directions

    assert np.isfinite(jax.grad(lambda x: directions(x).sum())(jnp.zeros(4))).all()


def test_folders_out_and_in_again(tiny, tmp_path):
    reference, *_ = tiny
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    reference.save_pretrained(theirs)
    model = folder.load_model(theirs)
    assert model.config == TINY
    folder.save_model(ours, model.config, model.params)
    loaded, report = type(reference).from_pretrained(ours, output_loading_info=True)
    assert not any(report.values())
    expected = tensors(reference)
    assert tensors(loaded).keys() == expected.keys()
    for name, value in tensors(loaded).items():
        assert value.dtype == expected[name].dtype and np.array_equal(value, expected[name]), name
    fresh = jax.eval_shape(VQModel(TINY).init, jax.random.key(0), draw(1, 16, 16, 3))
    assert jax.tree.map(lambda x: x.shape, fresh["params"]) == jax.tree.map(np.shape, model.params)


def test_config():
    assert VQConfig.from_hf(TINY.to_hf()) == TINY
    assert VQConfig.from_hf(reference_of(TINY).config.to_dict()) == TINY
    assert VQConfig.from_hf({}) == VQConfig()
    with pytest.raises(UserError, match="model_type 'clip'"):
        VQConfig.from_hf({"model_type": "clip"})
    with pytest.raises(UserError, match="double_latent"):
        VQConfig.from_hf({**TINY.to_hf(), "double_latent": True})
    with pytest.raises(UserError, match="16 does not divide into 32 groups"):
        dataclasses.replace(TINY, base_channels=16)
    with pytest.raises(UserError, match="num_res_blocks"):
        dataclasses.replace(TINY, num_res_blocks=0)


def test_real_size():
    """Names, shapes and count of Janus-Pro's tokenizer, against the reference class without storage."""
    config = VQConfig(num_patches=24)
    with torch.device("meta"):
        reference = reference_of(config)
    expected = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert {entry.names: entry.shape for entry in table(config)} == expected
    shapes = jax.eval_shape(lambda k: VQModel(config).init(k, jnp.zeros((1, 384, 384, 3))), jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == sum(int(np.prod(shape)) for shape in expected.values())
    codes = jax.eval_shape(lambda p: VQModel(config).apply(p, jnp.zeros((1, 384, 384, 3)), method="encode"), shapes)
    assert codes.shape == (1, 24, 24, 8)
