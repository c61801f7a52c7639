"""`reconstruct` with a captioner as transformers saves it: byte-level tokenizer, chat markup, greedy words of torch."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.parity.conftest import redraw
from uae_jax import checkpoint, reconstruct, system
from uae_jax.data import images
from uae_jax.data.text import retokenised
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.prompts import encode_chat
from uae_jax.printable import printable
from uae_jax.umm import caption

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# What Qwen2.5-VL's own template makes of a system prompt and of texts and images.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>Describe this image.<|im_end|>\n<|im_start|>assistant\n"
)
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
TOKENS = 9


def byte_level_tokenizer():
    """A few merges over bytes, then the special tokens and one that is added but not special, as the hub's is."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([PROMPT, "a small red circle above a large blue square"], trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(["<tool_call>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def qwen(weights, tmp_path_factory):
    """(workdir, torch's model, its tokenizer): a run's folder whose captioner transformers has written."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = byte_level_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "patch_size": 8,
            "window_size": 32, "fullatt_block_indexes": [1], "out_hidden_size": 128,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(model)
    for name in ("projector", "transformer", "clip", "clip_second"):
        shutil.copytree(weights / name, folder / "weights" / name)
    model.save_pretrained(folder / "weights" / "captioner")
    tokenizer.save_pretrained(folder / "weights" / "captioner")
    run = tiny.config(
        folder / "weights",
        data__source="folder",
        data__path=str(folder),
        prompt__caption=PROMPT,
        prompt__redraw_prefix="<|im_start|>user\n",
        prompt__redraw_suffix="<|im_end|>\n",
        rl__max_tokens=TOKENS,
    )
    checkpoint.write_config(folder, run.to_dict())
    return folder, model, tokenizer


def captions(printed, paths):
    """What was printed below each path."""
    return [re.search(rf"{re.escape(str(path))}\n  (.*?)\n  clip ", printed, re.DOTALL)[1] for path in paths]


def test_greedy_captions_are_those_of_transformers(qwen, tmp_path, capsys):
    folder, model, tokenizer = qwen
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, size in zip(paths, [(70, 50), (48, 48)], strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    reconstruct.reconstruct(folder, list(map(str, paths)), tmp_path / "out.png")
    found = captions(capsys.readouterr().out, paths)

    ids = encode_chat(tokenizer, MESSAGES)
    assert tokenizer.decode(ids) == PROMPT
    assert ids == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    image_token = model.config.image_token_id
    at = ids.index(image_token)
    expanded = torch.tensor([ids[:at] + [image_token] * 9 + ids[at + 1 :]])
    forbidden = [i for i in tokenizer.added_tokens_decoder if i != tokenizer.eos_token_id]
    forbidden += range(len(tokenizer), model.config.text_config.vocab_size)
    processor = processing.Qwen2VLImageProcessorPil(patch_size=8, size={"shortest_edge": 1, "longest_edge": 10**6})
    expected = []
    for path in paths:
        square = Image.fromarray(images.fit(images.load_image(path), 48))
        model.model.rope_deltas = None
        out = model.generate(
            input_ids=expanded,
            attention_mask=torch.ones_like(expanded),
            mm_token_type_ids=(expanded == image_token).int(),
            **processor(square, return_tensors="pt"),
            max_new_tokens=TOKENS,
            do_sample=False,
            suppress_tokens=forbidden,
        )
        expected.append(tokenizer.decode(out[0, expanded.shape[1] :], skip_special_tokens=True))
    assert found == [printable(text) for text in expected]
    assert expected[0] != expected[1] and len(expected[0]) > TOKENS / 2


def test_sampling_is_the_users(qwen, tmp_path, capsys):
    """Temperature draws by the seed; top-k of one takes the likeliest again; fewer tokens are fewer."""
    folder, _, _ = qwen
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)

    def run(*flags):
        reconstruct.main(["", f"--workdir={folder}", f"--out={tmp_path}/out.png", *flags, str(path)])
        return captions(capsys.readouterr().out, [path])[0]

    likeliest = run()
    assert run("--temperature=4", "--top_k=1", "--seed=3") == likeliest
    shorter = run("--temperature=4", "--top_p=1e-6", "--max_tokens=4")
    assert likeliest.startswith(shorter) and len(shorter) < len(likeliest)
    assert run("--temperature=4", "--seed=3") != likeliest
    with pytest.raises(UserError, match="top_p"):
        run("--top_p=2")


def test_a_chat_needs_a_template():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_chat(tokenizer, MESSAGES)


def test_no_added_token_is_sampled(qwen):
    """Image placeholders, markup, tool calls (not called special by the hub's tokenizer either), and unused ids."""
    folder, model, tokenizer = qwen
    size, end = model.config.text_config.vocab_size, tokenizer.eos_token_id
    allowed = caption.allowed_tokens(system.load_tokenizer(folder / "weights" / "captioner"), size, end)
    added = set(tokenizer.added_tokens_decoder)
    assert len(added) == 7 and allowed[end] and allowed.sum() == len(tokenizer) - 6
    assert not allowed[sorted(added - {end})].any() and not allowed[len(tokenizer) :].any()


def test_text_may_read_as_other_tokens(qwen):
    """Bytes that the tokenizer would have merged."""
    folder, _, _ = qwen
    tokenizer = system.load_tokenizer(folder / "weights" / "captioner")
    word, end = tokenizer.encode("red circle").ids, tokenizer.token_to_id("<|im_end|>")
    letters = [i for letter in "red circle" for i in tokenizer.encode(letter).ids]
    assert len(word) < len(letters) == 10
    ids, mask = np.full((3, 11), end), np.zeros((3, 11), bool)
    for row, tokens in enumerate((word, letters, [])):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens) + 1] = True
    assert retokenised(tokenizer, ids, mask, end).tolist() == [False, True, False]


def test_older_runs_keep_working(qwen, tmp_path):
    """A config.json from before a field existed gets its default; rewards are what the run named."""
    folder, _, _ = qwen
    saved = json.loads((folder / "config.json").read_text())
    del saved["lora"], saved["eval"]["top_k"]
    (tmp_path / "config.json").write_text(json.dumps(saved | {"reward": {"other": 1.0}}))
    config = reconstruct.load_config(tmp_path)
    assert config.lora.rank == 0 and config.eval.top_k == 0
    assert config.reward.to_dict() == {"other": 1.0} and config.rl.max_tokens == TOKENS
