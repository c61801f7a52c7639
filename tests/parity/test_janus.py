"""Janus against transformers: weights travel as safetensors, numbers agree within 1e-4."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity.janus import BOS, CODES, CONFIGS, IMAGE, PAD, START, as_pixels, greedy_codes, greedy_text, picture
from tests.parity.janus import END as END_OF_IMAGE
from tests.parity.janus import tiny_janus as build
from uae_jax.convert.table import load, save
from uae_jax.models.janus.config import Config
from uae_jax.models.janus.model import Janus
from uae_jax.models.janus.weights import table
from uae_jax.models.qwen2_5_vl.language import Cache

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """(transformers' model, our model, our parameters, tensors as saved)."""
    reference = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    files = load_file(folder / "model.safetensors")
    ours = Config.from_hf(json.loads((folder / "config.json").read_text()))
    return reference, Janus(ours), load(table(ours), files), files


@pytest.fixture(scope="module")
def call(pair):
    """Our model's methods, each compiled once a shape: call("embed", tokens)."""
    _, model, params, _ = pair
    methods = ["encode_image", "embed", "hidden", "logits", "embed_codes", "code_logits"]
    methods += ["encode_codes", "decode_codes"]
    compiled = {name: jax.jit(functools.partial(model.apply, method=name)) for name in methods}
    return lambda name, *arguments: compiled[name]({"params": params}, *arguments)


def prompts():
    """Two rows of different length with an image each, right-aligned: tokens [2, t], mask [2, t], pictures."""
    rng = np.random.default_rng(5)
    rows = [
        np.array([*rng.integers(0, 50, before), START, *[IMAGE] * 16, END_OF_IMAGE, *rng.integers(0, 50, after)])
        for before, after in ((3, 7), (1, 3))
    ]
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (length - len(row), 0), constant_values=PAD) for row in rows])
    mask = np.stack([np.arange(length) >= length - len(row) for row in rows])
    return tokens, mask, picture(0, 1)


def test_tables_invert(pair):
    """What is saved is what was loaded, bit for bit, under transformers' names; `init` makes the same tree."""
    _, model, params, files = pair
    assert set(params) == {"visual", "aligner", "language", "gen_embed", "gen_aligner", "gen_head", "vq"}
    saved = save(table(model.config), params)
    assert saved.keys() == files.keys()
    for name, tensor in files.items():
        assert saved[name].dtype == tensor.dtype and np.array_equal(saved[name], tensor), name
    shapes = jax.eval_shape(model.init, jax.random.key(0), picture(0), np.zeros((1, 4), int))["params"]
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)


def test_config_travels(pair):
    """transformers reads what we write, and we read what it writes then."""
    reference, model, _, _ = pair
    written = json.loads(json.dumps(model.config.to_hf()))
    assert Config.from_hf(written) == model.config
    theirs = transformers.JanusConfig(**written)
    assert Config.from_hf(theirs.to_dict()) == model.config
    for part in ("text_config", "vision_config", "vq_config"):
        before, after = getattr(reference.config, part).to_dict(), getattr(theirs, part).to_dict()
        before.pop("dtype"), after.pop("dtype"), before.pop("architectures"), after.pop("architectures")
        assert after == before
    del written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]
    assert not Config.from_hf(written).text.tie_word_embeddings
    assert theirs.image_token_id == IMAGE and theirs.tie_word_embeddings == reference.config.tie_word_embeddings


def test_image_features(pair, call):
    """Leading axes are free."""
    reference = pair[0]
    images = 2 * picture(3, 4) - 1
    with torch.no_grad():
        expected = reference.model.get_image_features(torch.from_numpy(images.transpose(0, 3, 1, 2))).pooler_output
    found = call("encode_image", images[None])
    assert found.shape == (1, *expected.shape)
    assert np.abs(found[0] - expected.numpy()).max() < TOLERANCE


def test_hidden_states_and_logits(pair, call):
    """Prompts with images and left padding: final states, logits of text and of codes."""
    reference = pair[0]
    tokens, mask, pictures = prompts()
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        output = reference.model(
            input_ids=torch.from_numpy(tokens),
            pixel_values=as_pixels(pictures),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(positions),
        )
        states = output.last_hidden_state
        logits, code_logits = reference.lm_head(states).numpy(), reference.model.generation_head(states).numpy()
    seen = np.tril(np.ones((tokens.shape[1],) * 2, bool)) & mask[:, None, :]
    embeds = call("embed", tokens, call("encode_image", 2 * pictures - 1))
    hidden, cache = call("hidden", embeds, positions, seen)
    assert isinstance(cache, Cache) and cache.k.shape[1:3] == tokens.shape
    assert np.abs(hidden - states.numpy())[mask].max() < TOLERANCE
    assert np.abs(call("logits", hidden) - logits)[mask].max() < TOLERANCE
    assert np.abs(call("code_logits", hidden) - code_logits)[mask].max() < TOLERANCE
    assert call("logits", hidden).dtype == call("code_logits", hidden).dtype == jnp.float32


def test_codes(pair, call):
    """Codes into the language model, images into codes and back."""
    reference = pair[0]
    codes = np.random.default_rng(2).integers(0, CODES, (2, 16))
    with torch.no_grad():
        embeds = reference.prepare_embeddings_for_image_generation(torch.from_numpy(codes)).numpy()
        drawn = reference.decode_image_tokens(torch.from_numpy(codes)).numpy()
        latents = reference.model.vqmodel.quant_conv(reference.model.vqmodel.encoder(as_pixels(picture(7, 8))))
    assert np.abs(call("embed_codes", codes) - embeds).max() < TOLERANCE
    images = call("decode_codes", codes)
    assert np.abs(images - np.clip((drawn + 1) / 2, 0, 1)).max() < TOLERANCE
    assert np.mean((images > 0) & (images < 1)) > 0.05  # most is not clipped away
    # The codes nearest in direction, as the original repository chooses them.
    latents = latents.numpy().transpose(0, 2, 3, 1).reshape(2, 16, -1)
    book = reference.model.vqmodel.quantize.embedding.weight.detach().numpy()
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (latents, book)]
    expected = np.argmax(unit[0] @ unit[1].T, axis=-1)
    assert np.array_equal(call("encode_codes", picture(7, 8)), expected)


def test_greedy_caption(pair, call):
    """Prefill, then a token at a time at one slot for the whole batch: transformers' tokens and logits."""
    reference = pair[0]
    tokens, mask, pictures = prompts()
    new = 8
    expected, logits = greedy_text(reference, tokens, mask, pictures, new)
    t = tokens.shape[1]
    visible = np.pad(mask, [(0, 0), (0, new)], constant_values=True)
    slots = np.arange(t + new)
    embeds = call("embed", tokens, call("encode_image", 2 * pictures - 1))
    positions, seen = np.maximum(np.cumsum(mask, 1) - 1, 0), np.tril(np.ones((t, t), bool)) & mask[:, None]
    hidden, cache = call("hidden", embeds, positions, seen)
    cache = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, new), (0, 0), (0, 0)]), cache)
    for i in range(new):
        found = call("logits", hidden[:, -1])
        assert np.abs(found - logits[:, i]).max() < TOLERANCE
        token = np.argmax(found, -1)[:, None]
        assert np.array_equal(token[:, 0], expected[:, i])
        at = mask.sum(1, keepdims=True) + i
        hidden, cache = call("hidden", call("embed", token), at, (visible & (slots <= t + i))[:, None], cache, t + i)
    assert all(len(set(row)) > 2 for row in expected.tolist())  # otherwise there was little to get wrong


def test_greedy_codes(pair, call):
    """Guided image tokens, one prompt at a time, so that none is padded: transformers' codes."""
    reference = pair[0]
    tokens = np.array([[BOS, 7, 3, 22, 41, 5, START]])
    everything = np.ones(tokens.shape, bool)
    guided, less = (greedy_codes(reference, tokens, everything, scale) for scale in (5.0, 1.5))
    assert not np.array_equal(guided, less) and len(set(guided[0].tolist())) > 3
    rows = np.concatenate([tokens, np.where((tokens == BOS) | (tokens == START), tokens, PAD)])
    t, n = rows.shape[1], guided.shape[1]
    # All at once, of one shape: what is not drawn yet is hidden by causality.
    embeds = np.pad(call("embed", rows), [(0, 0), (0, n), (0, 0)])
    positions, seen = np.broadcast_to(np.arange(t + n), (2, t + n)), np.tril(np.ones((t + n, t + n), bool))
    found = []
    for i in range(t, t + n):
        hidden, _ = call("hidden", embeds, positions, seen)
        conditional, unconditional = call("code_logits", hidden[:, i - 1])
        found.append(int(np.argmax(unconditional + 5.0 * (conditional - unconditional))))
        embeds[:, i] = call("embed_codes", np.array([found[-1]]))
    assert found == guided[0].tolist()
