"""The MM-DiT against diffusers' FluxTransformer2DModel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax.convert.table import load, save
from uae_jax.errors import UserError
from uae_jax.models.flux.config import Config
from uae_jax.models.flux.model import FluxTransformer, position_ids, rotary
from uae_jax.models.flux.weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

HEIGHT, WIDTH, TEXT = 10, 4, 23
DEV = Config(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    guidance_embeds=True,
    out_channels=20,
    axes_dims_rope=(4, 4, 8),
)
SCHNELL = dataclasses.replace(DEV, guidance_embeds=False, out_channels=None, num_layers=1, num_single_layers=1)


def build(config: Config):
    """The reference with every parameter re-drawn (modulations small, see test_sd3.py), and ours with its weights."""
    reference = diffusers.FluxTransformer2DModel.from_config(config.to_hf()).eval()
    redraw(reference)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith(("norm1.linear.weight", "norm1_context.linear.weight", "norm.linear.weight")):
                p.mul_(0.25)
            if name == "norm_out.linear.weight":
                p.mul_(0.25)
    return reference, FluxTransformer(config), {"params": load(table(config), tensors(reference))}


def draw(config: Config, batch: tuple[int, ...] = (4,), seed: int = 0) -> list:
    """Latents, text, pooled, noise level in 0..1, and the guidance scale (or None)."""
    rng = np.random.default_rng(seed)
    shapes = [(HEIGHT, WIDTH, config.in_channels // 4), (TEXT, config.joint_attention_dim)]
    shapes.append((config.pooled_projection_dim,))
    arrays = [rng.standard_normal(batch + s).astype(np.float32) for s in shapes]
    # Guidance of at most 1.5: at 5 (an angle of 5000) an ulp of the two frequencies that torch's exp rounds differently
    # is 3e-4 of a radian.
    sigma, guidance = rng.uniform(0, 1, batch), rng.uniform(0.5, 1.5, batch)
    return [*arrays, sigma.astype(np.float32), guidance.astype(np.float32) if config.guidance_embeds else None]


def ours(inputs: list, mask=None) -> tuple:
    """The arguments in our order and units; times a thousand in float32, as the reference multiplies."""
    latents, text, pooled, sigma, guidance = inputs
    return latents, text, pooled, sigma * np.float32(1000), mask, guidance


def to_torch(inputs: list) -> dict:
    """The reference's arguments, packed by the pipeline's own functions."""
    latents, text, pooled, sigma, guidance = inputs
    b, h, w, c = latents.shape
    pipeline = diffusers.FluxPipeline
    x = pipeline._pack_latents(torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(), b, c, h, w)
    return {
        "hidden_states": x,
        "encoder_hidden_states": torch.from_numpy(text),
        "pooled_projections": torch.from_numpy(pooled),
        "timestep": torch.from_numpy(sigma),
        "guidance": None if guidance is None else torch.from_numpy(guidance),
        "img_ids": pipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def unpacked(x):
    """[b, t, 4 c] -> [b, HEIGHT, WIDTH, c]"""
    return diffusers.FluxPipeline._unpack_latents(x, HEIGHT * 8, WIDTH * 8, 8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def dev():
    return build(DEV)


@pytest.mark.parametrize("config", [DEV, SCHNELL], ids=["dev", "schnell"])
def test_outputs_and_every_block(config):
    reference, model, variables = build(config)
    blocks = []
    for block in (*reference.transformer_blocks, *reference.single_transformer_blocks):
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    inputs = draw(config)
    with torch.no_grad():
        expected = unpacked(reference(**to_torch(inputs)).sample).numpy()
    output, state = jax.jit(lambda v, *x: model.apply(v, *x, capture_intermediates=True))(variables, *ours(inputs))

    assert output.shape == expected.shape == (4, HEIGHT, WIDTH, config.token_out // 4)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
    state = state["intermediates"]
    (image, text), _ = state["blocks"]["__call__"][0]
    joined, _ = state["single_blocks"]["__call__"][0]
    found = [*zip(text, image, strict=True), *((x[:, :TEXT], x[:, TEXT:]) for x in joined)]
    assert len(found) == len(blocks) == config.num_layers + config.num_single_layers
    for pair, pair_expected in zip(found, blocks, strict=True):
        for x, y in zip(pair, pair_expected, strict=True):
            np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-4)


def test_epsilons_of_the_norms():
    """Activations so small that the norms' epsilons matter."""
    reference, model, _ = build(DEV)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.startswith(("context_embedder", "x_embedder")) or ".to_q." in name or ".add_k_proj." in name:
                p.mul_(0.003)
        inputs = draw(DEV)
        expected = unpacked(reference(**to_torch(inputs)).sample).numpy()
    variables = {"params": load(table(DEV), tensors(reference))}
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *ours(inputs)), expected, rtol=0, atol=1e-4)


def test_rotary_of_all_three_axes():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4000, (7, 3))
    module = diffusers.models.transformers.transformer_flux.FluxPosEmbed(10000, [16, 56, 56])
    for x, y in zip(rotary(ids, (16, 56, 56)), module(torch.from_numpy(ids).float()), strict=True):
        assert x.dtype == np.float32 and x.shape == (7, 64)
        np.testing.assert_allclose(np.repeat(x, 2, axis=1), y.numpy(), rtol=0, atol=1e-6)
    expected = diffusers.FluxPipeline._prepare_latent_image_ids(1, 5, 3, "cpu", torch.float32).numpy()
    found = position_ids(4, 5, 3)
    np.testing.assert_array_equal(found[4:], expected)
    assert not found[:4].any()


def test_gradients(dev):
    reference, model, variables = dev
    inputs = draw(DEV)
    cotangent = np.random.default_rng(1).standard_normal((4, HEIGHT, WIDTH, 5)).astype(np.float32)
    cotangent /= np.sqrt(cotangent.size)
    args = to_torch(inputs)
    names = ["hidden_states", "encoder_hidden_states", "pooled_projections"]
    for name in names:
        args[name].requires_grad_()
    unpacked(reference(**args).sample).mul(torch.from_numpy(cotangent)).sum().backward()
    expected = [args[name].grad for name in names]
    expected[0] = unpacked(expected[0])

    def loss(variables, latents, text, pooled):
        return jnp.sum(model.apply(variables, latents, text, pooled, *ours(inputs)[3:]) * cotangent)

    grads, *found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(variables, *inputs[:3])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-4)
    saved = save(table(DEV), grads["params"])
    for name, p in reference.named_parameters():
        assert p.grad.abs().max() > 1e-4, name
        np.testing.assert_allclose(saved[name], p.grad.numpy(), rtol=0, atol=1e-4, err_msg=name)


def test_round_trip_is_bit_identical_and_fits_init(dev):
    reference, model, variables = dev
    saved, expected = save(table(DEV), variables["params"]), tensors(reference)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and np.array_equal(saved[name], value), name
    fresh = jax.eval_shape(model.init, jax.random.key(0), *ours(draw(DEV)))
    assert jax.tree.map(jnp.shape, fresh["params"]) == jax.tree.map(np.shape, variables["params"])


def test_leading_axes_are_free(dev):
    _, model, variables = dev
    inputs = draw(DEV, (2, 3))
    mask = np.random.default_rng(2).random((2, 3, TEXT)) < 0.7
    apply = jax.jit(model.apply)
    grouped = apply(variables, *ours(inputs, mask))
    flat = apply(variables, *(x.reshape(6, *x.shape[2:]) for x in ours(inputs, mask)))
    assert grouped.shape == (2, 3, HEIGHT, WIDTH, 5)
    np.testing.assert_allclose(grouped.reshape(flat.shape), flat, rtol=0, atol=1e-5)


def test_text_mask(dev):
    _, model, variables = dev
    inputs = draw(DEV)
    text = inputs[1]
    lengths = np.array([TEXT, 11, 11, 11])
    mask = np.arange(TEXT) < lengths[:, None]
    apply = jax.jit(model.apply)
    masked = apply(variables, *ours(inputs, mask))
    other = np.where(mask[..., None], text, 100 * np.cos(text))
    np.testing.assert_array_equal(masked, apply(variables, *ours([inputs[0], other, *inputs[2:]], mask)))
    # Hidden text is as good as absent text (all text stands at position 0), and hiding nothing is no mask at all.
    for i, length in enumerate(lengths):
        row = [x[i : i + 1] for x in inputs]
        alone = apply(variables, *ours([row[0], row[1][:, :length], *row[2:]]))
        np.testing.assert_allclose(masked[i : i + 1], alone, rtol=0, atol=1e-5)
    assert np.abs(masked[1:] - apply(variables, *ours(inputs))[1:]).max() > 1e-2


def test_bfloat16_stays_close(dev):
    _, model, variables = dev
    inputs = ours(draw(DEV))
    expected = jax.jit(model.apply)(variables, *inputs)
    output = jax.jit(FluxTransformer(DEV, jnp.bfloat16).apply)(variables, *inputs)
    assert output.dtype == jnp.bfloat16
    assert np.abs(output.astype(np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_config():
    assert Config.from_hf(DEV.to_hf()) == DEV
    assert Config.from_hf(dict(diffusers.FluxTransformer2DModel.from_config(DEV.to_hf()).config)) == DEV
    hf = DEV.to_hf()
    # The published config leaves these out.
    sparse = {k: v for k, v in hf.items() if k not in ("axes_dims_rope", "out_channels", "patch_size")}
    assert Config.from_hf({**sparse, "attention_head_dim": 128}).axes_dims_rope == (16, 56, 56)
    with pytest.raises(UserError, match="SD3Transformer2DModel"):
        Config.from_hf({**hf, "_class_name": "SD3Transformer2DModel"})
    with pytest.raises(UserError, match=r"missing fields .*'num_layers'"):
        Config.from_hf({k: v for k, v in hf.items() if k != "num_layers"})
    with pytest.raises(UserError, match=r"unknown fields .*'sample_size'"):
        Config.from_hf({**hf, "sample_size": 128})
    for field, value in {
        "axes_dims_rope": [4, 4, 4],
        "patch_size": 2,
        "in_channels": 13,
        "num_single_layers": 0,
    }.items():
        with pytest.raises(UserError, match=field):
            Config.from_hf({**hf, field: value})


def test_inputs_that_do_not_fit(dev):
    _, model, variables = dev
    latents, *rest = ours(draw(DEV))
    with pytest.raises(UserError, match="9x4"):
        model.apply(variables, latents[:, :9], *rest)
    with pytest.raises(UserError, match="pass guidance"):
        model.apply(variables, latents, *rest[:-1])
    with pytest.raises(UserError, match="takes no guidance"):
        FluxTransformer(SCHNELL).apply(variables, latents, *rest)
