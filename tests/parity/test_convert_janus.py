"""Janus folders through the converter, as transformers and as deepseek-ai lay them out."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.parity.janus import CODES, IMAGE, PATCH, SIDE, START, as_pixels, picture, tiny_janus
from uae_jax.convert import __main__ as command
from uae_jax.convert import folder, transfer
from uae_jax.convert.table import param_shape
from uae_jax.errors import UserError
from uae_jax.models.janus import original
from uae_jax.models.janus.config import TOKENS, Config, VisionConfig
from uae_jax.models.janus.model import Janus
from uae_jax.models.janus.vq import VQConfig

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
processing = pytest.importorskip("transformers.models.janus.image_processing_pil_janus")

TOLERANCE = 1e-4
# What the tiny model is in deepseek-ai's config.json.
TOWER = VisionConfig(32, 3, 2, image_size=SIDE, patch_size=PATCH, mlp_ratio=3.0, layer_norm_eps=1e-3)
BOOK = VQConfig(8, CODES, 16, base_channels=32, channel_multiplier=(1, 1, 2, 2), num_res_blocks=1)
WIDTH = 48


@pytest.fixture(scope="module")
def reference():
    return tiny_janus()


@pytest.fixture(scope="module")
def hub(reference, tmp_path_factory):
    """The folder with tokenizer, image processor and generation config, by transformers."""
    target = tmp_path_factory.mktemp("hub") / "janus"
    reference.save_pretrained(target)
    names = [name for name, _ in TOKENS.values()]
    vocabulary = {word: i for i, word in enumerate([*(f"w{i}" for i in range(50)), *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(names)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}")
    fast.save_pretrained(target)
    processing.JanusImageProcessorPil().save_pretrained(target)
    return target


def pairs():
    """(name in transformers, original name) of every tensor but the tower's query, key and value, written out."""
    yield "lm_head.weight", "language_model.lm_head.weight"
    ends = ["embed_tokens", "norm"]
    for i in range(3):
        ends += [f"layers.{i}.{part}" for part in ("input_layernorm", "post_attention_layernorm")]
        ends += [f"layers.{i}.self_attn.{part}_proj" for part in "qkvo"]
        ends += [f"layers.{i}.mlp.{part}_proj" for part in ("gate", "up", "down")]
    yield from ((f"model.language_model.{end}.weight", f"language_model.model.{end}.weight") for end in ends)

    hub, deepseek = "model.vision_model", "vision_model.vision_tower"
    yield f"{hub}.embeddings.position_embedding.weight", f"{deepseek}.pos_embed"
    yield "model.generation_embeddings.weight", "gen_embed.weight"
    yield "model.vqmodel.quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"
    both = [
        (f"{hub}.embeddings.patch_embedding", f"{deepseek}.patch_embed.proj"),
        (f"{hub}.post_layernorm", f"{deepseek}.norm"),
        ("model.aligner.fc1", "aligner.layers.0"),
        ("model.aligner.hidden_layers.0", "aligner.layers.2"),
        ("model.generation_aligner.fc1", "gen_aligner.layers.0"),
        ("model.generation_aligner.hidden_layers.0", "gen_aligner.layers.2"),
        ("model.generation_head.proj_out", "gen_head.output_mlp_projector"),
        ("model.generation_head.vision_head", "gen_head.vision_head"),
    ]
    for i in range(3):
        hub_names = ("self_attn.projection_layer", "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
        for theirs, ours in zip(hub_names, ("attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"), strict=True):
            both.append((f"{hub}.encoder.layers.{i}.{theirs}", f"{deepseek}.blocks.{i}.{ours}"))
    book = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    resnet, attention = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    for half, level, sample, blocks in (("encoder", "down", "downsample", 1), ("decoder", "up", "upsample", 2)):
        book += [(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "norm_out", "conv_out")]
        for theirs, ours, parts in (("block_1", 0, resnet), ("attn_1", 1, attention), ("block_2", 2, resnet)):
            book += [(f"{half}.mid.{theirs}.{part}", f"{half}.mid.{ours}.{part}") for part in parts]
        widths = [32, 32, 32, 64, 64] if half == "encoder" else [64, 64, 64, 32, 32]
        for i in range(4):
            theirs, ours = f"{half}.{level}.{i}", f"{half}.conv_blocks.{i}"
            if i < 3:
                book.append((f"{theirs}.{sample}.conv", f"{ours}.{sample}.conv"))
            for j in range(blocks):
                parts = [*resnet, "nin_shortcut"] if j == 0 and widths[i] != widths[i + 1] else resnet
                book += [(f"{theirs}.block.{j}.{part}", f"{ours}.res.{j}.{part}") for part in parts]
                if i == (3 if half == "encoder" else 0):
                    book += [(f"{theirs}.attn.{j}.{part}", f"{ours}.attn.{j}.{part}") for part in attention]
    both += [(f"model.vqmodel.{theirs}", f"gen_vision_model.{ours}") for theirs, ours in book]
    yield from ((f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in both for leaf in ("weight", "bias"))


def deepseek_tensors(tensors):
    """The model's tensors as deepseek-ai saves them, with what it saves besides and never runs."""
    left, found = dict(tensors), {}
    for theirs, ours in pairs():
        found[ours] = left.pop(theirs)
    found["vision_model.vision_tower.pos_embed"] = found["vision_model.vision_tower.pos_embed"][None]
    for i in range(3):
        for leaf in ("weight", "bias"):
            names = [f"model.vision_model.encoder.layers.{i}.self_attn.{part}_proj.{leaf}" for part in "qkv"]
            found[f"vision_model.vision_tower.blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(
                [left.pop(n) for n in names]
            )
    assert not left, left.keys()
    rng = np.random.default_rng(0)
    pool = {"latent": (1, 1, 32), "kv.weight": (64, 32), "kv.bias": (64,), "mlp.fc1.weight": (96, 32)}
    for name, shape in pool.items():
        found[f"vision_model.vision_tower.attn_pool.{name}"] = rng.standard_normal(shape).astype(np.float32)
    return found | {"gen_vision_model.quantize.codebook_used": rng.standard_normal(65536).astype(np.float32)}


def deepseek_config():
    """deepseek-ai's config.json, whose tower and tokenizer are names."""

    def part(kind, cls, **params):
        return {"cls": cls, "model_type": kind, "params": params}

    projector = {"depth": 2, "n_embed": WIDTH, "projector_type": "mlp_gelu"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "aligner_config": part("aligner", "MlpProjector", input_dim=32, **projector),
        "gen_aligner_config": part("gen_aligner", "MlpProjector", input_dim=8, **projector),
        "gen_head_config": part(
            "gen_head", "vision_head", image_token_embed=WIDTH, image_token_size=CODES, n_embed=WIDTH
        ),
        "gen_vision_config": part("gen_vision", "VQ-tiny", image_token_size=CODES, n_embed=8),
        "vision_config": part(
            "vision",
            "CLIPVisionTower",
            image_size=SIDE,
            model_name="siglip_tiny",
            select_feature="same",
            select_layer=-1,
        ),
        "language_config": {
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 56,
            "max_position_embeddings": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e3,
            "vocab_size": 64,
        },
    }


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.setitem(original.TOWERS, "siglip_tiny", TOWER)
    monkeypatch.setitem(original.TOKENIZERS, "VQ-tiny", BOOK)


@pytest.fixture
def deepseek(hub, tmp_path, sizes):
    """The same model in deepseek-ai's layout, with files beside it."""
    source = tmp_path / "deepseek"
    source.mkdir()
    save_file(deepseek_tensors(load_file(hub / "model.safetensors")), source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(deepseek_config()))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (source / name).write_bytes((hub / name).read_bytes())
    return source


def same_files(a, b):
    """Every tensor to the bit, every other file to the byte."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert x.keys() == y.keys()
    assert all(x[name].dtype == y[name].dtype and x[name].tobytes() == y[name].tobytes() for name in x)
    names = {path.name for path in a.iterdir()} - {"model.safetensors"}
    assert names == {path.name for path in b.iterdir()} - {"model.safetensors"}
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def through(source, scratch):
    """The folder after an import and an export by the commands."""
    command.main(["convert", "import", str(source), str(scratch / "imported")])
    command.main(["convert", "export", str(scratch / "imported"), str(scratch / "exported")])
    return scratch / "exported"


def test_transformers_layout(hub, reference, tmp_path):
    """What goes out is what came in, and transformers loads it; our logits are its."""
    exported = through(hub, tmp_path)
    same_files(hub, exported)
    model, report = transformers.JanusForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in reference.state_dict().items())

    found = folder.load_model(exported)
    tokens = np.array([[4, START, *[IMAGE] * 16, 3, 9]])
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.from_numpy(tokens), pixel_values=as_pixels(picture(0))).logits
    logits, *_ = jax.jit(Janus(found.config).apply)({"params": found.params}, picture(0), tokens)
    assert np.abs(logits - expected.numpy()).max() < TOLERANCE


def test_deepseek_layout(hub, deepseek, tmp_path):
    """The same parameters as from transformers' layout, and the folder out as it came, to the bit."""
    same_files(deepseek, through(deepseek, tmp_path))
    ours, theirs = folder.load_model(hub), folder.load_model(deepseek)
    assert theirs.config.vq == ours.config.vq and theirs.config.vision == ours.config.vision
    assert theirs.config.text == ours.config.text
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    for x, y in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        assert np.array_equal(x, y)


def test_what_was_trained_goes_back(hub, deepseek, tmp_path):
    """Changed parameters, the fused ones among them, land in both layouts where a load finds them."""
    rng = np.random.default_rng(1)
    paths = ("visual/layers/qkv/kernel", "visual/layers/qkv/bias", "visual/position_embedding", "gen_embed/embedding")
    for source in (hub, deepseek):
        shapes = {entry.path: param_shape(entry) for entry in folder.open_model(source).table if entry.path in paths}
        values = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        transfer.copy_model(source, tmp_path / f"{source.name}_out", transfer.Trained(shapes, values.__getitem__, 1.0))
        found = folder.load_model(tmp_path / f"{source.name}_out").params
        before = folder.load_model(source).params
        assert np.array_equal(found["visual"]["layers"]["qkv"]["kernel"], values["visual/layers/qkv/kernel"])
        assert np.array_equal(found["visual"]["layers"]["qkv"]["bias"], values["visual/layers/qkv/bias"])
        assert np.array_equal(found["visual"]["position_embedding"], values["visual/position_embedding"])
        assert np.array_equal(found["gen_embed"]["embedding"], values["gen_embed/embedding"])
        assert np.array_equal(found["language"]["norm"]["scale"], before["language"]["norm"]["scale"])


def test_adapters_go_out_as_peft(hub, deepseek, reference, tmp_path):
    """Under the names of transformers' modules; a layer that is three here and one there is refused."""
    rng = np.random.default_rng(2)
    where = "language/layers/self_attn/q_proj"
    leaves = {
        f"{where}/{name}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("lora_a", (3, 48, 2)), ("lora_b", (3, 2, 48)))
    }
    shapes = {path: x.shape for path, x in leaves.items()}
    transfer.export_adapter(hub, tmp_path / "peft", transfer.Trained(shapes, leaves.__getitem__, 4.0))
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    modules = dict(reference.named_modules())
    for i in range(3):
        name = f"model.language_model.layers.{i}.self_attn.q_proj"
        assert name in modules
        pair = [found.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB"]
        assert np.array_equal(pair[0], leaves[f"{where}/lora_a"][i].T)
        assert np.array_equal(pair[1], leaves[f"{where}/lora_b"][i].T)
    assert not found

    fused = {"visual/layers/qkv/lora_a": (3, 3, 32, 2), "visual/layers/qkv/lora_b": (3, 3, 2, 32)}
    trained = transfer.Trained(fused, lambda path: np.ones(fused[path], np.float32), 4.0)
    transfer.export_adapter(hub, tmp_path / "three", trained)
    with pytest.raises(UserError, match=r"attn.qkv is one layer in .*, with adapters of its parts"):
        transfer.export_adapter(deepseek, tmp_path / "one", trained)
    transfer.copy_model(deepseek, tmp_path / "merged", trained)
    models = (folder.load_model(where).params["visual"]["layers"] for where in (tmp_path / "merged", deepseek))
    after, before = (layers["qkv"]["kernel"] for layers in models)
    assert np.abs(after - before - 4.0).max() < 1e-5  # alpha / r times the sum over r of 1


def test_pickles_are_turned_by_the_command_that_is_named(deepseek, tmp_path):
    """A folder of .bin alone is refused; the command in the message makes it one that loads."""
    tensors = {name: torch.from_numpy(x) for name, x in load_file(deepseek / "model.safetensors").items()}
    names = sorted(tensors)
    (deepseek / "model.safetensors").rename(tmp_path / "before.safetensors")
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save({name: tensors[name] for name in part}, deepseek / f"pytorch_model-0000{i + 1}-of-00002.bin")
    with pytest.raises(UserError, match="pickles only") as caught:
        folder.open_model(deepseek)
    assert "\n" not in str(caught.value)
    code = re.search(r'python -c "(.*)"$', str(caught.value))[1]
    subprocess.run([sys.executable, "-c", code], check=True)
    folder.open_model(deepseek)
    after, before = load_file(deepseek / "model.safetensors"), load_file(tmp_path / "before.safetensors")
    assert after.keys() == before.keys() and all(np.array_equal(after[name], before[name]) for name in before)


def test_tokens_are_the_tokenizers(hub):
    """The ids of special tokens are those of tokenizer.json, not Janus-Pro's."""
    config = folder.open_model(hub).config
    assert config.boi_token_id == 100016
    found = config.with_tokens(Tokenizer.from_file(str(hub / "tokenizer.json")).token_to_id)
    assert [getattr(found, name) for name in TOKENS] == [50, 51, 52, 53, 54, 55]
    assert config.with_tokens(lambda name: None) == config


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD = {
    "missing": "missing: language_model.model.norm.weight (48,)",
    "shape": "shape of vision_model.vision_tower.blocks.1.attn.qkv.weight: expected (96, 32), found (96, 31)",
    "unexpected": "unexpected: vision_model.vision_tower.head.weight (3,)",
    "tower": "vision_config.params.model_name = 'siglip_so400m_patch14_384' is not supported",
    "tokenizer": "gen_vision_config.cls, where VQ-16 or VQ-tiny is wanted, = 'VQ-8' is not supported",
    "width": "gen_head_config.params.n_embed, where 48 is wanted, = 47 is not supported",
    "flow": "model_type is 'janusflow'",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input(deepseek, tmp_path, how):
    tensors, config = load_file(deepseek / "model.safetensors"), deepseek_config()
    if how == "missing":
        del tensors["language_model.model.norm.weight"]
    elif how == "shape":
        name = "vision_model.vision_tower.blocks.1.attn.qkv.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :-1])
    elif how == "unexpected":
        tensors["vision_model.vision_tower.head.weight"] = np.zeros(3, np.float32)
    elif how == "tower":
        config["vision_config"]["params"]["model_name"] = "siglip_so400m_patch14_384"
    elif how == "tokenizer":
        config["gen_vision_config"]["cls"] = "VQ-8"
    elif how == "width":
        config["gen_head_config"]["params"]["n_embed"] = 47
    elif how == "flow":
        config["model_type"] = "janusflow"
    save_file(tensors, deepseek / "model.safetensors", {"format": "pt"})
    (deepseek / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(BAD[how])) as caught:
        command.main(["convert", "import", str(deepseek), str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl', expected 'janus'"),
        ({"vq_config": None}, "vq_config is missing"),
        ({"text_config": {"attention_bias": True}}, "text_config.attention_bias = True"),
        ({"text_config": {"rope_parameters": {"rope_type": "llama3"}}}, "text_config.rope type = 'llama3'"),
        ({"text_config": {"head_dim": 16}}, "text_config.head_dim = 16"),
        ({"text_config": {"vocab_size": None}}, "text_config.vocab_size is missing"),
        ({"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm = True"),
        ({"vision_config": {"hidden_act": "gelu_pytorch_tanh"}}, "vision_config.hidden_act = 'gelu_pytorch_tanh'"),
        (
            {"vision_config": {"projection_dim": 32}},
            "vision_config.projection_dim, with a text_config.hidden_size",
        ),
        (
            {"vq_config": {"image_token_embed_dim": 32}},
            "vq_config.image_token_embed_dim, with a text_config",
        ),
    ],
)
def test_bad_config(hub, change, message):
    values = json.loads((hub / "config.json").read_text())
    for name, value in change.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=re.escape(message)):
        Config.from_hf(values)
