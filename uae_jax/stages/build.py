"""From the name of a stage to its program."""

from pathlib import Path
from typing import Any

import jax

from uae_jax import config as configs
from uae_jax.convert import folder
from uae_jax.data.shapes import tokenizer as shapes_tokenizer
from uae_jax.errors import UserError
from uae_jax.models.projector.model import Projector
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.stages import Program, bench_tower, captioner, coldstart, decoder, joint, pairs, rl, tower
from uae_jax.stages import tokenizer as vq_tokenizer
from uae_jax.umm import caption, diffusion
from uae_jax.umm import decoder as drawing
from uae_jax.umm.prompts import Prompts


def build(stage: str, config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> Program:
    """The program of a stage. Later stages of a cold start read what earlier ones wrote to workdir/weights; `decoder`
    on pictures with captions starts from `config.weights`.

    Raises:
      UserError: a stage that starts from nothing, in a config that does not say of what size.
    """
    if stage == "rl":
        return rl.build(config, workdir, mesh)
    if stage == "decoder" and config.data.source in configs.PAIR_SOURCES:
        return pairs.build(config, workdir, mesh)
    if "models" not in config or stage not in config:
        like = "tiny_ar_coldstart" if stage in ("tokenizer", "joint") else "tiny_coldstart"
        raise UserError(
            f"config.stage = {stage!r} starts from nothing and needs config.models and config.{stage}, as"
            f" configs/{like}.py"
        )
    if stage == "tokenizer":
        return vq_tokenizer.build(config, workdir, mesh)
    tokenizer = shapes_tokenizer.build()
    if stage == "joint":
        return joint.build(config, workdir, tokenizer, mesh)
    sizes = coldstart.model_config(config, "captioner")
    modules = diffusion.Modules(
        Qwen2_5_VL(sizes, remat=config.remat),
        Projector(coldstart.model_config(config, "projector")),
        drawing.transformer(coldstart.model_config(config, "transformer"), remat=config.remat),
    )
    prompts = Prompts.build(tokenizer, config, sizes)
    if stage == "tower":
        return tower.build(config, workdir, tokenizer, prompts.end_token, mesh)
    if stage == "bench_tower":
        return bench_tower.build(config, workdir, tokenizer, prompts.end_token, mesh)
    if stage == "captioner":
        allowed = caption.allowed_tokens(tokenizer, sizes.text.vocab_size, prompts.end_token)
        family = diffusion.build(modules, prompts, allowed, config, mesh)
        return captioner.build(config, workdir, tokenizer, prompts.end_token, modules.captioner, family, mesh)
    start = folder.load_model(workdir / "weights" / "captioner").params
    return decoder.build(config, workdir, tokenizer, modules, prompts, start, mesh)
