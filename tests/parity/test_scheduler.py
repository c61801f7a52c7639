"""Schedulers and whole sampled latents against diffusers' scheduler and pipelines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import test_flux, test_sd3
from uae_jax.errors import UserError
from uae_jax.sampling import flow, scheduler
from uae_jax.sampling.scheduler import Scheduler

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

# As published, with what diffusers has added since.
CONFIGS = {
    "sd3.5": {"num_train_timesteps": 1000, "shift": 3.0},
    "flux-dev": {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "flux-schnell": {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15, "use_dynamic_shifting": False},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.0, "max_shift": 2.5},
}


def steps_as_the_pipelines_take_them(reference, spacing: str, steps: int, tokens: int) -> None:
    """Sets the reference up as the pipeline of SD3 (`diffusers`) or FLUX (`uniform`) does."""
    config = reference.config
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    if spacing == "uniform":
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        reference.set_timesteps(steps, mu=mu)


@pytest.mark.parametrize("spacing", ["diffusers", "uniform"])
@pytest.mark.parametrize("name", CONFIGS)
def test_levels_and_timesteps(name, spacing):
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS[name])
    ours = Scheduler.from_hf(CONFIGS[name])
    for steps in (1, 4, 10, 28):
        for tokens in (64, 1024, 4096, 9216):
            steps_as_the_pipelines_take_them(reference, spacing, steps, tokens)
            levels = ours.sigmas(steps, spacing, tokens)
            assert levels.shape == tuple(reference.sigmas.shape) and levels.dtype == np.float32
            np.testing.assert_allclose(levels, reference.sigmas.numpy(), rtol=0, atol=2e-7)
            np.testing.assert_allclose(levels[:-1] * 1000, reference.timesteps.numpy(), rtol=1e-6)


def test_files_both_ways(tmp_path):
    for name, config in CONFIGS.items():
        theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        theirs.save_pretrained(tmp_path / name)
        ours = scheduler.load(tmp_path / name)
        assert ours == Scheduler.from_hf(config)
        scheduler.save(tmp_path / "ours" / name, ours)
        again = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours" / name)
        assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
            k: v for k, v in theirs.config.items() if k[0] != "_"
        }


def test_configs_that_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"scheduler_config.json is missing"):
        scheduler.load(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"shift": 3')
    with pytest.raises(UserError, match="not JSON"):
        scheduler.load(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", "eta": 1}))
    with pytest.raises(UserError, match=rf"{tmp_path}.*DDIMScheduler"):
        scheduler.load(tmp_path)
    for field, value in {
        "use_karras_sigmas": True,
        "shift_terminal": 0.02,
        "num_train_timesteps": 500,
        "prediction_type": "epsilon",
        "time_shift_type": "cubic",
        "shift": 0,
        "max_image_seq_len": 256,
    }.items():
        with pytest.raises(UserError, match=field if field != "shift" else "above 0"):
            Scheduler.from_hf({field: value})
    assert Scheduler.from_hf({"use_karras_sigmas": False, "shift_terminal": None}) == Scheduler()


def test_ten_steps_of_sd3():
    """diffusers' own pipeline, with classifier-free guidance in one doubled batch."""
    reference, model, variables = test_sd3.build(test_sd3.MEDIUM)
    latents, text, pooled, _ = test_sd3.draw(test_sd3.MEDIUM, (2,))
    _, negative, negative_pooled, _ = test_sd3.draw(test_sd3.MEDIUM, (2,), seed=1)
    reference_scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS["sd3.5"])
    pipeline = diffusers.StableDiffusion3Pipeline(reference, reference_scheduler, *[None] * 7)
    pipeline.set_progress_bar_config(disable=True)
    channels = test_sd3.MEDIUM.in_channels
    with torch.no_grad():
        # This tiny model predicts one channel more than it reads.
        reference.register_forward_hook(lambda module, args, output: (output[0][:, :channels],))
        expected = pipeline(
            prompt_embeds=torch.from_numpy(text),
            pooled_prompt_embeds=torch.from_numpy(pooled),
            negative_prompt_embeds=torch.from_numpy(negative),
            negative_pooled_prompt_embeds=torch.from_numpy(negative_pooled),
            latents=torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(),
            height=test_sd3.HEIGHT * 8,
            width=test_sd3.WIDTH * 8,
            guidance_scale=4.5,
            num_inference_steps=10,
            output_type="latent",
        ).images.permute(0, 2, 3, 1)

    texts, vectors = np.stack([text, negative]), np.stack([pooled, negative_pooled])

    def velocity(x, sigma):
        timestep = jnp.broadcast_to(sigma * 1000, (2, 2))
        both = model.apply(variables, jnp.broadcast_to(x, (2, *x.shape)), texts, vectors, timestep)[..., :channels]
        return flow.guided(both[0], both[1], 4.5)

    levels = Scheduler.from_hf(CONFIGS["sd3.5"]).sigmas(10, "diffusers", 10)
    found = jax.jit(lambda z: flow.euler(velocity, z, levels))(latents)
    assert np.abs(expected.numpy() - latents).max() > 1
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_ten_steps_of_flux():
    """diffusers' own pipeline, with distilled guidance and the shift of the image's size."""
    config = test_flux.dataclasses.replace(test_flux.DEV, out_channels=None)
    reference, model, variables = test_flux.build(config)
    latents, text, pooled, *_ = test_flux.draw(config, (2,))
    reference_scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(CONFIGS["flux-dev"])
    pipeline = diffusers.FluxPipeline(reference_scheduler, None, None, None, None, None, reference)
    pipeline.set_progress_bar_config(disable=True)
    h, w, c = latents.shape[1:]
    with torch.no_grad():
        packed = pipeline(
            prompt_embeds=torch.from_numpy(text),
            pooled_prompt_embeds=torch.from_numpy(pooled),
            latents=pipeline._pack_latents(torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous(), 2, c, h, w),
            height=h * 8,
            width=w * 8,
            guidance_scale=1.5,
            num_inference_steps=10,
            output_type="latent",
        ).images
    expected = test_flux.unpacked(packed).numpy()

    def velocity(x, sigma):
        timestep = jnp.broadcast_to(sigma * 1000, 2)
        return model.apply(variables, x, text, pooled, timestep, None, jnp.full(2, 1.5))

    levels = Scheduler.from_hf(CONFIGS["flux-dev"]).sigmas(10, "uniform", h * w // 4)
    found = jax.jit(lambda z: flow.euler(velocity, z, levels))(latents)
    assert np.abs(expected - latents).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
