"""Qwen2.5-VL from pictures and conversations to answers, log-probabilities and gradients, against transformers.

One batch holds a prompt with two images of different sizes, one with a single ragged image, one without any, and a long
one; the processor, the padding, the budget and the cache are those that users meet.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.parity.test_qwen2_5_vl import END, EOS, IMAGE, PAD, START, TOLERANCE, pair  # noqa: F401 (a fixture)
from uae_jax.convert.table import load
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.config import VisionConfig
from uae_jax.models.qwen2_5_vl.prompts import Budget, Processor, batch, needed
from uae_jax.models.qwen2_5_vl.weights import table
from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Sampling
from uae_jax.umm import caption

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

PROCESSOR = Processor(min_pixels=100, max_pixels=1500)
NEW = 10


def pictures():
    """PIL images for each prompt: any sizes, one in grey."""
    rng = np.random.default_rng(0)
    sizes = [[(50, 23), (17, 31)], [(9, 60)], [], [(33, 33)]]
    drawn = [[Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in row] for row in sizes]
    drawn[0][1] = drawn[0][1].convert("L")
    return drawn


def ids():
    """Tokens of each prompt, one placeholder an image."""
    rng = np.random.default_rng(1)
    words = [rng.integers(0, START, n).tolist() for n in (3, 5, 2, 7, 11, 2, 30)]
    image = [START, IMAGE, END]
    return [
        [*words[0], *image, *words[1], *image, *words[2]],
        [*words[3], *image, *words[0]],
        words[4],
        [*words[5], *image, *words[6]],
    ]


@pytest.fixture(scope="module")
def both(pair):  # noqa: F811
    """(reference, its inputs, our model, parameters, our prompt)."""
    reference, model, params, _ = pair
    config = model.config
    rows = [
        (prompt, [PROCESSOR(picture, config.vision) for picture in images])
        for prompt, images in zip(ids(), pictures(), strict=True)
    ]
    least = needed(rows, config)
    # More room than needed: padding is part of what is tested.
    prompt = batch(rows, Budget(least.tokens + 3, least.windows + 2, least.merged + 1), config)
    hub = processing.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": PROCESSOR.min_pixels, "longest_edge": PROCESSOR.max_pixels}
    )([picture for row in pictures() for picture in row], return_tensors="pt")
    inputs = {
        "input_ids": torch.from_numpy(prompt.tokens.astype(np.int64)),
        "attention_mask": torch.from_numpy(prompt.mask.astype(np.int64)),
        "mm_token_type_ids": torch.from_numpy((prompt.tokens == IMAGE).astype(np.int32)),
        **hub,
    }
    return reference, inputs, model, params, prompt


def test_batch(both):
    """Placeholders, padding and positions are those of the reference's processor and model."""
    reference, inputs, _, _, prompt = both
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    assert len(set(counts)) >= 3 and (prompt.tokens == IMAGE).sum() == sum(counts)
    assert ((prompt.tokens == PAD) <= ~prompt.mask).all() and not prompt.mask[:, 0].any()
    positions, delta = reference.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    expected = np.moveaxis(positions.numpy(), 0, 1)
    assert np.array_equal(prompt.positions, expected)
    assert np.array_equal(prompt.following, prompt.mask.sum(1) + delta[:, 0].numpy())
    assert (prompt.layout.frames[2] == -1).all() and not prompt.patches[2].any()  # text only
    assert prompt.layout.frames[0].max() == 1


def greedy(both):
    reference, inputs, *_ = both
    reference.model.rope_deltas = None
    out = reference.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=[EOS, 7], pad_token_id=PAD)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def allowed(model):
    return np.ones(model.config.text.vocab_size, bool)


def test_greedy_answers(both):
    """Token for token, with two stop ids, several image sizes in one batch."""
    *_, model, params, prompt = both
    run = jax.jit(
        functools.partial(caption.generate, model, allowed=allowed(model), sampling=Sampling(NEW, (EOS, 7), 0.0))
    )
    found = run(params, prompt, tokens.seeded(np.zeros((4, 1), int)))
    expected = greedy(both)
    mask = np.asarray(found.mask[:, 0])
    assert mask.sum() > 24 and len(set(expected[mask].tolist())) > 8
    assert np.array_equal(np.where(mask, found.actions[:, 0], PAD)[:, : expected.shape[1]], expected)
    # The same program serves a batch of other lengths and sizes: only data changes.
    size = run._cache_size()
    other = jax.tree.map(lambda x: x[::-1], prompt)
    again = run(params, other, tokens.seeded(np.zeros((4, 1), int)))
    assert run._cache_size() == size == 1
    assert np.array_equal(again.actions[::-1], found.actions)


def reference_log_probs(both, answers, temperature):
    """torch's log-probability [b, t] of the answers' tokens, with its graph."""
    reference, inputs, *_ = both
    reference.model.rope_deltas = None
    p = inputs["input_ids"].shape[1]
    extended = {
        "input_ids": torch.cat([inputs["input_ids"], answers], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answers, dtype=torch.int32)], 1),
    }
    logits = reference(**{**inputs, **extended}).logits[:, p - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(-1, answers[..., None])[..., 0]


def test_three_ways_to_a_log_prob(both):
    """Sampler, teacher-forced scorer and torch, for every sampled token of groups of two."""
    *_, model, params, prompt = both
    temperature = 0.8
    options = {"allowed": allowed(model)}
    generate = jax.jit(
        functools.partial(caption.generate, model, sampling=Sampling(NEW, (EOS,), temperature), **options)
    )
    answers = generate(params, prompt, tokens.seeded(np.arange(8).reshape(4, 2)))
    score = jax.jit(functools.partial(caption.log_probs, model, temperature=temperature, chunk=4, **options))
    scored = np.asarray(score(params, prompt, answers))
    mask = np.asarray(answers.mask)
    assert mask.sum() > 50 and np.asarray(answers.log_probs)[mask].std() > 0.3
    for g in range(2):
        with torch.no_grad():
            # What stands after an end does not matter: attention is causal.
            expected = reference_log_probs(
                both, torch.from_numpy(np.asarray(answers.actions[:, g], np.int64)), temperature
            )
        for found in (scored[:, g], np.asarray(answers.log_probs[:, g])):
            assert np.abs(found - expected.numpy())[mask[:, g]].max() < TOLERANCE


def test_gradients(both):
    """Of a weighted mean of log-probabilities, with respect to every weight of both parts."""
    reference, _, model, params, prompt = both
    rng = np.random.default_rng(3)
    actions = rng.integers(0, START, (4, NEW))
    mask = np.arange(NEW) < np.array([10, 4, 7, 1])[:, None]
    weights = (rng.standard_normal((4, NEW)) * mask / mask.sum()).astype(np.float32)
    reference.zero_grad()
    (reference_log_probs(both, torch.from_numpy(actions), 1.0) * torch.from_numpy(weights)).sum().backward()
    tied = model.config.text.tie_word_embeddings
    hub = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): p.grad.numpy()
        for name, p in reference.named_parameters()
        if not (tied and name.startswith("lm_head"))
    }
    expected = load(table(model.config), hub)
    answers = tokens.Segment(jnp.asarray(actions)[:, None], jnp.asarray(mask)[:, None], jnp.zeros((4, 1, NEW)))

    @jax.jit
    def gradient(params):
        def total(params):
            scores = caption.log_probs(model, params, prompt, answers, allowed=allowed(model), temperature=1.0, chunk=3)
            return (scores[:, 0] * weights).sum()

        return jax.grad(total)(params)

    found = gradient(params)
    moved = jax.tree.map(lambda x: float(np.abs(x).max()), expected)
    assert min(jax.tree.leaves(moved)) > 5e-3  # every weight matters, and the tolerance is small beside it
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), found, expected)


@pytest.mark.parametrize("size", [(70, 98), (33, 400), (1200, 900), (20, 20), (28, 28)])
def test_processor(size):
    """Bicubic resizing included, pixel by pixel, at the hub's settings."""
    vision = VisionConfig(32, 1280, 3420, 16, 14, 112, (7, 15, 23, 31), 2048)
    theirs = processing.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 200704})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = theirs(picture, return_tensors="np")
    ours = Processor.from_hf(theirs.to_dict())
    assert (ours.min_pixels, ours.max_pixels) == (3136, 200704)
    found = ours(picture, vision)
    rows, columns = expected["image_grid_thw"][0, 1:]
    assert found.shape == (14 * rows, 14 * columns, 3)
    patches = found.reshape(rows // 2, 2, 14, columns // 2, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    flat = np.repeat(patches[..., None, :, :], 2, axis=-3).reshape(rows * columns, -1)
    assert np.abs(flat - expected["pixel_values"]).max() < 1e-5
    old = {"min_pixels": 1, "max_pixels": 2, "image_mean": [0.5] * 3, "image_std": [1, 1, 2]}
    assert Processor.from_hf(old) == Processor(1, 2, (0.5, 0.5, 0.5), (1, 1, 2))
    with pytest.raises(UserError, match="resample = 2"):
        Processor.from_hf({"resample": 2})


def test_narrowed_as_transformers_does():
    """top-k and top-p of its logits processors."""
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    scores = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32) * 3
    for top_k, top_p in ((5, 1.0), (0, 0.7), (12, 0.8), (40, 0.99)):
        expected = torch.from_numpy(scores)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        sampling = Sampling(1, (), top_k=top_k, top_p=top_p)
        found = tokens.narrowed(jax.nn.log_softmax(jnp.asarray(scores)), sampling)
        assert np.array_equal(np.isfinite(found), np.isfinite(expected.numpy()))
