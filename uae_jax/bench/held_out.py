"""The held-out comparison: what a captioner says of unseen images, and what is redrawn from it.

For any images: reward and unseen tower, caption length, and the control with captions of other images. Where the
truth is known (the shapes world) also the ceiling, facts, forced-choice perception, the attribute judge, and more
controls.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import rewards, sharding
from uae_jax.bench.scores import Score, Scores, each, total
from uae_jax.data.shapes import facts, grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import decode_captions, encode_captions, retokenised
from uae_jax.models import apply
from uae_jax.sampling.tokens import Segment, truncated
from uae_jax.step import sample_keys
from uae_jax.system import System
from uae_jax.umm import Params


class Evaluation(NamedTuple):
    """What was found for one set of parameters."""

    scores: Scores
    captions: list[str]  # one an image


class Evaluator:
    """Compiles the pieces once, then evaluates any parameters on the same held-out images with the same noise."""

    def __init__(
        self,
        config: Any,
        system: System,
        mesh: jax.sharding.Mesh,
        images: np.ndarray,
        scenes: Sequence[Scene] | None = None,
    ):
        """
        Args:
          images: uint8 [n, H, W, 3].
          scenes: what they show, if known.
        """
        self.config, self.system, self.mesh = config, system, mesh
        self.images, self.scenes = images, scenes
        family = system.family(config, mesh, config.eval.temperature)
        self.key = jax.random.key(config.seed)

        def write(params: Params, frozen: Params, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
            captions = family.generate(params, frozen, images, keys)
            return captions.actions[:, 0], captions.mask[:, 0], truncated(captions, system.prompts.end_token)[:, 0]

        def draw(
            params: Params, frozen: Params, images: jax.Array, keys: jax.Array, tokens: jax.Array, mask: jax.Array
        ) -> dict[str, Any]:
            captions = Segment(tokens[:, None], mask[:, None], jnp.zeros(mask[:, None].shape))
            redrawn, _ = family.redraw(params, frozen, captions, images, keys)
            out: dict[str, Any] = {"image": redrawn[:, 0]}
            similar = rewards.similarities(system.towers, frozen["towers"], images, redrawn)
            out["towers"] = {name: value[:, 0] for name, value in similar.items()}
            out["reward"] = system.reward(config, captions, similar)[:, 0]
            if system.judge is not None:
                logits = apply(system.judge, frozen["judge"], redrawn[:, 0])
                out["judged"] = {name: value.argmax(-1) for name, value in logits.items()}
            return out

        def likelihood(
            params: Params, frozen: Params, images: jax.Array, keys: jax.Array, tokens: jax.Array, mask: jax.Array
        ) -> jax.Array:
            segment = Segment(tokens, mask, jnp.zeros(mask.shape))
            return family.log_probs(params, frozen, images, {"caption": segment})["caption"].sum(-1)

        self.write, self.draw, self.likelihood = (self.batched(f) for f in (write, draw, likelihood))

    def batched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """function(params, frozen, images, keys, *arrays) in equal, padded batches.

        Over all held-out images, or over the first ones if the arrays hold fewer rows.
        """
        compiled = jax.jit(function)
        size, most = self.config.eval.batch_size, len(self.images)
        keys = sample_keys(self.key, jnp.int32(0), -(-most // size) * size, 1)

        def run(params: Params, *arrays: np.ndarray) -> Any:
            parts = []
            n = min([most, *map(len, arrays)])
            for start in range(0, n, size):
                rows = np.minimum(np.arange(start, start + size), n - 1)
                images = self.images[rows].astype(np.float32) / 255.0
                batch = sharding.place_batch(
                    {"image": images, **{str(i): a[rows] for i, a in enumerate(arrays)}}, self.mesh
                )
                out = compiled(
                    params, self.system.frozen, batch.pop("image"), keys[start : start + size], *batch.values()
                )
                parts.append(jax.device_get(out))
            return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)

        return run

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as tokens and mask [n, t]."""
        return encode_captions(self.system.tokenizer, texts, grammar.LONGEST + 1, self.system.prompts.end_token)

    def reward_of_texts(self, params: Params, texts: Sequence[str]) -> np.ndarray:
        """Reward of the images drawn from given captions, of the first images if there are fewer."""
        return self.draw(params, *self.encode(texts))["reward"]

    def run(self, params: Params) -> Evaluation:
        """All scores of one set of parameters, headlines first; fractions lie in 0..1."""
        tokens, mask, cut = self.write(params)
        texts = decode_captions(self.system.tokenizer, tokens, mask)
        drawn = self.draw(params, tokens, mask)
        found: Scores = {"reward": each(drawn["reward"])}
        for name in self.config.monitor[:1]:
            found["reward_second_tower"] = each(drawn["towers"][name])
        found |= {"caption_length": each(mask.sum(1)), "caption_truncated": each(cut)}
        again = retokenised(self.system.tokenizer, tokens, mask, self.system.prompts.end_token)
        found["caption_retokenised"] = each(again)
        if self.scenes is not None:
            found |= self.truth(params, texts, drawn)
        if len(texts) > 1:
            shuffled = np.roll(np.arange(len(texts)), 1)
            other = self.draw(params, tokens[shuffled], mask[shuffled])
            found["controls/captions_of_other_images"] = each(other["reward"])
        # Headlines, then controls and ceilings, then categories.
        return Evaluation(dict(sorted(found.items(), key=lambda item: item[0].count("/"))), texts)

    def truth(self, params: Params, texts: list[str], drawn: dict[str, Any]) -> Scores:
        """What can be said because the scenes are known."""
        scenes = list(self.scenes or ())
        described = [grammar.parse(text) for text in texts]
        by_fact = {}
        for name, counts in facts.tallies(described, scenes).items():
            shown, stated, right = counts.T
            by_fact[name] = {"recall": Score(right, shown), "precision": Score(right, stated)}
        everything = by_fact.pop("all")
        perception = self.perception(params, scenes)
        judged = judge_accuracy(drawn["judged"], scenes)
        complete = [grammar.complete(s) for s in scenes]
        best = self.draw(params, *self.encode(complete))
        controls = {
            "with_true_background": [facts.with_true_background(t, s) for t, s in zip(texts, scenes, strict=True)],
            "objects_of_another_image": [
                facts.with_true_background(t, s) for t, s in zip(complete[1:] + complete[:1], scenes, strict=True)
            ],
            "background_only": [facts.background_only(s) for s in scenes],
        }
        found: Scores = {
            "reward_ceiling": each(best["reward"]),
            "complete_length": each(self.encode(complete)[1].sum(1)),
            "caption_recall": everything["recall"],
            "caption_precision": everything["precision"],
            "caption_malformed": each([d is None for d in described]),
            "perception": total(perception.values()),
            "redraw_accuracy": total(judged.values()),
        }
        found |= {f"ceiling/{name}": each(best["towers"][name]) for name in self.config.monitor[:1]}
        found["ceiling/redraw_accuracy"] = total(judge_accuracy(best["judged"], scenes).values())
        for name, captions in controls.items():
            found[f"controls/{name}"] = each(self.reward_of_texts(params, captions))
        for name, rates in by_fact.items():
            found |= {f"by_category/facts/{name}/{rate}": score for rate, score in rates.items()}
        found |= {f"by_category/perception/{name}": score for name, score in perception.items()}
        found |= {f"by_category/redraw_accuracy/{name}": score for name, score in judged.items()}
        return found

    def perception(self, params: Params, scenes: Sequence[Scene]) -> Scores:
        """Forced choice: how often the true caption is likelier than copies with one attribute changed."""
        questions = [facts.alternatives(s, np.random.default_rng([7, i])) for i, s in enumerate(scenes)]
        texts = [[text for _, options, _ in image for text in options] for image in questions]
        most = max(map(len, texts))
        padded = [options + options[:1] * (most - len(options)) for options in texts]
        tokens, mask = self.encode([text for options in padded for text in options])
        shape = (len(scenes), most, -1)
        scores = self.likelihood(params, tokens.reshape(shape), mask.reshape(shape))
        right: dict[str, np.ndarray] = {}
        asked: dict[str, np.ndarray] = {}
        for i, (image, row) in enumerate(zip(questions, scores, strict=True)):
            at = 0
            for attribute, options, true in image:
                for counts in (right, asked):
                    counts.setdefault(attribute, np.zeros(len(scenes)))
                right[attribute][i] = int(row[at : at + len(options)].argmax()) == true
                asked[attribute][i] = 1
                at += len(options)
        return {attribute: Score(right[attribute], asked[attribute]) for attribute in right}


def judge_accuracy(judged: dict[str, np.ndarray], scenes: Sequence[Scene]) -> Scores:
    """Attributes that the judge reads off the redrawn images: of true objects, in their cells, and the background."""
    grids = [facts.attributes_grid(scene) for scene in scenes]
    truth = {name: np.stack([grid[name] for grid in grids]) for name in grids[0]}
    occupied = truth["shape"] > 0
    accuracy = {
        name: Score(((judged[name] == truth[name]) & occupied).sum(1), occupied.sum(1))
        for name in ("shape", "colour", "size")
    }
    return accuracy | {"background": each(judged["background"] == truth["background"])}
