"""Stage `joint`: one autoregressive model learns to caption and to draw, its image tokenizer frozen.

Captions are complete until the last phase, which makes the model terse, so that details pay in RL; images are drawn
from captions of every length all along, a share of them hidden, so that guidance has an unconditional branch. Both
losses are means of the very log-probs that RL scores with.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from uae_jax import optimizers, system
from uae_jax.bench.held_out import Evaluator
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import encode_captions
from uae_jax.models import apply, initial
from uae_jax.models.janus.model import Janus
from uae_jax.sampling.tokens import Segment
from uae_jax.stages import Program, card, coldstart, rl
from uae_jax.step import Metrics, State
from uae_jax.umm import Params, autoregressive, caption
from uae_jax.umm.prompts import Prompts

WATCHED = 128  # held-out scenes on which progress is watched


def build(config: Any, workdir: Path, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program; it reads workdir/weights/tokenizer, `finish` writes workdir/weights/janus and the card.

    Raises:
      UserError: the stage `tokenizer` has not been run.
    """
    settings = config.joint
    sizes = coldstart.model_config(config, "janus")
    model = Janus(sizes, remat=config.remat)
    prompts = Prompts.build(tokenizer, config, sizes)
    allowed = caption.allowed_tokens(tokenizer, sizes.text.vocab_size, prompts.end_token)
    family = autoregressive.build(model, prompts, allowed, config, mesh)
    every_code = np.ones(sizes.vq.num_embeddings, bool)
    size, length = config.data.image_size, grammar.LONGEST + 1
    vq = folder.load_model(workdir / "weights" / "tokenizer").params

    def fields(scenes: list[Scene], rng: np.random.Generator, step: int) -> dict[str, np.ndarray]:
        share = 1.0 if step < settings.see_steps else settings.terse_keeps_complete
        written = [
            grammar.complete(s) if rng.random() < share else grammar.terse(s, rng, settings.terse_detail)
            for s in scenes
        ]
        drawn = [
            grammar.complete(s) if rng.random() < settings.complete else grammar.caption(s, rng, rng.uniform(0.3, 1.0))
            for s in scenes
        ]
        tokens, mask = encode_captions(tokenizer, written, length, prompts.end_token)
        ids, kept = encode_captions(tokenizer, drawn, length, prompts.end_token)
        return {
            "tokens": tokens,
            "mask": mask,
            "drawn": ids,
            "length": kept.sum(1).astype(np.int32) - 1,
            "hidden": rng.random(len(scenes)) < settings.dropout,
        }

    def draw_log_probs(params: Params, frozen: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Of the images' codes [b, 1, n], given captions."""
        weights = frozen["start"] | params
        codes = jax.lax.stop_gradient(apply(model, weights, batch["image"], method="encode_codes"))[:, None]
        prompt = autoregressive.drawing(batch["drawn"], batch["length"], prompts, sizes.pad_token_id)
        blank = autoregressive.unconditional(prompt, sizes.pad_token_id)
        prompt = prompt._replace(tokens=jnp.where(batch["hidden"][:, None], blank.tokens, prompt.tokens))
        answers = Segment(codes, jnp.ones(codes.shape, bool), jnp.zeros(codes.shape))
        return caption.log_probs(
            model, weights, prompt, answers,
            allowed=every_code, temperature=1.0, chunk=config.rl.logit_chunk, kind=caption.CODES,
        )  # fmt: skip

    def loss(params: Params, frozen: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        tokens, mask = batch["tokens"][:, None], batch["mask"][:, None]
        captions = Segment(tokens, mask, jnp.zeros(tokens.shape))
        scores = family.log_probs({"encoder": params}, frozen, batch["image"], {"caption": captions})["caption"]
        words, codes = -scores.sum() / mask.sum(), -draw_log_probs(params, frozen, batch).mean()
        value = words + settings.image_weight * codes
        return value, {"loss": value, "loss/caption": words, "loss/image": codes}

    tokens = jnp.full((1, sizes.vision.num_patches), sizes.image_token_id)
    params = initial(model, jax.random.key(config.seed + 1), jnp.zeros((1, size, size, 3)), tokens)
    params = {name: x for name, x in params.items() if name != "vq"}
    # Codes that look alike start alike.
    codebook = vq["codebook"] / np.linalg.norm(vq["codebook"], axis=-1, keepdims=True)
    params["gen_embed"] = {"embedding": jnp.asarray(codebook)}
    see = optax.warmup_cosine_decay_schedule(
        0.0, settings.optimizer.learning_rate, settings.optimizer.warmup,
        max(settings.see_steps, settings.optimizer.warmup + 1), end_value=settings.terse_learning_rate,
    )  # fmt: skip
    terse = optax.linear_schedule(settings.terse_learning_rate, 0.0, settings.terse_steps)
    optimizer = optimizers.make(settings.optimizer, rate=optax.join_schedules([see, terse], [settings.see_steps]))
    start = {"vq": jax.tree.map(jnp.asarray, vq)}

    def finish(state: State, writer: Any) -> None:
        target = workdir / "weights" / system.JANUS
        folder.save_model(target, sizes, jax.device_get(state.params) | {"vq": vq}, np.float16)
        tokenizer.save(str(target / "tokenizer.json"))
        writer.message("evaluating the weights for their card")
        card.write(config, workdir, "joint")

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={"start": start},
        rules=(*folder.rules_of(sizes, mesh), *optimizers.RULES),
        step=coldstart.supervised_step(loss, optimizer),
        batches=coldstart.SceneBatches(
            config.seed, settings.batch_size, size, fields, coldstart.growing_scenes(settings.curriculum_steps)
        ),
        steps=settings.see_steps + settings.terse_steps,
        columns={
            "loss/caption": ("caption", ".4f"),
            "loss/image": ("image", ".4f"),
            "ceiling": ("ceiling", ".3f"),
            "perception": ("perception", ".3f"),
        },
        evaluate=watch(config, mesh, model, tokenizer, start),
        finish=finish,
    )


def watch(config: Any, mesh: jax.sharding.Mesh, model: Janus, tokenizer: Tokenizer, start: Params) -> Any:
    """evaluate(state, writer) of the program: the reward of true complete captions, and forced choice."""
    if not config.eval.enabled:
        return lambda state, writer: {}
    config = config.copy_and_resolve_references()
    config.unlock()
    config.data.held_out = min(WATCHED, config.data.held_out)
    config.text_encoder = "live"  # what draws is what learns
    built = system.complete(config, mesh, model, model.config, tokenizer, {"start": start})
    _, images, scenes = rl.load_data(config)
    evaluator = Evaluator(config, built, mesh, images, scenes)

    def evaluate(state: State, writer: Any) -> Metrics:
        if not int(state.step):
            return {}
        params = {"encoder": state.params}
        found = evaluator.perception(params, scenes or [])
        earned = evaluator.reward_of_texts(params, [grammar.complete(scene) for scene in scenes or []])
        means = {name: np.float32(score.mean) for name, score in found.items()}
        return {"ceiling": earned.mean(), "perception": min(means.values())} | {
            f"perception/{name}": mean for name, mean in means.items()
        }

    return evaluate
