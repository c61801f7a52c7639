"""A Qwen2.5-VL folder through the converter: transformers loads what comes out, and computes what we do."""

import json
import re
import shutil

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.parity.conftest import redraw
from uae_jax.convert import __main__ as command
from uae_jax.convert import folder, lora, transfer
from uae_jax.convert.table import param_shape
from uae_jax.models.qwen2_5_vl.inputs import layout, patchify, rope_positions
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.weights import canonical, module_name

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

TOLERANCE = 1e-4
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def hub_folder(target, tied):
    """A random tiny model with tokenizer, image processor, chat template and generation config, by transformers."""
    text = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "num_heads": 2, "window_size": 16, "fullatt_block_indexes": [1, 3]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            text,
            vocab_size=32,
            intermediate_size=28,
            rms_norm_eps=1e-6,
            rope_parameters=rope,
            bos_token_id=0,
            eos_token_id=WORDS.index("<|im_end|>"),
            pad_token_id=0,
        ),
        vision_config=dict(vision, depth=4, intermediate_size=44, patch_size=4, out_hidden_size=24),
        image_token_id=WORDS.index("<|image_pad|>"),
        video_token_id=31,
        vision_start_token_id=WORDS.index("<|vision_start|>"),
        vision_end_token_id=WORDS.index("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(model)
    model.save_pretrained(target)
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"w{i}" for i in range(20))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(target)
    processing.Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096).save_pretrained(target)
    return target


@pytest.fixture(scope="module", params=["tied", "untied"])
def original(request, tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / request.param, request.param == "tied")


def load(path, dtype=torch.float32):
    """transformers' model of a folder; nothing may be missing, left over or made up."""
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    return model.eval()


def state(model):
    return {name: x.detach() for name, x in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


PICTURE = np.random.default_rng(0).standard_normal((16, 24, 3)).astype(np.float32)


def prompt(config):
    return np.array(
        [1, config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id, 8, 9, 7]
    )


def ours(path):
    """Logits [t, v] of a folder by our model."""
    found = folder.load_model(path)
    config, tokens = found.config, prompt(found.config)
    positions, _ = rope_positions(tokens, [(4, 6)], config)
    mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
    arguments = (patchify(PICTURE, config.vision), layout(16, 24, config.vision)[0], tokens, positions, mask)
    return np.asarray(Qwen2_5_VL(config).apply({"params": found.params}, *arguments))


def theirs(path, model=None):
    """The same by transformers."""
    config = folder.open_model(path).config
    _, source = layout(16, 24, config.vision)
    patches = patchify(PICTURE, config.vision)
    flat = np.empty(((source >= 0).sum(), patches.shape[-1]), np.float32)
    flat[source[source >= 0]] = patches[source >= 0]
    tokens = torch.from_numpy(prompt(config))[None]
    with torch.no_grad():
        return (
            (model or load(path))(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                pixel_values=torch.from_numpy(flat),
                image_grid_thw=torch.tensor([[1, 4, 6]]),
                mm_token_type_ids=(tokens == config.image_token_id).int(),
            )
            .logits[0]
            .numpy()
        )


# ---- as it came ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    """The folder after an import and an export by the commands."""
    scratch = tmp_path_factory.mktemp("exported")
    command.main(["convert", "import", str(original), str(scratch / "imported")])
    command.main(["convert", "export", str(scratch / "imported"), str(scratch / "out")])
    return scratch / "out"


def test_weights_come_back(original, exported):
    assert equal(state(load(original)), state(load(exported)))
    before, after = (load_file(path / "model.safetensors") for path in (original, exported))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_tokenizer_and_processor_load_as_they_stand(original, exported):
    messages = [{"role": "user", "content": "w3 <|image_pad|> w7"}]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    found = []
    for path in (original, exported):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        processor = transformers.AutoImageProcessor.from_pretrained(path)
        pixels = processor(images=[image], return_tensors="np")
        generation = transformers.GenerationConfig.from_pretrained(path).to_dict()
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        found.append((ids, pixels["pixel_values"].tobytes(), pixels["image_grid_thw"].tolist(), generation))
    assert found[0] == found[1]
    assert found[0][0] == [1, 9, 5, 13, 2]


def test_shards(original, tmp_path):
    transfer.copy_model(original, tmp_path / "out", shard_bytes=20000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert equal(state(load(original)), state(load(tmp_path / "out")))
    assert np.array_equal(ours(tmp_path / "out"), ours(original))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(original, tmp_path, dtype):
    """Sharded by transformers, in half precision: the same bits, and the same numbers once widened."""
    half = load(original).to(dtype)
    half.save_pretrained(tmp_path / "half", max_shard_size="20KB")
    assert (tmp_path / "half" / "model.safetensors.index.json").exists()
    transfer.copy_model(tmp_path / "half", tmp_path / "out")
    assert equal(state(half), state(load(tmp_path / "out", dtype)))
    assert np.abs(ours(tmp_path / "out") - theirs(tmp_path / "out")).max() < TOLERANCE


@pytest.mark.parametrize("rename", [canonical, module_name])
def test_key_layouts(original, tmp_path, rename):
    """Both layouts are read here and there, and the export has that of the import."""
    source = shutil.copytree(original, tmp_path / "source")
    tensors = {rename(canonical(name)): x for name, x in load_file(source / "model.safetensors").items()}
    assert any(name.startswith("model.language_model.") for name in tensors) == (rename is module_name)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    transfer.copy_model(source, tmp_path / "imported")
    transfer.copy_model(tmp_path / "imported", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert equal(state(load(tmp_path / "out")), state(load(original)))
    assert np.array_equal(ours(tmp_path / "out"), ours(original))


def test_a_fresh_export_loads(original, tmp_path):
    """Without any import: our config, the hub's names."""
    found = folder.load_model(original)
    folder.save_model(tmp_path / "fresh", found.config, found.params)
    transfer.copy_model(tmp_path / "fresh", tmp_path / "out")
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")} <= {
        "model",
        "visual",
        "lm_head",
    }
    assert equal(state(load(tmp_path / "out")), state(load(original)))


# ---- trained ---------------------------------------------------------------------------------------------------------


def adapters(path, rank=3):
    """Random adapters of every linear layer of the language model, and of the vision tower's projections."""
    rng, found = np.random.default_rng(4), {}
    for entry in folder.open_model(path).table:
        if re.fullmatch(r"language/layers/.*/kernel|visual/blocks/.*/attn/proj/kernel", entry.path):
            shapes = lora.shapes(param_shape(entry), rank)
            for name, shape in zip(lora.paths(entry.path), shapes, strict=True):
                found[name] = (0.2 * rng.standard_normal(shape)).astype(np.float32)
    return found


def trained(found, alpha=6.0):
    return transfer.Trained({name: x.shape for name, x in found.items()}, found.__getitem__, alpha)


def test_trained_weights_compute_the_same_there(original, tmp_path):
    """Our model with changed parameters, and transformers' with what was exported."""
    before = folder.load_model(original)
    flat = traverse_util.flatten_dict(before.params, sep="/")
    changes = {path: x * 1.3 for path, x in flat.items() if path.startswith("language/")}
    transfer.copy_model(original, tmp_path / "out", trained(changes))
    config, tokens = before.config, prompt(before.config)
    params = traverse_util.unflatten_dict(flat | changes, sep="/")
    positions, _ = rope_positions(tokens, [(4, 6)], config)
    mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
    arguments = (patchify(PICTURE, config.vision), layout(16, 24, config.vision)[0], tokens, positions, mask)
    expected = np.asarray(Qwen2_5_VL(config).apply({"params": params}, *arguments))
    found = theirs(tmp_path / "out")
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(found - theirs(original)).max() > 0.1


def test_merged_adapters(original, tmp_path):
    transfer.copy_model(original, tmp_path / "out", trained(adapters(original)))
    found = theirs(tmp_path / "out")
    assert np.abs(found - ours(tmp_path / "out")).max() < TOLERANCE
    assert np.abs(found - theirs(original)).max() > 0.1


def test_peft_loads_adapters(original, tmp_path):
    """Where peft is installed: on top of the original, they are the merged model."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    changes = trained(adapters(original))
    transfer.export_adapter(original, tmp_path / "adapter", changes)
    transfer.copy_model(original, tmp_path / "merged", changes)
    model = peft.PeftModel.from_pretrained(load(original), tmp_path / "adapter").eval()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 2 * len(
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    )
    assert np.abs(theirs(original, model) - theirs(tmp_path / "merged")).max() < TOLERANCE
