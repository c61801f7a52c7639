"""Checkpoints under real faults: processes killed in the middle of a save, a file-size limit, a path below a file."""

import errno
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shutil
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import devices
from uae_jax import checksums
from uae_jax.checkpoint import Checkpointer, check_config, config_of, differences, named, write_config
from uae_jax.errors import UserError
from uae_jax.retention import Keep
from uae_jax.storage import storage_errors, write_atomic


@struct.dataclass
class State:
    step: jax.Array
    key: jax.Array
    params: dict
    opt_state: optax.OptState


def make_state(step=0):
    params = {"dense": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    keys = jax.random.split(jax.random.key(7), 2)
    return State(jnp.int32(step), keys, params, optimizer.init(params))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def words(tree):
    """Keys as their words, so that trees compare."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(words(found)), jax.tree.leaves(words(expected)), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), str(path))


CONFIG = {
    "steps": 10,
    "stepsize": 1,
    "rl": {"beta": 0.1, "clip": (0.2, 0.3)},
    "eval": {"every": 5, "n": 3},
    "name": None,
}


def test_a_state_comes_back_bit_for_bit_with_its_types(tmp_path):
    state = make_state(4)
    with Checkpointer(tmp_path, every=2) as saver:
        assert saver.restore_latest(abstract(state)) is None
        assert saver.save(4, state)
    with Checkpointer(tmp_path, every=2) as saver:
        restored, step = saver.restore_latest(abstract(state))
    assert step == 4 and isinstance(restored, State) and restored.key.dtype == state.key.dtype
    assert_same(restored, state)
    assert jax.random.uniform(restored.key[1]) == jax.random.uniform(state.key[1])


def test_saves_fall_on_multiples_or_are_forced_and_never_twice(tmp_path):
    with Checkpointer(tmp_path, every=3) as saver:
        started = [saver.save(step, make_state(step)) for step in range(1, 8)]
        assert started == [False, False, True, False, False, True, False]
        assert saver.save(7, make_state(7), force=True)
        assert not saver.save(7, make_state(99), force=True) and not saver.save(6, make_state(99))
    with Checkpointer(tmp_path, every=3) as saver:
        assert not saver.save(7, make_state(99), force=True)
        restored, step = saver.restore_latest(abstract(make_state()))
        assert step == 7 and restored.step == 7
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit())
    assert kept == ["6", "7"]  # keep=2


def test_arrays_land_on_the_shardings_asked_for(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    state = make_state()
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(0, state)
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*["fsdp"][: x.ndim]))),
            state,
        )
        restored, _ = saver.restore_latest(wanted)
    assert_same(restored, state)
    for leaf, want in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim) and leaf.sharding.mesh == mesh


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.replace(step=jnp.zeros(2, jnp.int32)), "step is int32[] there, int32[2] here"),
        (lambda s: s.replace(step=jnp.float32(0)), "step is int32[] there, float32[] here"),
        (lambda s: s.replace(params={}), "params/dense/bias is bfloat16[4] there, nothing here"),
        (lambda s: s.replace(params={**s.params, "x": jnp.ones(1)}), "params/x is nothing there, float32[1] here"),
        (lambda s: s.replace(key=jax.random.split(jax.random.key(0, impl="rbg"))), "key is uint32[2, 2] there"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(tmp_path, change, said):
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(5, make_state())
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            saver.restore_latest(abstract(change(make_state())))
    assert f"{tmp_path}/5" in str(caught.value) and "\n" not in str(caught.value)


def damage(folder, path, how):
    """Breaks one file of a checkpoint."""
    content = (folder / path).read_bytes()
    if how == "missing":
        (folder / path).unlink()
    elif how == "truncated":
        (folder / path).write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        (folder / path).write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder, every=1, config=CONFIG) as saver:
        for step in (1, 2):
            saver.save(step, make_state(step))
    return folder


# Of the checkpoint as a whole: restoring does without.
OUTSIDE = ("_CHECKPOINT_METADATA", "commit_success.txt", "default/commit_success.txt")


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_whatever_is_damaged_is_reported_and_the_one_before_is_used(saved, tmp_path, caplog, how):
    names = sorted(str(path.relative_to(saved / "2")) for path in (saved / "2").rglob("*") if path.is_file())
    assert len(names) > 8 and set(OUTSIDE) < set(names)
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        shutil.copytree(saved, folder)
        damage(folder / "2", name, how)
        caplog.clear()
        with Checkpointer(folder, every=1) as saver:
            restored, step = saver.restore_latest(abstract(make_state()))
            assert_same(restored, make_state(step))
            said = [record.getMessage() for record in caplog.records if record.name == "root"]
            if name in OUTSIDE:
                assert step == 2 and not said, name
            elif (name, how) == ("default/record.json", "missing"):  # as an older version would have written it
                assert step == 2 and "without checksums" in said[0]
            else:
                assert step == 1, name
                assert len(said) == 1 and f"{folder}/2 is damaged ({name.removeprefix('default/')}" in said[0]
                assert "the one before it is tried, of step 1" in said[0]
                assert (folder / "damaged-2").is_dir() and not (folder / "2").exists()
                assert saver.save(2, make_state(2))  # the run comes to that step again
        with Checkpointer(folder, every=1) as saver:
            assert saver.restore_latest(abstract(make_state()))[1] == 2


def test_where_all_are_damaged_nothing_starts_again_by_itself(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in "12":
        damage(tmp_path / step, "default/record.json", "flipped")
    for _ in range(2):
        with Checkpointer(tmp_path, every=1) as saver, pytest.raises(UserError, match=r"all checkpoints in .* damaged"):
            saver.restore_latest(abstract(make_state()))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_newer_version_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "FORMAT", checksums.FORMAT + 1)
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(1, make_state())
    monkeypatch.undo()
    with Checkpointer(tmp_path, every=1) as saver, pytest.raises(UserError, match="newer version of uae_jax"):
        saver.restore_latest(abstract(make_state()))


def test_a_checkpoint_holds_its_configuration(saved):
    assert differences(config_of(saved, 2), CONFIG) == {}
    assert list(differences(config_of(saved, 2), {**CONFIG, "steps": 11})) == ["steps"]


def test_what_resume_names(saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints")
    for path, step in ((run, 2), (run / "checkpoints", 2), (run / "checkpoints" / "1", 1)):
        assert named(path) == (run / "checkpoints", step)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        named(tmp_path / "nothing")
    damage(run / "checkpoints" / "2", "default/record.json", "truncated")
    assert named(run)[1] == 1
    with pytest.raises(UserError, match=r"checkpoint .*/2 is damaged"):
        named(run / "checkpoints" / "2")
    assert (run / "checkpoints" / "2").is_dir()  # reading changes nothing


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(newest=1), [8]),
        (Keep(newest=2, every=3), [3, 6, 7, 8]),
        (Keep(newest=1, best="a"), [4, 8]),
        (Keep(newest=1, best="a", mode="min"), [5, 8]),
        (Keep(newest=1, best="missing"), [8]),
    ],
)
def test_the_newest_those_of_certain_steps_and_the_best_stay(tmp_path, keep, kept):
    values = [1.0, 2.0, math.nan, 7.0, -1.0, 7.0, 3.0]  # of steps 1..7; 8 has none
    for steps in (range(1, 5), range(5, 9)):  # interrupted
        with Checkpointer(tmp_path, every=1, keep=keep) as saver:
            for step in steps:
                saver.save(step, {"x": jnp.float32(step)}, metrics={"a": values[step - 1]} if step < 8 else {})
    assert steps_in(tmp_path) == kept


def test_the_newest_is_that_of_the_highest_step_whatever_the_clock_says(tmp_path, monkeypatch):
    now = itertools.count(2_000_000_000, -1000)  # every look at the clock is earlier than the one before
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: float(next(now)))
        patched.setattr(time, "time_ns", lambda: next(now) * 10**9)
        with Checkpointer(tmp_path, every=1) as saver:
            for step in range(1, 5):
                saver.save(step, make_state(step))
    os.utime(tmp_path / "4", (0, 0))
    assert steps_in(tmp_path) == [3, 4]
    with Checkpointer(tmp_path, every=1) as saver:
        assert saver.restore_latest(abstract(make_state()))[1] == 4


def test_the_log_of_orbax_is_silent_and_that_of_others_is_not(tmp_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("absl")
    before = logger.level
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        with Checkpointer(tmp_path, every=1) as saver:
            saver.save(1, make_state())
        logger.warning("someone else's")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert [record.getMessage() for record in records] == ["someone else's"]


# ---- processes that die. `forkserver` imports jax once for all of them.


LEAVES, SIZE = 6, 400_000  # 1.6 MB a leaf of noise: a save takes long enough to be hit


def noise(step):
    """The state at `step`: every leaf is a function of it. In 1..2: a zero could lose its sign in `update`."""
    rng = np.random.default_rng(step)
    return {"step": np.int32(step), **{f"w{i}": rng.random(SIZE, np.float32) + 1 for i in range(LEAVES)}}


def checksum(state):
    return [zlib.crc32(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


def save_for_ever(directory, pipe):
    """Resumes, then saves at every step, donating each state to the next update as training does; two devices."""
    os.environ.update(devices.environment(2))
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    whole = NamedSharding(spread.mesh, P())
    place = lambda state: {k: jax.device_put(v, spread if v.ndim else whole) for k, v in state.items()}  # noqa: E731
    update = jax.jit(lambda state, new: jax.tree.map(lambda a, b: a * 0 + b, state, new), donate_argnums=0)
    with Checkpointer(directory, every=1) as saver:
        state = place(noise(0))
        restored = saver.restore_latest(abstract(state))
        first = 0 if restored is None else restored[1]
        pipe.send(("started", first, len(jax.devices())))
        for step in range(first + 1, first + 1000):
            state = update(state, place(noise(step)))
            saver.save(step, state)


def save_until_full(directory, pipe):
    """One good save; then files may not grow beyond 64 KiB, as on a full disk."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with Checkpointer(directory, every=1) as saver:
        saver.save(1, noise(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    for surfaces in ("close", "save"):
        try:
            with Checkpointer(directory, every=2) as saver:
                saver.save(2, noise(2))
                deadline = time.monotonic() + 20 if surfaces == "save" else 0
                while time.monotonic() < deadline:  # training goes on, at steps that save nothing
                    saver.save(3, noise(3))
                    time.sleep(0.05)
                surfaces = "close"
            pipe.send("no error")
        except UserError as error:
            pipe.send(f"{surfaces}: {error}")
    with Checkpointer(directory, every=1) as saver:
        state, step = saver.restore_latest(abstract(jax.tree.map(jnp.asarray, noise(0))))
        pipe.send((step, checksum(state)))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "uae_jax.checkpoint", "optax", "pytest"])
    return context


def start(context, target, directory):
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(str(directory), theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def receive(pipe):
    assert pipe.poll(60), "no word from the process"
    return pipe.recv()


def complete(directory):
    return max((int(path.name) for path in directory.iterdir() if path.name.isdigit()), default=0)


def unfinished(directory):
    return any("tmp" in path.name for path in directory.iterdir())


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_in_the_middle_of_a_save_leave_a_whole_state(tmp_path, processes, kills):
    wanted = abstract(jax.tree.map(jnp.asarray, noise(0)))
    rng, halves, reached = np.random.default_rng(), 0, 0
    for _ in range(kills):
        process, pipe = start(processes, save_for_ever, tmp_path)
        assert receive(pipe) == ("started", reached, 2)
        deadline = time.monotonic() + 60
        while complete(tmp_path) < reached + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        while not unfinished(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        halves += unfinished(tmp_path)
        reached_before, reached = reached, complete(tmp_path)
        assert reached >= reached_before + 2
        # Written on two devices, read on one.
        with Checkpointer(tmp_path, every=1) as saver:
            state, step = saver.restore_latest(wanted)
        assert step == reached and state["step"] == step
        assert checksum(state) == checksum(noise(step))
    assert halves > 0, "no kill fell into a save: the test tests nothing"


def test_what_killed_saves_left_is_gone_at_once(tmp_path):
    """Not some time later, when the next process may be at it, too."""
    Checkpointer(tmp_path, every=1).close()
    half = tmp_path / f"5{ocp.utils.TMP_DIR_SUFFIX}"
    half.mkdir()
    for i in range(2000):
        (half / f"{i}").touch()
    with Checkpointer(tmp_path, every=1):
        assert not unfinished(tmp_path)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stands(tmp_path, processes):
    process, pipe = start(processes, save_until_full, tmp_path)
    said = f"cannot write {tmp_path}: File too large; make room there or choose another place"
    assert [receive(pipe), receive(pipe)] == [f"close: {said}", f"save: {said}"]
    assert receive(pipe) == (1, checksum(noise(1)))
    process.join()


# ---- storage and config


def test_a_directory_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "checkpoints"):
        with pytest.raises(UserError, match=f"cannot write {path}: Not a directory"):
            Checkpointer(path, every=1)


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EISDIR]
)
def test_faults_of_storage_are_told_in_one_line(code):
    tensorstore = ValueError(
        f"UNKNOWN: Error writing \"w/0\": Failed to write: {os.strerror(code)} [os_error_code='1']"
    )
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(code, os.strerror(code))
    for error in (OSError(code, os.strerror(code)), tensorstore, wrapped):
        with pytest.raises(UserError) as caught, storage_errors("/runs/a"):
            raise error
        assert str(caught.value).startswith(f"cannot write /runs/a: {os.strerror(code)};")


def test_other_errors_pass():
    for error in (ValueError("a bug"), OSError(errno.EINVAL, "Invalid argument"), UserError("known"), KeyError("x")):
        with pytest.raises(type(error)) as caught, storage_errors("/runs/a"):
            raise error
        assert caught.value is error


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/a: No space"):
            write_atomic(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    write_atomic(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"new"


def test_the_same_config_passes_and_so_does_what_may_differ(tmp_path):
    check_config(tmp_path / "new", CONFIG)
    write_config(tmp_path / "new", CONFIG)
    check_config(tmp_path / "new", CONFIG)
    changed = {**CONFIG, "steps": 20, "eval": {"every": 1}}
    check_config(tmp_path / "new", changed, ("steps", "eval"))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["rl"] == {"beta": 0.1, "clip": [0.2, 0.3]}


def test_a_field_that_an_older_version_lacks_counts_as_its_default(tmp_path):
    write_config(tmp_path, CONFIG)
    now = {**CONFIG, "added": {"a": 1, "b": 2}}
    check_config(tmp_path, now, defaults=now)
    with pytest.raises(UserError, match=r"added\.b was 3, now 2"):
        check_config(tmp_path, now, defaults={**now, "added": {"a": 1, "b": 3}})
    del now["stepsize"]
    with pytest.raises(UserError, match=r"stepsize was 1, now '\(absent\)'"):  # removed since, or misspelt
        check_config(tmp_path, now, defaults=now)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rl": {"beta": 0.2, "clip": (0.2, 0.3)}}, "rl.beta was 0.1, now 0.2"),
        ({"rl": {"beta": 0.1, "clip": (0.2, 0.4)}}, "rl.clip was [0.2, 0.3], now [0.2, 0.4]"),
        ({"extra": 1}, "extra was '(absent)', now 1"),
        ({"eval": {"every": 5}}, "eval.n was 3, now '(absent)'"),
        ({"stepsize": 2}, "stepsize was 1, now 2"),  # 'steps' may differ, 'stepsize' may not
    ],
)
def test_another_config_is_refused_with_both_values_and_the_remedy(tmp_path, change, said):
    write_config(tmp_path, CONFIG)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        check_config(tmp_path, {**CONFIG, **change}, ("steps", "eval.every"))
    assert str(tmp_path) in str(caught.value) and "another --workdir, or remove it" in str(caught.value)


def test_many_differences_are_counted(tmp_path):
    write_config(tmp_path, dict.fromkeys("abcde", 0))
    with pytest.raises(UserError, match="a was 0, now 1; b was 0, now 1; c was 0, now 1; and 2 more"):
        check_config(tmp_path, dict.fromkeys("abcde", 1))


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 1')
    with pytest.raises(UserError, match=r"config\.json is not a configuration"):
        check_config(tmp_path, CONFIG)
    with pytest.raises(UserError, match="Not a directory"):
        check_config(tmp_path / "config.json", CONFIG)
