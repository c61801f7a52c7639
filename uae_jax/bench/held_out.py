"""The held-out comparison: what a captioner says of unseen images, and what is redrawn from it.

For any images: reward and unseen tower, caption length, and the control with captions of other images. Where the
truth is known (the shapes world) also the ceiling, facts, forced-choice perception, the attribute judge, and more
controls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import rewards, sharding
from uae_jax.data.shapes import facts, grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import decode_captions, encode_captions
from uae_jax.models import apply
from uae_jax.sampling.tokens import Segment, truncated
from uae_jax.step import sample_keys
from uae_jax.system import System
from uae_jax.umm import Params

Results = dict[str, Any]


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
            redrawn = family.redraw(params, frozen, captions, images, keys)
            out: dict[str, Any] = {"image": redrawn[:, 0]}
            similar = rewards.similarities(system.towers, frozen["towers"], images, redrawn)
            out["towers"] = {name: value[:, 0] for name, value in similar.items()}
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
        """function(params, frozen, images, keys, *arrays) over all held-out images, in equal, padded batches."""
        compiled = jax.jit(function)
        size, n = self.config.eval.batch_size, len(self.images)
        keys = sample_keys(self.key, jnp.int32(0), -(-n // size) * size, 1)

        def run(params: Params, *arrays: np.ndarray) -> Any:
            parts = []
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

    def reward_of(self, drawn: dict[str, Any]) -> np.ndarray:
        """The trained reward of each redrawn image [n]."""
        return np.asarray(rewards.weighted_sum(drawn["towers"], self.config.reward))

    def reward_of_texts(self, params: Params, texts: Sequence[str]) -> float:
        """Mean reward of the images drawn from given captions."""
        return float(self.reward_of(self.draw(params, *self.encode(texts))).mean())

    def run(self, params: Params) -> Results:
        """All numbers of one set of parameters, as eval.json holds them; fractions lie in 0..1."""
        tokens, mask, cut = self.write(params)
        texts = decode_captions(self.system.tokenizer, tokens, mask)
        drawn = self.draw(params, tokens, mask)
        n = len(texts)
        results: Results = {
            "images": n,
            "reward": float(self.reward_of(drawn).mean()),
            "caption_length": float(mask.sum(1).mean()),
            "caption_truncated": float(cut.mean()),
            "controls": {},
            "by_category": {},
            "captions": texts[:16],
        }
        second = [name for name in self.config.monitor if name in drawn["towers"]]
        if second:
            results["reward_second_tower"] = float(drawn["towers"][second[0]].mean())
        if n > 1:
            shuffled = np.roll(np.arange(n), 1)
            other = self.draw(params, tokens[shuffled], mask[shuffled])
            results["controls"]["captions_of_other_images"] = float(self.reward_of(other).mean())
        if self.scenes is not None:
            self.add_truth(results, params, texts, drawn)
        return results

    def add_truth(self, results: Results, params: Params, texts: list[str], drawn: dict[str, Any]) -> None:
        """What can be said because the scenes are known."""
        scenes = list(self.scenes or ())
        scored = facts.score([grammar.parse(text) for text in texts], scenes)
        results["caption_recall"] = scored["recall"]
        results["caption_precision"] = scored["precision"]
        results["caption_malformed"] = scored["malformed"]
        results["reward_ceiling"] = self.reward_of_texts(params, [grammar.complete(s) for s in scenes])
        others = scenes[1:] + scenes[:1]
        controls = {
            "with_true_background": [facts.with_true_background(t, s) for t, s in zip(texts, scenes, strict=True)],
            "objects_of_another_image": [
                facts.with_true_background(grammar.complete(o), s) for o, s in zip(others, scenes, strict=True)
            ],
            "background_only": [facts.background_only(s) for s in scenes],
        }
        for name, captions in controls.items():
            results["controls"][name] = self.reward_of_texts(params, captions)
        perception = self.perception(params, scenes)
        results["perception"] = float(np.mean(list(perception.values())))
        judged = judge_accuracy(drawn["judged"], scenes)
        results["redraw_accuracy"] = float(np.mean(list(judged.values())))
        results["by_category"] = {
            "facts": scored["by_category"],
            "perception": perception,
            "redraw_accuracy": judged,
        }

    def perception(self, params: Params, scenes: Sequence[Scene]) -> dict[str, float]:
        """Forced choice: how often the true caption is likelier than copies with one attribute changed."""
        questions = [facts.alternatives(s, np.random.default_rng([7, i])) for i, s in enumerate(scenes)]
        texts = [[text for _, options, _ in image for text in options] for image in questions]
        most = max(map(len, texts))
        padded = [options + options[:1] * (most - len(options)) for options in texts]
        tokens, mask = self.encode([text for options in padded for text in options])
        shape = (len(scenes), most, -1)
        scores = self.likelihood(params, tokens.reshape(shape), mask.reshape(shape))
        right: dict[str, list[bool]] = {}
        for image, row in zip(questions, scores, strict=True):
            at = 0
            for attribute, options, true in image:
                right.setdefault(attribute, []).append(int(row[at : at + len(options)].argmax()) == true)
                at += len(options)
        return {attribute: float(np.mean(values)) for attribute, values in right.items()}


def judge_accuracy(judged: dict[str, np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of true attributes that the judge reads off the redrawn images, cells of true objects only."""
    grids = [facts.attributes_grid(scene) for scene in scenes]
    truth = {name: np.stack([grid[name] for grid in grids]) for name in grids[0]}
    occupied = truth["shape"] > 0
    accuracy = {name: float((judged[name] == truth[name])[occupied].mean()) for name in ("shape", "colour", "size")}
    return accuracy | {"background": float((judged["background"] == truth["background"]).mean())}
