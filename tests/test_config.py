"""Config: every rule names its field, every field is documented, and nothing can be misspelt."""

import ast
import inspect
import traceback

import pytest
from ml_collections import ConfigDict

from configs import sd3_5_decoder, tiny, tiny_ar_coldstart, tiny_coldstart
from uae_jax import config as base
from uae_jax.errors import UserError

MIXTURE = {
    "data.source": "mixture",
    "data.mixture": ConfigDict({"a": {"source": "folder", "path": "pictures", "weight": 2.0}}),
}
PAIRS = {"data.source": "jsonl", "data.path": "pairs.jsonl", "stage": "decoder", "decoder": base.decoder()}
# What is wrong, and the field that the message must name.
WRONG = [
    ({"stage": "rll"}, "stage"),
    ({"stage": "tower,"}, "stage"),
    ({"train": "tower"}, "train"),
    ({"condition_source": "image"}, "condition_source"),
    ({"text_encoder": "thawed"}, "text_encoder"),
    ({"dtype": "float16"}, "dtype"),
    ({"remat": "some"}, "remat"),
    ({"redraw.gather": "never"}, "redraw.gather"),
    ({"steps": -1}, "steps"),
    ({"stop_on_gap": -0.1}, "stop_on_gap"),
    ({"trainable": "language/(.*"}, "trainable"),
    ({"lora.rank": -1}, "lora.rank"),
    ({"lora.alpha": 0.0}, "lora.alpha"),
    ({"lora.target": "*_proj"}, "lora.target"),
    ({"reward": ConfigDict()}, "reward"),
    ({"reward": ConfigDict({"clip": None})}, "reward.clip"),
    ({"rl.weights.image": float("nan")}, "rl.weights.image"),
    ({"redraw.steps": None}, "redraw.steps"),
    ({"rl.normaliser": "batch"}, "rl.normaliser"),
    ({"rl.truncated": "drop"}, "rl.truncated"),
    ({"rl.malformed": "mask"}, "rl.malformed"),
    ({"rl.group_size": 1}, "rl.group_size"),
    ({"rl.temperature": 0.0}, "rl.temperature"),
    ({"rl.clip_low": 0.0}, "rl.clip_low"),
    ({"rl.clip_low": 1.0}, "rl.clip_low"),
    ({"rl.clip_high": 0.0}, "rl.clip_high"),
    ({"rl.beta": -0.1}, "rl.beta"),
    ({"rl.weights.image": -1.0}, "rl.weights.image"),
    ({"rl.advantage_eps": -1e-4}, "rl.advantage_eps"),
    ({"rl.max_tokens": 0}, "rl.max_tokens"),
    ({"rl.inner_epochs": 0}, "rl.inner_epochs"),
    ({"rl.microbatches": 0}, "rl.microbatches"),
    ({"rl.microbatches": 3}, "rl.microbatches"),
    ({"rl.logit_chunk": 0}, "rl.logit_chunk"),
    ({"redraw.spacing": "karras"}, "redraw.spacing"),
    ({"redraw.prediction": "noise"}, "redraw.prediction"),
    ({"redraw.steps": 0}, "redraw.steps"),
    ({"redraw.tile_vae": -8}, "redraw.tile_vae"),
    ({"redraw.temperature": -0.1}, "redraw.temperature"),
    ({"redraw.shift": 0.0}, "redraw.shift"),
    ({"redraw.distilled_guidance": -1.0}, "redraw.distilled_guidance"),
    ({"data.source": "imagenet"}, "data.source"),
    ({"data.source": "folder"}, "data.path"),
    ({"data.batch_size": 0}, "data.batch_size"),
    ({"data.image_size": 0}, "data.image_size"),
    ({"data.held_out": 0}, "data.held_out"),
    ({"data.max_objects": 0}, "data.max_objects"),
    ({"data.max_objects": 5}, "data.max_objects"),
    ({"eval.batch_size": 0}, "eval.batch_size"),
    ({"eval.every": -1}, "eval.every"),
    ({"eval.temperature": -0.5}, "eval.temperature"),
    ({"eval.top_k": -1}, "eval.top_k"),
    ({"eval.top_p": 0.0}, "eval.top_p"),
    ({"eval.top_p": 1.1}, "eval.top_p"),
    ({"rl.top_k": 50}, "rl.top_k"),
    ({"rl.top_p": 0.9}, "rl.top_p"),
    ({"checkpoint.every": 0}, "checkpoint.every"),
    ({"checkpoint.keep": 0}, "checkpoint.keep"),
    ({"checkpoint.keep_every": -1}, "checkpoint.keep_every"),
    ({"checkpoint.best_mode": "most"}, "checkpoint.best_mode"),
    ({"max_bad_steps": -1}, "max_bad_steps"),
    ({"resume": "runs/tiny", "stage": "tower,captioner"}, "resume"),
    ({"heartbeat_seconds": 5}, "heartbeat_seconds"),
    ({"optimizer.name": "sgd"}, "optimizer.name"),
    ({"optimizer.learning_rate": -1e-4}, "optimizer.learning_rate"),
    ({"optimizer.warmup": -1}, "optimizer.warmup"),
    ({"optimizer.max_grad_norm": 0.0}, "optimizer.max_grad_norm"),
    ({"data.source": "jsonl"}, "data.path"),
    ({"data.source": "jsonl", "data.path": "x", "stage": "tower"}, "data.source"),
    ({"data.source": "jsonl", "data.path": "x", "stage": "decoder"}, "stage"),
    ({"data.fit": "zoom"}, "data.fit"),
    ({"data.decoder": "opencv"}, "data.decoder"),
    ({"data.max_bad_fraction": 1.5}, "data.max_bad_fraction"),
    ({"data.workers": -1}, "data.workers"),
    ({"data.max_bytes": 0}, "data.max_bytes"),
    ({"data.source": "mixture"}, "data.mixture"),
    (MIXTURE | {"data.mixture": ConfigDict({"a": {"source": "folder"}})}, "data.mixture.a"),
    (MIXTURE | {"data.mixture.a.source": "shapes"}, "data.mixture.a.source"),
    (MIXTURE | {"data.mixture.a.path": ""}, "data.mixture.a.path"),
    (MIXTURE | {"data.mixture.a.weight": 0.0}, "data.mixture.a.weight"),
    (PAIRS | {"decoder": ConfigDict({"steps": 1})}, "decoder"),
    (PAIRS | {"decoder.latents": "kept", "data.fit": "random_crop"}, "data.fit"),
    (PAIRS | {"decoder.steps": 0}, "decoder.steps"),
    (PAIRS | {"decoder.dropout": 1.0}, "decoder.dropout"),
    (PAIRS | {"decoder.ema": -0.1}, "decoder.ema"),
    (PAIRS | {"decoder.shift": -1.0}, "decoder.shift"),
    (PAIRS | {"decoder.trainable": "("}, "decoder.trainable"),
    (PAIRS | {"decoder.trainable": ""}, "decoder.trainable"),
    (PAIRS | {"decoder.lora.rank": -1}, "decoder.lora.rank"),
    (PAIRS | {"decoder.lora.alpha": 0.0}, "decoder.lora.alpha"),
    (PAIRS | {"decoder.lora.target": "*"}, "decoder.lora.target"),
]
RULES = ("validate", "_validate_optimizer", "_validate_pairs", "_validate_data")
RIGHT = [
    {"stage": " tower, captioner ,decoder,rl"},
    {"steps": 0},
    {"stop_on_gap": 0.2},
    {"rl.beta": 0.0},
    {"rl.advantage_eps": 0.0},
    {"rl.microbatches": 4},
    {"rl.rollout_microbatches": 2},
    {"rl.clip_high": 3.0},
    {"eval.every": 0},
    {"data.source": "folder", "data.path": "/pictures"},
    {"optimizer.learning_rate": 0.0},
    PAIRS,
    MIXTURE,
    {"data.source": "tfds", "data.path": "coco_captions"},
]


def changed(changes) -> ConfigDict:
    c = base.default()
    with c.unlocked():
        for field, value in changes.items():
            *parents, leaf = field.split(".")
            node = c
            for parent in parents:
                node = node[parent]
            if isinstance(value, ConfigDict):
                if leaf in node:
                    del node[leaf]
                value = ConfigDict(value.to_dict())
            node[leaf] = value
    return c


def failure(changes) -> tuple[str, set[int]]:
    """The message, and the lines of RULES that the error passed through."""
    with pytest.raises(UserError) as caught:
        base.validate(changed(changes))
    frames = traceback.extract_tb(caught.value.__traceback__)
    return str(caught.value), {frame.lineno for frame in frames if frame.name in RULES}


@pytest.mark.parametrize("changes, field", WRONG, ids=lambda x: str(x))
def test_a_wrong_value_is_named_with_its_remedy(changes, field):
    message, _ = failure(changes)
    value = changed(changes)
    for part in field.split("."):
        value = value[part]
    value = "" if value == "tower," else value  # a stage is named by itself
    shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    assert message.startswith(f"config.{field} = {shown}") and "\n" not in message
    assert len(message.split(": ", 1)[1].split()) > 1


def test_a_field_that_is_missing_or_of_another_type_is_named():
    for changes, said in (
        ({"eval": ConfigDict({"every": 3})}, r"config\.eval\.\w+ is missing: its default is"),
        ({"data": ConfigDict({"x": 3})}, r"config\.data\.\w+ is missing"),
        ({"redraw.steps": None}, r"config\.redraw\.steps = None: must be of type int"),
        (PAIRS | {"decoder.lora.rank": None}, r"config\.decoder\.lora\.rank = None: must be of type int"),
    ):
        with pytest.raises(UserError, match=said):
            base.validate(changed(changes))


def test_every_rule_has_an_example():
    calls = [
        node
        for function in ast.walk(ast.parse(inspect.getsource(base)))
        if isinstance(function, ast.FunctionDef) and function.name in RULES
        for node in ast.walk(function)
        if (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_require", "_one_of"))
        or isinstance(node, ast.Raise)
    ]
    seen = set().union(*(failure(changes)[1] for changes, _ in WRONG))
    for node in calls:
        lines = set(range(node.lineno, node.end_lineno + 1))
        assert lines & seen, f"no example breaks the rule in line {min(lines)}: {ast.unparse(node)}"
    assert len(calls) > 30


def test_the_optimizers_of_a_cold_start_are_checked_too():
    c = tiny_coldstart.get_config()
    c.decoder.optimizer.warmup = -1
    with pytest.raises(UserError, match=r"config\.decoder\.optimizer\.warmup = -1: "):
        base.validate(c)


@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_borderline_values_pass(changes):
    base.validate(changed(changes))


@pytest.mark.parametrize(
    "make", [base.default, *(c.get_config for c in (tiny, tiny_coldstart, tiny_ar_coldstart, sd3_5_decoder))]
)
def test_shipped_configs_pass_and_are_locked(make):
    c = make()
    base.validate(c)
    assert c.is_locked and c.rl.is_locked
    for node, field in ((c, "step"), (c.rl, "groupsize"), (c.data, "batchsize")):
        with pytest.raises((AttributeError, KeyError), match=field):
            node[field] = 1
    with pytest.raises(TypeError):
        c.steps = "many"


def test_configs_are_independent():
    c = base.default()
    c.rl.beta = 0.5
    assert base.default().rl.beta != 0.5


def test_stages():
    assert base.stages(changed({"stage": "tower, captioner ,decoder"})) == ["tower", "captioner", "decoder"]


def leaves(c, prefix=""):
    for name, value in c.items():
        if isinstance(value, ConfigDict) and name != "reward":
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_fields_that_may_differ_exist():
    assert all(any(f"{field}.".startswith(f"{name}.") for field in leaves(base.default())) for name in base.MAY_DIFFER)


def test_every_field_of_the_default_has_a_comment():
    """In the source, on the line where it gets its value."""
    source = inspect.getsource(base)
    lines = source.splitlines()
    commented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and "  # " in lines[node.end_lineno - 1]:
            targets = [x for x in ast.walk(node.targets[0]) if isinstance(x, ast.Attribute)]
            commented |= {ast.unparse(target).removeprefix("c.") for target in targets}
    fields = [*leaves(base.default()), *leaves(base.decoder())]
    bare = {field for field in fields if field.removeprefix("optimizer.") not in commented}
    assert not bare
    assert len(commented) > 50
