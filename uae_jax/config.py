"""Every field of a config, with its meaning and default; `configs/*.py` start from `default()` and change some.

A config is a locked `ml_collections.ConfigDict`: a misspelt field or a value of another type is an error. `validate`
checks what types cannot say.
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from uae_jax.errors import UserError

STAGES = ("tower", "bench_tower", "captioner", "decoder", "tokenizer", "joint", "rl")
PICTURE_SOURCES = ("folder", "jsonl", "array_record", "tfds")

# Fields that may change between a run and its continuation in the same workdir.
# Those from `mesh` on change how a step is computed, not what.
MAY_DIFFER = (
    "stage", "steps", "checkpoint", "eval", "stop_on_gap", "max_bad_steps",
    "mesh", "remat", "rl.rollout_microbatches", "redraw.gather", "offload_optimizer", "offload_frozen",
    "heartbeat_seconds",
)  # fmt: skip
FREE = ("reward", "data.mixture")  # fields whose own fields are named by the user


def default() -> ConfigDict:
    """The base of all configs."""
    c = ConfigDict()

    c.stage = "rl"  # what to run: rl, or a part of a supervised cold start (STAGES); several: "tower,captioner"
    c.steps = 1000  # updates of the rl stage
    c.seed = 0  # of everything random: data order, sampling, noise, initialisation
    c.weights = ""  # folder with captioner/, projector/ ..., or with janus/; or a shipped one: tiny (""), tiny_ar
    c.resume = ""  # another run's workdir (or a checkpoint in it) to go on from, where the own workdir has none yet
    c.towers = ""  # folder with the towers that reward and monitor name, and the judge; "" = that of the weights
    c.dtype = "float32"  # compute type of all models: float32 or bfloat16 (master weights stay float32)
    c.remat = "full"  # what the backward pass computes again: full, dots or none (uae_jax.models.REMAT)

    # The loop: image -> caption -> redrawn image.
    c.train = "encoder"  # what RL learns from: encoder (captions), decoder (the image tokens it samples), both
    c.trainable = r"language/.*"  # regex over the encoder's parameter paths: what is trained; the rest stays frozen
    c.lora = ConfigDict()
    c.lora.rank = 0  # of low-rank adapters (LoRA), which then are all that is trained; 0: none, train `trainable`
    c.lora.alpha = 32.0  # a kernel becomes kernel + (alpha / rank) a @ b
    c.lora.target = r"language/layers/.*"  # regex over the encoder's parameter paths: kernels that get an adapter
    c.condition_source = "text"  # text: the caption is read again, alone; in_context: states that saw the image
    c.text_encoder = "frozen"  # whose weights read it to draw: frozen (as at the start) or live (in training)
    c.mask_text = True  # hide padding from the decoder; False is what diffusers' SD3 and the released UAE do

    c.prompt = ConfigDict()
    c.prompt.caption = "<|im_start|><|vision_start|><|image_pad|><|vision_end|>"  # before the caption; asks for it
    c.prompt.redraw_prefix = "<|im_start|>"  # round the caption when it is read again as text alone
    c.prompt.redraw_suffix = "<|im_end|>"  # ... and after it
    c.prompt.negative = ""  # caption of the unconditional branch of guidance

    c.rl = ConfigDict()
    c.rl.group_size = 8  # captions per image (G); the group is the baseline, so at least 2
    c.rl.max_tokens = 32  # longest caption, in tokens, the end token included
    c.rl.token_budget = 16  # caption tokens that reward "length" grants in full; unused where no reward names it
    c.rl.temperature = 1.0  # of the policy: sampling and scoring alike
    c.rl.beta = 0.02  # weight of the KL (k3) to the starting weights
    c.rl.clip_low = 0.2  # the ratio is clipped to 1 - clip_low ...
    c.rl.clip_high = 0.2  # ... 1 + clip_high
    c.rl.inner_epochs = 1  # updates per rollout; clipping only acts from the second
    c.rl.microbatches = 1  # gradient accumulation: the batch of images is split into this many parts
    c.rl.rollout_microbatches = 1  # ... and into this many to caption, redraw and score them, one after the other
    c.rl.normaliser = "constant"  # mean over a segment's actions: constant (its limit), sequence, token (batch)
    c.rl.weights = ConfigDict()
    c.rl.weights.caption = 1.0  # weight of the caption's part of the objective, a mean over its own tokens ...
    c.rl.weights.image = 1.0  # ... and of the image tokens' part, where they are learnt from
    c.rl.scale_by_std = True  # divide advantages by the group's standard deviation
    c.rl.advantage_eps = 1e-4  # added to that standard deviation
    c.rl.truncated = "keep"  # captions cut off at max_tokens: keep, mask (no gradient), zero (reward 0)
    c.rl.malformed = "keep"  # captions outside the data's grammar, where it has one: keep, group_min, zero
    c.rl.logit_chunk = 128  # tokens whose logits exist at once in the update

    c.redraw = ConfigDict()
    c.redraw.steps = 4  # Euler steps from noise to image
    c.redraw.guidance = 1.0  # classifier-free guidance; 1 skips the unconditional branch
    c.redraw.two_passes = False  # guidance by two calls of the decoder, not one of twice the batch: less memory
    c.redraw.distilled_guidance = 3.5  # guidance scale that FLUX.1-dev is told as an input; read by no other decoder
    c.redraw.shift = 1.0  # moves the steps towards noise (SD3 uses 3); a scheduler/ beside the weights says it instead
    c.redraw.spacing = "uniform"  # of noise levels: uniform, or diffusers (SD3's scheduler, to the letter)
    c.redraw.prediction = "velocity"  # what the decoder was trained to predict: velocity or sample
    c.redraw.same_noise = True  # one initial noise (one draw of image tokens) per group: only the caption differs in it
    c.redraw.temperature = 1.0  # of image tokens, where the weights draw with them; 0 = the most likely ones
    c.redraw.slice_vae = False  # decode latents one sample of each group (a device) at a time: less memory
    c.redraw.tile_vae = 0  # ... in blended tiles of so many pixels a side, as diffusers does (512); 0: as a whole
    c.redraw.gather = "layer"  # the decoder's weights where fsdp splits them: layer by layer at every step, or once

    # A reward's name is a tower's folder of weights (CLIP, LongCLIP, DINOv2, DINOv3 or SigLIP, by its config.json), or
    # "length" or "wellformed", of the caption alone; names joined by "*" are multiplied.
    c.reward = ConfigDict({"clip": 1.0})  # weights of the rewards; {"clip": 1.0} is the paper
    c.monitor = ("clip_second",)  # towers that are logged beside the reward and never trained on
    c.stop_on_gap = 0.0  # stop once the reward's towers gain so much more than a monitored one (`gap`); 0: never

    c.optimizer = optimizer("adamw", 1e-4, warmup=10)

    c.data = ConfigDict()
    c.data.source = "shapes"  # shapes (rendered scenes), folder, jsonl, array_record, tfds, or mixture
    # folder: your images, with captions where it has a metadata.jsonl. jsonl: {"image": path, "caption": text}, a line
    # each. array_record: what `python -m uae_jax.data prepare` wrote. tfds: DATASET/VERSION prepared as array_record.
    c.data.path = ""  # the folder or file; tfds: the folder, or a name in $TFDS_DATA_DIR ("coco_captions/2014:1.1.0")
    # Sources read together: {"photos": {"source": "folder", "path": "PHOTOS", "weight": 3.0}, "coco": {...}}
    c.data.mixture = ConfigDict()
    c.data.split = "train"  # of a tfds source
    c.data.image_key = "image"  # the field (jsonl) or feature (tfds: "a/b" for one inside another) of the picture ...
    c.data.caption_key = "caption"  # ... and of its caption, of several the first; "" in tfds: there is none
    c.data.decoder = "pillow"  # of a tfds source's pictures: pillow (with the limits below) or tfds (its own)
    c.data.image_size = 48  # pixels a side of the squares that images become
    c.data.fit = "crop"  # how: crop (resize, keep the centre), random_crop, pad (all of it, on white), stretch
    c.data.max_bytes = 64 * 2**20  # of an image's file; larger ones are refused before they are opened
    c.data.max_pixels = 2**26  # of an image; larger ones are refused before they are decoded
    c.data.max_bad_fraction = 0.05  # bad records are skipped, counted and named; the run stops above this share of all
    c.data.workers = 0  # processes that read and decode images; 0: threads of this one
    c.data.batch_size = 8  # images a step, over all devices
    c.data.max_objects = 4  # shapes: objects in a scene
    c.data.held_out = 256  # images kept for evaluation, never trained on (folders: at most a quarter)

    c.eval = ConfigDict()
    c.eval.enabled = True  # evaluate before, during and after
    c.eval.every = 100  # steps between redraws of the same held-out pictures; 0 = only before and after
    c.eval.pictures = 8  # how many
    c.eval.batch_size = 64  # images at once
    c.eval.temperature = 0.0  # of captions in evaluation; 0 = the most likely token
    c.eval.top_k = 0  # captions in evaluation are drawn among the k most likely tokens; 0 = all
    c.eval.top_p = 1.0  # ... among the fewest tokens whose probabilities reach p; 1 = all

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between (asynchronous) saves; the last step and a stop are always saved
    c.checkpoint.keep = 2  # how many of the newest stay on disk; with 1 there is none to fall back on
    c.checkpoint.keep_every = 0  # those of multiples of so many steps stay too; 0: none for that
    c.checkpoint.best = ""  # and the one best by this metric, of those whose step has it; "": none for that
    c.checkpoint.best_mode = "max"  # what is best: max or min
    c.max_bad_steps = 10  # stop after so many steps in a row whose gradients are not finite; 0: never

    c.mesh = ConfigDict()  # devices along each axis; one may be -1: all that are left
    c.mesh.slice = 1  # slices of a pod, or nodes, joined by a slower network: each has a copy of the weights
    c.mesh.data = -1  # copies of the weights, each with its part of the batch
    c.mesh.fsdp = 1  # weights stored in parts over this many devices, batch too
    c.mesh.tensor = 1  # heads and MLPs of the language model used in parts over this many devices
    c.offload_optimizer = False  # its state lies in host memory between updates: less on the device, and slower
    c.offload_frozen = False  # so do frozen weights that draw or score (stage rl): none of them during the update
    c.heartbeat_seconds = 100  # several processes: one that is silent for so long is dead, and the others stop

    return c.lock()


def optimizer(name: str, learning_rate: float, warmup: int = 0, decay: bool = False, weight_decay: float = 0.0) -> Any:
    """An optimizer's fields."""
    c = ConfigDict()
    c.name = name  # adamw, or muon (for matrices; the rest gets adamw at a tenth of the rate)
    c.learning_rate = learning_rate  # the highest, after the warm-up
    c.warmup = warmup  # steps of linear warm-up
    c.decay = decay  # cosine decay to zero over the stage's steps; False: constant (resumable to more steps)
    c.weight_decay = weight_decay  # decoupled, times the learning rate (muon: of matrices only)
    c.b1, c.b2 = 0.9, 0.99  # Adam's moments
    c.max_grad_norm = 1.0  # gradients are scaled down to this global norm
    return c


def decoder() -> Any:
    """The fields of stage `decoder` on pictures with captions."""
    c = ConfigDict()
    c.steps = 10000  # updates of the stage
    c.batch_size = 64  # pairs a step, over all devices
    c.trainable = r"projector/.*"  # regex over projector/..., transformer/...; "": adapters alone
    c.lora = ConfigDict()
    c.lora.rank = 0  # of low-rank adapters of the decoder, trained beside `trainable`; 0: none
    c.lora.alpha = 32.0  # a kernel becomes kernel + (alpha / rank) a @ b
    c.lora.target = r"transformer/\w*block.*"  # regex as above: kernels that get an adapter
    c.latents = ""  # folder in which pictures are kept as the VAE's Gaussians, encoded once; "": encoded at every step
    c.max_tokens = 256  # of a caption, its end token included; longer ones are cut
    c.dropout = 0.1  # share of captions replaced by config.prompt.negative, for guidance
    c.level_mean = 0.0  # noise levels are sigmoid(mean + std n) ...
    c.level_std = 1.0  # (the std)
    c.shift = 0.0  # ... shifted by this; 0: as the weights' scheduler shifts images of this size
    c.ema = 0.999  # decay of the moving average of what is trained, which is what is written; 0: none is kept
    c.optimizer = optimizer("adamw", 1e-4, warmup=500)
    return c


def _validate_pairs(c: ConfigDict) -> None:
    d = c.decoder
    _require(
        "latents" in d, "decoder", d.to_dict(), "is a cold start's; take uae_jax.config.decoder(), as sd3_5_decoder.py"
    )
    _require(
        not d.latents or c.data.fit != "random_crop",
        "data.fit",
        c.data.fit,
        "config.decoder.latents keeps one crop each",
    )
    _check_kinds(d, decoder(), "decoder.")
    for field in ("steps", "batch_size", "max_tokens"):
        _require(d[field] >= 1, f"decoder.{field}", d[field], "must be at least 1")
    for field in ("dropout", "ema"):
        _require(0 <= d[field] < 1, f"decoder.{field}", d[field], "must lie from 0 to below 1")
    _require(bool(d.trainable) or d.lora.rank > 0, "decoder.trainable", d.trainable, "without adapters, nothing learns")
    _require(d.lora.rank >= 0, "decoder.lora.rank", d.lora.rank, "must not be negative; 0 trains without adapters")
    _require(d.lora.alpha > 0, "decoder.lora.alpha", d.lora.alpha, "must be above 0")
    for field in ("level_std", "shift"):
        _require(d[field] >= 0, f"decoder.{field}", d[field], "must not be negative")


def _require(condition: bool, field: str, value: Any, remedy: str) -> None:
    if not condition:
        raise UserError(f"config.{field} = {value!r}: {remedy}")


def _check_kinds(c: ConfigDict, like: ConfigDict, prefix: str = "") -> None:
    """Raises UserError for the first field of `like` that is missing in `c`, or of another type there."""
    for name, default_value in like.items():
        field = f"{prefix}{name}"
        if name not in c:
            raise UserError(f"config.{field} is missing: its default is {default_value!r}")
        kind = type(default_value)
        fits = {float: (float, int), tuple: (tuple, list)}.get(kind, kind)
        if not isinstance(c[name], fits) or (isinstance(c[name], bool) and kind is not bool):
            raise UserError(f"config.{field} = {c[name]!r}: must be of type {kind.__name__}")
        if kind is ConfigDict and field not in FREE:
            _check_kinds(c[name], default_value, f"{field}.")


def _is_number(value: Any) -> bool:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _field(c: ConfigDict, name: str) -> Any:
    """The value at a dotted name."""
    value: Any = c
    for part in name.split("."):
        value = value[part]
    return value


def _one_of(c: ConfigDict, field: str, *allowed: str) -> None:
    value = _field(c, field)
    _require(value in allowed, field, value, "use one of " + ", ".join(allowed))


def _validate_optimizer(c: ConfigDict, field: str) -> None:
    _check_kinds(_field(c, field), optimizer("adamw", 1e-4), f"{field}.")
    _one_of(c, f"{field}.name", "adamw", "muon")
    o = _field(c, field)
    _require(o.learning_rate >= 0, f"{field}.learning_rate", o.learning_rate, "must not be negative")
    _require(o.warmup >= 0, f"{field}.warmup", o.warmup, "must not be negative")
    _require(o.max_grad_norm > 0, f"{field}.max_grad_norm", o.max_grad_norm, "must be above 0")


def validate(c: ConfigDict) -> None:
    """Raises UserError for the first field whose value makes no sense."""
    _check_kinds(c, default())
    for stage in stages(c):
        _require(stage in STAGES, "stage", stage, "use one of " + ", ".join(STAGES))
    _one_of(c, "train", "encoder", "decoder", "both")
    _one_of(c, "condition_source", "text", "in_context")
    _one_of(c, "text_encoder", "frozen", "live")
    _one_of(c, "dtype", "float32", "bfloat16")
    _one_of(c, "remat", "full", "dots", "none")
    _one_of(c, "redraw.gather", "layer", "once")
    _one_of(c, "rl.normaliser", "constant", "sequence", "token")
    _one_of(c, "rl.truncated", "keep", "mask", "zero")
    _one_of(c, "rl.malformed", "keep", "group_min", "zero")
    _one_of(c, "redraw.spacing", "uniform", "diffusers")
    _one_of(c, "redraw.prediction", "velocity", "sample")
    _validate_data(c)
    rl = c.rl
    _require(rl.group_size >= 2, "rl.group_size", rl.group_size, "a group of one has no baseline; use 2 or more")
    _require(rl.temperature > 0, "rl.temperature", rl.temperature, "must be above 0")
    _require(0 < rl.clip_low < 1, "rl.clip_low", rl.clip_low, "must lie between 0 and 1")
    _require(rl.clip_high > 0, "rl.clip_high", rl.clip_high, "must be above 0")
    for field in ("top_k", "top_p"):
        _require(
            field not in rl, f"rl.{field}", rl.get(field), f"a rollout draws from all tokens; see config.eval.{field}"
        )
    _require(rl.beta >= 0, "rl.beta", rl.beta, "must not be negative")
    for field in ("max_tokens", "token_budget", "inner_epochs", "microbatches", "rollout_microbatches", "logit_chunk"):
        _require(rl[field] >= 1, f"rl.{field}", rl[field], "must be at least 1")
    for name, weight in rl.weights.items():
        _require(_is_number(weight) and weight >= 0, f"rl.weights.{name}", weight, "must be a number, not negative")
    for name, weight in c.reward.items():
        _require(_is_number(weight), f"reward.{name}", weight, "must be a number")
    _require(rl.advantage_eps >= 0, "rl.advantage_eps", rl.advantage_eps, "must not be negative")
    _require(c.lora.rank >= 0, "lora.rank", c.lora.rank, "must not be negative; 0 trains without adapters")
    _require(c.lora.alpha > 0, "lora.alpha", c.lora.alpha, "must be above 0")
    _require(c.steps >= 0, "steps", c.steps, "must not be negative")
    _require(c.stop_on_gap >= 0, "stop_on_gap", c.stop_on_gap, "must not be negative; 0 never stops")
    _require(c.redraw.steps >= 1, "redraw.steps", c.redraw.steps, "must be at least 1")
    _require(
        c.redraw.distilled_guidance >= 0,
        "redraw.distilled_guidance",
        c.redraw.distilled_guidance,
        "must not be negative",
    )
    _require(c.redraw.tile_vae >= 0, "redraw.tile_vae", c.redraw.tile_vae, "must not be negative; 0 decodes as a whole")
    _require(c.redraw.temperature >= 0, "redraw.temperature", c.redraw.temperature, "must not be negative")
    _require(c.redraw.shift > 0, "redraw.shift", c.redraw.shift, "must be above 0; 1 does not shift")
    _require(c.eval.every >= 0, "eval.every", c.eval.every, "must not be negative")
    _require(c.eval.temperature >= 0, "eval.temperature", c.eval.temperature, "must not be negative")
    _require(c.eval.top_k >= 0, "eval.top_k", c.eval.top_k, "must not be negative; 0 keeps all tokens")
    _require(0 < c.eval.top_p <= 1, "eval.top_p", c.eval.top_p, "must lie between 0 and 1; 1 keeps all tokens")
    _require(c.eval.batch_size >= 1, "eval.batch_size", c.eval.batch_size, "must be at least 1")
    _require(c.checkpoint.every >= 1, "checkpoint.every", c.checkpoint.every, "must be at least 1")
    _require(c.heartbeat_seconds >= 10, "heartbeat_seconds", c.heartbeat_seconds, "must be at least 10")
    _require(c.checkpoint.keep >= 1, "checkpoint.keep", c.checkpoint.keep, "must be at least 1")
    _require(c.checkpoint.keep_every >= 0, "checkpoint.keep_every", c.checkpoint.keep_every, "must not be negative")
    _one_of(c, "checkpoint.best_mode", "max", "min")
    _require(c.max_bad_steps >= 0, "max_bad_steps", c.max_bad_steps, "must not be negative; 0 never stops")
    _require(not c.resume or len(stages(c)) == 1, "resume", c.resume, "goes on with one stage: name it in config.stage")
    for field in ("optimizer", *(f"{stage}.optimizer" for stage in STAGES if "optimizer" in c.get(stage, {}))):
        _validate_optimizer(c, field)
    _require(bool(c.reward), "reward", dict(c.reward), 'name at least one, as {"clip": 1.0}')
    for field in ("microbatches", "rollout_microbatches"):
        _require(
            c.data.batch_size % rl[field] == 0,
            f"rl.{field}",
            rl[field],
            f"must divide config.data.batch_size = {c.data.batch_size}",
        )
    patterns = [("trainable", c.trainable), ("lora.target", c.lora.target)]
    if draws_pairs(c):
        patterns += [("decoder.trainable", c.decoder.trainable), ("decoder.lora.target", c.decoder.lora.target)]
    for field, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"config.{field} = {pattern!r} is no regular expression: {error}") from None


def added_since() -> dict[str, Any]:
    """The values of fields that an older version's configuration lacks: its runs did what are the defaults now."""
    return {name: value for name, value in default().to_dict().items() if name != "reward"}  # its fields are names


def _validate_data(c: ConfigDict) -> None:
    d = c.data
    _one_of(c, "data.source", "shapes", *PICTURE_SOURCES, "mixture")
    _one_of(c, "data.fit", "crop", "random_crop", "pad", "stretch")
    _one_of(c, "data.decoder", "pillow", "tfds")
    for field in ("batch_size", "image_size", "held_out", "max_objects", "max_bytes", "max_pixels"):
        _require(d[field] >= 1, f"data.{field}", d[field], "must be at least 1")
    _require(d.max_objects <= 4, "data.max_objects", d.max_objects, "captions hold at most 4")
    _require(0 <= d.max_bad_fraction <= 1, "data.max_bad_fraction", d.max_bad_fraction, "must lie from 0 to 1")
    _require(d.workers >= 0, "data.workers", d.workers, "must not be negative; 0 reads in threads")
    if d.source in PICTURE_SOURCES:
        _require(bool(d.path), "data.path", d.path, "name the folder with your images, the file, or the dataset")
    _require(
        (d.source == "mixture") == bool(d.mixture),
        "data.mixture",
        d.mixture.to_dict(),
        'goes with data.source = "mixture", as {"photos": {"source": "folder", "path": "PHOTOS", "weight": 1.0}}',
    )
    for name, part in d.mixture.items():
        where = f"data.mixture.{name}"
        fields = set(part) if isinstance(part, ConfigDict) else set()
        shown = part.to_dict() if isinstance(part, ConfigDict) else part
        _require(fields == {"source", "path", "weight"}, where, shown, "needs the fields source, path and weight")
        _one_of(c, f"{where}.source", *PICTURE_SOURCES)
        named = isinstance(part.path, str) and bool(part.path)
        _require(named, f"{where}.path", part.path, "name its folder, file or dataset")
        weighs = _is_number(part.weight) and part.weight > 0
        _require(weighs, f"{where}.weight", part.weight, "must be a number above 0")
    if d.source != "shapes":
        apart = stages(c) in (["rl"], ["decoder"])
        _require(apart, "data.source", d.source, "is read by config.stage rl, or decoder alone; the others need shapes")
        _require(
            apart and (c.stage.strip() == "rl" or "decoder" in c),
            "stage",
            c.stage,
            "needs the fields of uae_jax.config.decoder(), as configs/sd3_5_decoder.py",
        )
    if draws_pairs(c):
        _validate_pairs(c)


def draws_pairs(c: ConfigDict) -> bool:
    """Stage `decoder` learns from pictures with captions, not from shapes."""
    return stages(c) == ["decoder"] and "decoder" in c and c.data.source != "shapes"


def stages(c: ConfigDict) -> list[str]:
    """The stages that `config.stage` names, in order."""
    return [stage.strip() for stage in c.stage.split(",")]
