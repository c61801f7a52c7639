"""The MM-DiT against diffusers' SD3Transformer2DModel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax.convert.table import load, save
from uae_jax.errors import UserError
from uae_jax.models.sd3.config import Config
from uae_jax.models.sd3.model import SD3Transformer, position_table
from uae_jax.models.sd3.weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

# Five rows and two columns of a table of thirteen: a crop that is not square, whose left margin is rounded.
HEIGHT, WIDTH, TEXT = 10, 4, 23
MEDIUM = Config(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=20,
    caption_projection_dim=24,
    pooled_projection_dim=12,
    out_channels=5,
    pos_embed_max_size=13,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)
CONFIGS = {
    "medium": MEDIUM,
    "large": dataclasses.replace(MEDIUM, dual_attention_layers=(), num_attention_heads=5, caption_projection_dim=40),
    "sd3": dataclasses.replace(MEDIUM, dual_attention_layers=(), qk_norm=None, num_layers=2),
    "no_plain": dataclasses.replace(MEDIUM, num_layers=3),
}


def build(config: Config):
    """The reference with every parameter re-drawn, and ours with its weights.

    Modulations are drawn small: gates of several units would make residual streams of 100 and amplify one ulp of the
    time sinusoids (of which torch's exp rounds two differently) a hundredfold.
    """
    reference = diffusers.SD3Transformer2DModel.from_config(config.to_hf()).eval()
    redraw(reference)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.endswith(("norm1.linear.weight", "norm1_context.linear.weight", "norm_out.linear.weight")):
                p.mul_(0.25)
    return reference, SD3Transformer(config), {"params": load(table(config), tensors(reference))}


def draw(config: Config, batch: tuple[int, ...] = (4,), seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = [(HEIGHT, WIDTH, config.in_channels), (TEXT, config.joint_attention_dim), (config.pooled_projection_dim,)]
    timestep = rng.uniform(0, 1000, batch)
    return *(rng.standard_normal(batch + s).astype(np.float32) for s in shapes), timestep.astype(np.float32)


def to_torch(inputs: tuple[np.ndarray, ...]) -> list:
    latents, *rest = (torch.from_numpy(x) for x in inputs)
    return [latents.permute(0, 3, 1, 2).contiguous(), *rest]


@pytest.fixture(scope="module")
def medium():
    return build(MEDIUM)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_every_block(name):
    config = CONFIGS[name]
    reference, model, variables = build(config)
    blocks = []
    for block in reference.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    inputs = draw(config)
    with torch.no_grad():
        expected = reference(*to_torch(inputs)).sample.permute(0, 2, 3, 1).numpy()
    output, state = jax.jit(lambda v, *x: model.apply(v, *x, capture_intermediates=True))(variables, *inputs)

    assert output.shape == expected.shape == (4, HEIGHT, WIDTH, config.out_channels)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4)
    found = []
    for kind in ("dual_blocks", "blocks"):
        if kind in state["intermediates"]:
            (image, text), _ = state["intermediates"][kind]["__call__"][0]
            found += zip(image, text, strict=True)
    assert len(found) == config.num_layers - 1
    for (image, text), (text_expected, image_expected) in zip(found, blocks[:-1], strict=True):
        np.testing.assert_allclose(image, image_expected.numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(text, text_expected.numpy(), rtol=0, atol=1e-4)


def test_epsilons_of_the_norms():
    """Activations so small that the norms' epsilons matter."""
    reference, model, _ = build(MEDIUM)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.startswith("context_embedder") or ".to_q." in name or ".add_k_proj." in name:
                p.mul_(0.003)
        inputs = draw(MEDIUM)
        expected = reference(*to_torch(inputs)).sample.permute(0, 2, 3, 1).numpy()
    variables = {"params": load(table(MEDIUM), tensors(reference))}
    np.testing.assert_allclose(jax.jit(model.apply)(variables, *inputs), expected, rtol=0, atol=1e-4)


def test_gradients(medium):
    reference, model, variables = medium
    inputs = draw(MEDIUM)
    cotangent = np.random.default_rng(1).standard_normal((4, HEIGHT, WIDTH, MEDIUM.out_channels)).astype(np.float32)
    cotangent /= np.sqrt(cotangent.size)
    args = [x.requires_grad_() for x in to_torch(inputs)]
    reference(*args).sample.permute(0, 2, 3, 1).mul(torch.from_numpy(cotangent)).sum().backward()
    expected = [args[0].grad.permute(0, 2, 3, 1), args[1].grad, args[2].grad]

    def loss(variables, latents, text, pooled):
        return jnp.sum(model.apply(variables, latents, text, pooled, inputs[3]) * cotangent)

    grads, *found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(variables, *inputs[:3])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-4)
    saved = save(table(MEDIUM), grads["params"])
    for name, p in reference.named_parameters():
        np.testing.assert_allclose(saved[name], p.grad.numpy(), rtol=0, atol=1e-4, err_msg=name)
    assert not saved["pos_embed.pos_embed"].any()  # a buffer of the reference: fixed


def test_round_trip_is_bit_identical(medium):
    reference, _, variables = medium
    saved, expected = save(table(MEDIUM), variables["params"]), tensors(reference)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and np.array_equal(saved[name], value), name


def test_fresh_model_has_the_reference_table_and_tree(medium):
    reference, model, variables = medium
    fresh = jax.jit(model.init)(jax.random.key(0), *draw(MEDIUM))
    assert jax.tree.map(jnp.shape, fresh["params"]) == jax.tree.map(np.shape, variables["params"])
    expected = reference.pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(fresh["params"]["pos_embed"]["pos_embed"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(position_table(MEDIUM), expected, rtol=0, atol=1e-6)


def test_leading_axes_are_free(medium):
    _, model, variables = medium
    inputs = draw(MEDIUM, (2, 3))
    mask = np.random.default_rng(2).random((2, 3, TEXT)) < 0.7
    apply = jax.jit(model.apply)
    grouped = apply(variables, *inputs, mask)
    flat = apply(variables, *(x.reshape(6, *x.shape[2:]) for x in inputs), mask.reshape(6, TEXT))
    assert grouped.shape == (2, 3, HEIGHT, WIDTH, MEDIUM.out_channels)
    np.testing.assert_allclose(grouped.reshape(flat.shape), flat, rtol=0, atol=1e-5)


def test_text_mask(medium):
    _, model, variables = medium
    latents, text, pooled, timestep = draw(MEDIUM)
    lengths = np.array([TEXT, 11, 1, 11])
    mask = np.arange(TEXT) < lengths[:, None]
    apply = jax.jit(model.apply)
    masked = apply(variables, latents, text, pooled, timestep, mask)
    other = np.where(mask[..., None], text, 100 * np.cos(text))
    np.testing.assert_array_equal(masked, apply(variables, latents, other, pooled, timestep, mask))
    # Hidden text is as good as absent text, and hiding nothing is no mask at all.
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone = apply(variables, latents[row], text[row, :length], pooled[row], timestep[row])
        np.testing.assert_allclose(masked[row], alone, rtol=0, atol=1e-5)
    assert np.abs(masked[1:] - apply(variables, latents, text, pooled, timestep)[1:]).max() > 1e-2


def test_bfloat16_stays_close(medium):
    _, model, variables = medium
    inputs = draw(MEDIUM)
    expected = jax.jit(model.apply)(variables, *inputs)
    output = jax.jit(SD3Transformer(MEDIUM, jnp.bfloat16).apply)(variables, *inputs)
    assert output.dtype == jnp.bfloat16
    assert np.abs(output.astype(np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_config():
    assert Config.from_hf(MEDIUM.to_hf()) == MEDIUM
    assert Config.from_hf(dict(diffusers.SD3Transformer2DModel.from_config(MEDIUM.to_hf()).config)) == MEDIUM
    hf = MEDIUM.to_hf()
    with pytest.raises(UserError, match="FluxTransformer2DModel"):
        Config.from_hf({**hf, "_class_name": "FluxTransformer2DModel"})
    with pytest.raises(UserError, match=r"missing fields .*'num_layers'"):
        Config.from_hf({k: v for k, v in hf.items() if k != "num_layers"})
    with pytest.raises(UserError, match=r"unknown fields .*'axes_dims_rope'"):
        Config.from_hf({**hf, "axes_dims_rope": [16, 56, 56]})
    with pytest.raises(UserError, match="dual_attention_layers"):
        Config.from_hf({**hf, "dual_attention_layers": [1, 2]})
    with pytest.raises(UserError, match="caption_projection_dim"):
        Config.from_hf({**hf, "caption_projection_dim": 32})


def test_latents_that_do_not_fit(medium):
    _, model, variables = medium
    latents, *rest = draw(MEDIUM)
    with pytest.raises(UserError, match="9x4"):
        model.apply(variables, latents[:, :9], *rest)
    with pytest.raises(UserError, match="30x4"):
        model.apply(variables, np.tile(latents, (1, 3, 1, 1)), *rest)
