"""Janus' rollout against transformers: greedy words and greedy image tokens with guidance, token for token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.parity.janus import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    SIDE,
    START,
    greedy_codes,
    greedy_text,
    picture,
    tiny_janus,
)  # fmt: skip
from tests.parity.janus import END as END_OF_IMAGE
from uae_jax.convert.table import load
from uae_jax.models.janus.config import Config
from uae_jax.models.janus.model import Janus
from uae_jax.models.janus.weights import table
from uae_jax.sampling.tokens import Segment
from uae_jax.step import STARTING_WEIGHTS, sample_keys
from uae_jax.umm import autoregressive
from uae_jax.umm.prompts import Prompts

NEW = 6
PROMPTS = Prompts(
    caption=(BOS, 7, START, IMAGE, END_OF_IMAGE, 8),
    redraw_prefix=(BOS, 7),
    redraw_suffix=(8, START),
    negative=(),
    end_token=EOS,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """transformers' model, our model, frozen weights."""
    reference = tiny_janus()
    folder = tmp_path_factory.mktemp("janus")
    reference.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    special = {"boi_token_id": START, "eoi_token_id": END_OF_IMAGE, "bos_token_id": BOS, "pad_token_id": PAD}
    config = Config.from_hf(values | special | {"eos_token_id": EOS})
    params = load(table(config), load_file(folder / "model.safetensors"))
    return reference, Janus(config), {"start": jax.tree.map(jnp.asarray, params)}


def family(model, tmp_path, **changes):
    config = tiny.config(tmp_path, data__image_size=SIDE, rl__max_tokens=NEW, redraw__temperature=0.0, **changes)
    every = np.ones(model.config.text.vocab_size, bool)
    return autoregressive.build(model, PROMPTS, every, config, temperature=0.0)


def test_greedy_words(pair, tmp_path):
    reference, model, frozen = pair
    pictures, keys = picture(0, 1), sample_keys(jax.random.key(0), 0, 2, 2)
    captions = jax.jit(family(model, tmp_path).generate)(STARTING_WEIGHTS, frozen, pictures, keys)
    at = PROMPTS.caption.index(IMAGE)
    ids = [*PROMPTS.caption[:at], *[IMAGE] * model.config.vision.num_patches, *PROMPTS.caption[at + 1 :]]
    prompt = np.array([ids, ids])
    expected, _ = greedy_text(reference, prompt, np.ones(prompt.shape, bool), pictures, NEW)
    assert len(np.unique(expected)) > NEW // 2
    for b in range(2):
        stop = [*expected[b].tolist(), EOS].index(EOS) + 1
        for g in range(2):
            kept = np.asarray(captions.actions[b, g])[np.asarray(captions.mask[b, g])]
            assert kept.tolist() == expected[b, :stop].tolist()


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_greedy_image_tokens(pair, tmp_path, guidance):
    """Captions of several lengths in one batch of groups: the tokens of transformers' rows, one by one, and pixels."""
    reference, model, frozen = pair
    lengths = np.array([[0, 4], [2, 5]])
    actions = np.random.default_rng(0).integers(0, 50, (2, 2, NEW)).astype(np.int32)
    np.put_along_axis(actions, lengths[..., None], EOS, axis=-1)
    mask = np.arange(NEW) <= lengths[..., None]
    captions = Segment(jnp.asarray(actions), jnp.asarray(mask), jnp.zeros(mask.shape))
    keys = sample_keys(jax.random.key(0), 0, 2, 2)
    redraw = jax.jit(family(model, tmp_path, redraw__guidance=guidance).redraw)
    images, drawn = redraw(STARTING_WEIGHTS, frozen, captions, picture(0, 1), keys)

    rows = [
        [*PROMPTS.redraw_prefix, *words[:n], *PROMPTS.redraw_suffix]
        for words, n in zip(actions.reshape(4, NEW).tolist(), lengths.ravel().tolist(), strict=True)
    ]
    expected = np.concatenate(
        [greedy_codes(reference, np.array([row]), np.ones((1, len(row)), bool), guidance) for row in rows]
    )
    assert len(np.unique(expected)) > 8
    np.testing.assert_array_equal(np.asarray(drawn["image"].actions).reshape(4, -1), expected)
    import torch

    with torch.no_grad():
        pixels = reference.decode_image_tokens(torch.from_numpy(expected)).numpy() / 2 + 0.5
    np.testing.assert_allclose(np.asarray(images).reshape(4, SIDE, SIDE, 3), pixels.clip(0, 1), rtol=0, atol=1e-4)
