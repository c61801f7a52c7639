"""Sampling and scoring of tokens, on a small autoregressive model with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Sampling, Segment

V, D, T, END = 7, 4, 9, 3
ALLOWED = np.array([False, True, True, True, False, True, True])  # token 0 pads, token 4 is forbidden
FADE = 0.7
ROWS = 200  # one size in most tests: one compilation

rng = np.random.default_rng(0)
EMBEDDING = rng.normal(size=(V, D)).astype(np.float32)
HEAD = rng.normal(size=(D, V)).astype(np.float32) * 2
HEAD[:, 4] *= 5  # the forbidden token would often be the most likely
HEAD[:, END] -= 0.5


@functools.cache
def start(*batch: int, seed: int = 1):
    """A prompt's state a row, and a key a row."""
    prompt = np.random.default_rng(seed).normal(size=(*batch, D)).astype(np.float32)
    return prompt, jax.random.split(jax.random.key(seed), batch)


def decode(token, i, cache):
    """Tokens live in slots of a cache; a state is what has been read so far, older tokens fading."""
    slots = jax.lax.dynamic_update_slice_in_dim(cache["slots"], jnp.asarray(EMBEDDING)[token][..., None, :], i, axis=-2)
    age = i - jnp.arange(T)
    hidden = cache["prompt"] + jnp.where(age >= 0, FADE**age, 0.0) @ slots
    return jnp.tanh(hidden) @ HEAD, {**cache, "slots": slots, "calls": cache["calls"] + 1}


def run(prompt, keys, *, decode=decode, allowed=ALLOWED, **options) -> Segment:
    cache = {"prompt": prompt, "slots": jnp.zeros((*prompt.shape[:-1], T, D)), "calls": jnp.int32(0)}
    return tokens.sample(
        jnp.tanh(prompt) @ HEAD,
        cache,
        decode,
        keys,
        allowed=jnp.asarray(allowed),
        sampling=Sampling(**{"max_tokens": T, "stops": (END,)} | options),
    )


compiled = jax.jit(run, static_argnames=("decode", *Sampling._fields))


def sample(*args, allowed=ALLOWED, **kwargs) -> Segment:
    """Compiled, and brought to the host."""
    return jax.tree.map(np.asarray, compiled(*args, allowed=allowed, **kwargs))


def recompute(prompt, actions, temperature):
    """Log-probability table [t, v] before each action of one row, in float64, from the whole sequence each time."""
    rows = []
    for t in range(len(actions)):
        hidden = prompt.astype(float)
        for j in range(t):
            hidden = hidden + FADE ** (t - 1 - j) * EMBEDDING[actions[j]].astype(float)
        logits = np.tanh(hidden) @ HEAD.astype(float) / temperature
        rows.append(np.where(ALLOWED, logits - np.log(np.exp(logits[ALLOWED]).sum()), -np.inf))
    return np.array(rows)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_log_probs_are_those_of_the_model(temperature):
    prompt, keys = start(ROWS)
    found = sample(prompt, keys, temperature=temperature)
    length = found.mask.sum(-1)
    assert len(set(length.tolist())) > 3 and length.max() == T
    for i, n in enumerate(length):
        expected = recompute(prompt[i], found.actions[i, :n], temperature)[np.arange(n), found.actions[i, :n]]
        assert np.abs(found.log_probs[i, :n] - expected).max() < 1e-5


def test_forbidden_tokens_never_appear():
    found = sample(*start(ROWS))
    assert ALLOWED[found.actions[found.mask]].all()
    assert 4 in sample(*start(ROWS), allowed=ALLOWED | True).actions, "it would appear if it were allowed"


@pytest.mark.parametrize("end_token", [END, 0])
def test_nothing_counts_after_the_end_token(end_token):
    allowed = ALLOWED | (np.arange(V) == end_token)
    found = sample(*start(ROWS), stops=(end_token,), allowed=allowed)
    ends = (found.actions == end_token) & found.mask
    assert (ends.sum(-1) <= 1).all() and ends.any()
    for row in range(ROWS):
        n = found.mask[row].sum()
        assert found.mask[row, :n].all() and n >= 1
        assert n == T or ends[row, n - 1]
        assert not ends[row, : n - 1].any()
        assert not found.actions[row, n:].any() and not found.log_probs[row, n:].any()
        assert (found.log_probs[row, :n] < 0).all()
    assert np.array_equal(tokens.lengths(jax.tree.map(jnp.asarray, found)), found.mask.sum(-1))
    cut_off = np.asarray(tokens.truncated(found, end_token))
    assert np.array_equal(cut_off, ~ends.any(-1))
    assert cut_off.any() and (ends[:, -1] & ~cut_off).any(), "both kinds of full-length rows must occur"


def test_truncated_and_lengths_by_hand():
    """An end token that does not count ends nothing."""
    actions = jnp.array([[1, END, 0], [1, 2, END], [1, 2, 5], [1, 2, END]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]], bool)
    segment = Segment(actions, mask, jnp.zeros((4, 3)))
    assert tokens.truncated(segment, END).tolist() == [False, False, True, True]
    assert tokens.lengths(segment).tolist() == [2, 3, 3, 2]


def test_types_and_shapes():
    found = sample(*start(2, 3))
    assert [x.shape for x in found] == [(2, 3, T)] * 3
    assert [x.dtype for x in found] == [np.int32, np.bool_, np.float32]


def test_one_token():
    found = sample(*start(4), max_tokens=1)
    assert found.actions.shape == (4, 1) and found.mask.all()
    assert np.array_equal(tokens.truncated(found, END), found.actions[:, 0] != END)


def test_the_loop_ends_with_the_last_row():
    """The cache counts the calls of `decode`: one for each token after the first, of the longest row."""
    seen = []

    def counting(token, i, cache):
        logits, cache = decode(token, i, cache)
        jax.debug.callback(lambda calls, i: seen.append((int(calls), int(i))), cache["calls"], i)
        return logits, cache

    found = set()
    for seed in range(12):
        seen.clear()
        segment = sample(*start(2, seed=seed), decode=counting)
        jax.effects_barrier()
        longest = int(segment.mask.sum(-1).max())
        assert sorted(seen) == [(n + 1, n) for n in range(longest - 1)]
        found.add(longest)
    assert len(found) > 2 and min(found) < T


def test_temperature_zero_is_greedy_with_log_probs_at_one():
    prompt, keys = start(ROWS)
    found = sample(prompt, keys, temperature=0.0)
    for i, n in enumerate(found.mask.sum(-1)):
        table = recompute(prompt[i], found.actions[i, :n], 1.0)
        assert np.array_equal(found.actions[i, :n], table.argmax(-1))
        assert np.abs(found.log_probs[i, :n] - table.max(-1)).max() < 1e-5
    other = sample(prompt, start(ROWS, seed=5)[1], temperature=0.0)
    assert np.array_equal(found.actions, other.actions)


def test_a_sample_does_not_depend_on_its_neighbours():
    prompt, keys = start(ROWS)
    whole = sample(prompt, keys)
    other_prompt, other_keys = start(ROWS, seed=9)
    keep = np.arange(ROWS) % 2 == 0
    mixed = sample(np.where(keep[:, None], prompt, other_prompt), jnp.where(keep, keys, other_keys))
    for a, b in zip(whole, mixed, strict=True):
        assert np.array_equal(a[keep], b[keep])
    assert not np.array_equal(whole.actions, mixed.actions)


def test_batch_axes_do_not_matter():
    prompt, keys = start(6)
    whole = sample(prompt, keys)
    grouped = sample(prompt.reshape(2, 3, D), keys.reshape(2, 3))
    rows = [sample(prompt[i : i + 1], keys[i : i + 1]) for i in range(6)]
    for field in Segment._fields:
        flat = getattr(whole, field)
        alone = np.concatenate([getattr(r, field) for r in rows])
        if field == "log_probs":  # sums of another blocking
            assert np.abs(flat - getattr(grouped, field).reshape(6, T)).max() < 1e-5
            assert np.abs(flat - alone).max() < 1e-5
        else:
            assert np.array_equal(flat, getattr(grouped, field).reshape(6, T))
            assert np.array_equal(flat, alone)


def test_each_key_draws_its_own_sample():
    """The group of an image: one prompt, many keys."""
    prompt = np.repeat(start(1)[0], ROWS, axis=0)
    found = sample(prompt, start(ROWS)[1])
    assert len(np.unique(found.actions, axis=0)) > 20
    again = sample(prompt, start(ROWS)[1])
    assert np.array_equal(found.actions, again.actions)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_follow_the_distribution(temperature):
    """Pairs of first and second token of 20000 rows of one prompt, chi-square; noise used twice would show."""
    n = 20000
    prompt = np.repeat(start(1, seed=2)[0], n, axis=0)
    found = sample(prompt, start(n, seed=3)[1], temperature=temperature, max_tokens=2)
    actions = found.actions
    counts, expected = [], []
    for first in np.flatnonzero(ALLOWED):
        table = recompute(prompt[0], [first, 0], temperature)
        p = np.exp(table[0, first])
        for second, q in enumerate(np.exp(table[1]) if first != END else np.eye(V)[0]):
            if q > 0:
                counts.append(((actions == (first, second)).all(-1)).sum())
                expected.append(n * p * q)
    assert sum(counts) == n and np.isclose(sum(expected), n)
    counts, expected = np.array(counts), np.array(expected)
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    df = len(counts) - 1
    # The 99.9 % quantile of chi-square (Wilson and Hilferty's approximation).
    assert df > 8 and statistic < df * (1 - 2 / (9 * df) + 3.09 * np.sqrt(2 / (9 * df))) ** 3


def test_several_stops():
    """Each ends a row; without the second those rows would go on."""
    found, one = sample(*start(ROWS), stops=(END, 5)), sample(*start(ROWS))
    length = found.mask.sum(-1)
    for row, n in enumerate(length):
        assert not np.isin(found.actions[row, : n - 1], (END, 5)).any()
        assert n == T or found.actions[row, n - 1] in (END, 5)
        assert np.array_equal(found.actions[row, :n], one.actions[row, :n])
    lasts = set(found.actions[np.arange(ROWS), length - 1].tolist())
    assert {END, 5} <= lasts and (one.mask.sum(-1) > length).any()


@pytest.mark.parametrize("top_k,top_p", [(1, 1.0), (2, 1.0), (0, 0.5), (0, 0.9), (3, 0.6), (100, 1.0), (0, 1e-6)])
def test_narrowed_by_hand(top_k, top_p):
    """Against sorting each row: k largest, then the shortest prefix whose renormalised mass reaches p."""
    table = recompute(start(1)[0][0], np.array([1, 2, 5, 6, 1, 1, 2]), 1.0).astype(np.float32)
    found = np.asarray(tokens.narrowed(jnp.asarray(table), Sampling(1, (), top_k=top_k, top_p=top_p)))
    for row, got in zip(table, found, strict=True):
        order = np.argsort(-row)[: min(top_k or V, ALLOWED.sum())]
        mass = np.cumsum(np.exp(row[order]) / np.exp(row[order]).sum())
        kept = order[: np.searchsorted(mass, top_p - 1e-9) + 1] if top_p < 1 else order
        assert set(np.flatnonzero(np.isfinite(got))) == set(kept[np.isfinite(row[kept])])
        assert np.array_equal(got[kept], row[kept])


def test_narrow_sampling_stays_inside_and_scores_as_the_policy():
    """top_k=2 draws both of the two likeliest tokens and nothing else; log-probabilities are those of all tokens."""
    prompt, keys = start(ROWS)
    found = sample(prompt, keys, top_k=2, temperature=1.3)
    ranks = []
    for i, n in enumerate(found.mask.sum(-1)):
        table = recompute(prompt[i], found.actions[i, :n], 1.3)
        picked = table[np.arange(n), found.actions[i, :n]]
        ranks += (table > picked[:, None]).sum(-1).tolist()
        assert np.abs(found.log_probs[i, :n] - picked).max() < 1e-5
    assert set(ranks) == {0, 1}
    greedy = sample(prompt, keys, temperature=0.0)
    assert np.array_equal(sample(prompt, keys, top_k=1).actions, greedy.actions)
    assert np.array_equal(sample(prompt, keys, top_p=1e-6).actions, greedy.actions)


def test_seeds_give_their_sample_in_any_batch():
    prompt, _ = start(6)
    seeds = np.array([7, 7, 3, 2**31 - 1, 0, 3])
    found = sample(prompt, tokens.seeded(seeds), top_p=0.95)
    other = sample(prompt[[3, 0]], tokens.seeded(seeds[[3, 0]]), top_p=0.95)
    assert np.array_equal(found.actions[[3, 0]], other.actions)
    same = sample(prompt[[0] * ROWS], tokens.seeded(np.arange(ROWS) % 50)).actions
    assert np.array_equal(same[:50], same[50:100]) and len(np.unique(same[:50], axis=0)) > 10
    assert tokens.seeded(np.zeros((2, 3), int)).shape == (2, 3)


# ---- scoring ---------------------------------------------------------------------------------------------------------


def states(prompt, actions):
    """Teacher-forced states [..., t, d] before each action."""
    t = actions.shape[-1]
    age = jnp.arange(t)[:, None] - 1 - jnp.arange(t)
    fade = jnp.where(age >= 0, FADE ** jnp.maximum(age, 0), 0.0)
    return jnp.tanh(prompt[..., None, :] + fade @ jnp.asarray(EMBEDDING)[actions])


def score(hidden, head, actions, *, chunk, temperature=1.0):
    return tokens.log_probs(
        hidden, actions, lambda h: h @ head, allowed=jnp.asarray(ALLOWED), temperature=temperature, chunk=chunk
    )


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_scorer_and_sampler_agree(temperature):
    prompt, keys = start(3, 4)
    segment = sample(prompt, keys, temperature=temperature)
    scorer = jax.jit(functools.partial(score, chunk=4, temperature=temperature))
    found = scorer(jax.jit(states)(prompt, segment.actions), HEAD, segment.actions)
    assert found.shape == (3, 4, T) and found.dtype == jnp.float32
    assert np.abs(np.asarray(found) - segment.log_probs)[segment.mask].max() < 1e-5


@functools.lru_cache
def scored(chunk):
    """Value and gradients of a weighted sum of log-probabilities; some actions are padding, not allowed."""
    t = 10
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, t, D)), jnp.float32)
    actions = jnp.asarray(np.random.default_rng(4).choice(np.flatnonzero(ALLOWED), (2, 3, t)))
    actions = actions.at[:, 1, 6:].set(0)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, t)), jnp.float32)

    def total(hidden, head):
        found = score(hidden, head, actions, chunk=chunk, temperature=0.8)
        return (found * weights).sum(), found

    (_, found), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, jnp.asarray(HEAD))
    return hidden, actions, weights, found, gradients


def test_log_probs_match_a_plain_softmax():
    hidden, actions, weights, found, gradients = scored(10)
    allowed = ALLOWED[np.asarray(actions)]

    def plain(hidden, head):
        logits = jnp.where(ALLOWED, hidden @ head / 0.8, -1e30)
        picked = jnp.take_along_axis(logits, actions[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.where(allowed, picked, 0.0)
        return (picked * weights).sum(), picked

    plain_gradient = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))
    (_, expected), expected_gradients = plain_gradient(hidden, HEAD)
    assert not allowed.all() and not np.asarray(found)[~allowed].any()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 100])
def test_chunks_change_nothing(chunk):
    *_, expected, expected_gradients = scored(10)
    *_, found, gradients = scored(chunk)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def sizes(jaxpr):
    """Sizes of all arrays in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, jax_core.Jaxpr | jax_core.ClosedJaxpr)
        ):
            if isinstance(value, jax_core.ClosedJaxpr):
                yield from sizes(value.jaxpr)
            elif isinstance(value, jax_core.Jaxpr):
                yield from sizes(value)


def test_logits_of_the_whole_sequence_never_exist():
    b, t, v, d, chunk = 2, 96, 512, 2, 8
    hidden, head, actions = jnp.ones((b, t, d)), jnp.ones((d, v)), jnp.ones((b, t), int)

    def total(hidden, head, chunk):
        return tokens.log_probs(
            hidden, actions, lambda h: h @ head, allowed=jnp.arange(v) > 0, temperature=1.0, chunk=chunk
        ).sum()

    def largest(chunk):
        gradient = jax.value_and_grad(lambda *x: total(*x, chunk), argnums=(0, 1))
        return max(sizes(jax.make_jaxpr(gradient)(hidden, head).jaxpr))

    assert largest(chunk) == b * chunk * v < t * v
    assert largest(t) == b * t * v
