"""Captions a picture and redraws it from the caption: python run.py PICTURE [OUT.png]

Needs torch, transformers, diffusers and pillow; reads the folders beside it (see README.md).
"""

# mypy: ignore-errors
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TRANSFORMERS = {"SD3Transformer2DModel": SD3Transformer2DModel, "FluxTransformer2DModel": FluxTransformer2DModel}


class UMM:
    def __init__(self, folder, device="cpu", dtype=torch.float32):
        folder = Path(folder)
        self.settings = json.loads((folder / "umm.json").read_text())
        self.device, self.dtype = device, dtype

        def load(cls, path):
            return cls.from_pretrained(folder / path, torch_dtype=dtype).to(device).eval()

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
        self.encoder = load(Qwen2_5_VLForConditionalGeneration, "encoder")
        separate = self.settings["text_encoder"] != "encoder"
        self.reader = load(Qwen2_5_VLForConditionalGeneration, "text_encoder") if separate else self.encoder
        self.transformer = load(TRANSFORMERS[self.settings["transformer"]], "decoder/transformer")
        self.vae = load(AutoencoderKL, "decoder/vae")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "decoder/scheduler")
        self.pooled = load_file(folder / "decoder/transformer/pooled.safetensors")["pooled"].to(device, dtype)[None]
        g = load_file(folder / "projector/model.safetensors")
        activation = torch.nn.GELU() if self.settings["activation"] == "gelu" else torch.nn.SiLU()
        layers = [torch.nn.Linear(*g[f"{i}.weight"].shape[::-1]) for i in (0, 2)]
        self.projector = torch.nn.Sequential(layers[0], activation, layers[1])
        self.projector.load_state_dict(g)
        self.projector.to(device, dtype)

    def square(self, picture):
        """A picture's middle, as an RGB square of the size that the model was trained on."""
        size, side = self.settings["image_size"], min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        return picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)

    @torch.no_grad()
    def caption(self, picture):
        """The most likely caption of a PIL image."""
        vision = self.encoder.config.vision_config
        p, t, m = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        x = torch.from_numpy(np.asarray(self.square(picture), np.float32) / 255)
        x = (x - torch.tensor(MEAN)) / torch.tensor(STD)
        n = x.shape[0] // p
        # rows of patches in blocks of m x m, which the model merges; a still is a film of t equal frames
        x = x.reshape(n // m, m, p, n // m, m, p, 3).permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
        patches = x.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(n * n, -1)
        pad = self.encoder.config.image_token_id
        ids = self.tokenizer.encode(self.settings["prompt"]["caption"], add_special_tokens=False)
        at = ids.index(pad)
        ids = torch.tensor([ids[:at] + [pad] * (n // m) ** 2 + ids[at + 1 :]], device=self.device)
        end = self.encoder.config.get_text_config().eos_token_id
        size = self.encoder.config.get_text_config().vocab_size
        never = {*self.tokenizer.added_tokens_decoder, *range(len(self.tokenizer), size)} - {end}
        out = self.encoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == pad).int(),
            pixel_values=patches.to(self.device, self.dtype),
            image_grid_thw=torch.tensor([[1, n, n]], device=self.device),
            max_new_tokens=self.settings["max_tokens"],
            do_sample=False,
            suppress_tokens=sorted(never),
        )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def condition(self, text):
        """What the decoder sees of a text: [1, t, d]."""
        prompt, end = self.settings["prompt"], self.encoder.config.get_text_config().eos_token_id
        around = [
            self.tokenizer.encode(prompt[k], add_special_tokens=False) for k in ("redraw_prefix", "redraw_suffix")
        ]
        words = self.tokenizer.encode(text, add_special_tokens=False)
        longest = sum(map(len, around)) + self.settings["max_tokens"]
        ids = (around[0] + words + around[1])[:longest]
        mask = [1] * len(ids)
        if not self.settings["mask_text"]:  # the decoder was trained to see padding too
            mask += [0] * (longest - len(ids))
            ids = ids + [end] * (longest - len(ids))
        ids, mask = (torch.tensor([x], device=self.device) for x in (ids, mask))
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        states = self.reader.model.language_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self.projector(states)

    @torch.no_grad()
    def draw(self, text, noise=None, seed=0):
        """A picture of a text: [height, width, 3] in 0..1. `noise` [1, c, h, w] replaces what `seed` draws."""
        redraw, size = self.settings["redraw"], self.settings["image_size"]
        flux = isinstance(self.transformer, FluxTransformer2DModel)
        vae = self.vae.config
        side = size // 2 ** (len(vae.block_out_channels) - 1)
        shape = (1, vae.latent_channels, side, side)
        x = noise if noise is not None else torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        x = x.to(self.device, torch.float32)
        branches = [self.condition(text)]
        if redraw["guidance"] != 1:
            branches.append(self.condition(self.settings["prompt"]["negative"]))

        shift, n = self.scheduler.config, redraw["steps"]
        arguments = (
            {"sigmas": np.linspace(1.0, 1 / n, n)} if redraw["spacing"] == "uniform" else {"num_inference_steps": n}
        )
        if shift.use_dynamic_shifting:
            slope = (shift.max_shift - shift.base_shift) / (shift.max_image_seq_len - shift.base_image_seq_len)
            patch = 2 if flux else self.transformer.config.patch_size
            arguments["mu"] = shift.base_shift + slope * ((side // patch) ** 2 - shift.base_image_seq_len)
        self.scheduler.set_timesteps(device=self.device, **arguments)

        def velocity(x, t, states):
            x, t = x.to(self.dtype), t.expand(1)
            if not flux:
                return self.transformer(x, states, self.pooled, t, return_dict=False)[0].float()
            packed = FluxPipeline._pack_latents(x, 1, x.shape[1], side, side)
            told = redraw["distilled_guidance"] if self.transformer.config.guidance_embeds else None
            out = self.transformer(
                packed, states, self.pooled, t / 1000,
                FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, self.device, self.dtype),
                torch.zeros(states.shape[1], 3, device=self.device, dtype=self.dtype),
                None if told is None else torch.full((1,), told, device=self.device),
                return_dict=False,
            )[0].float()  # fmt: skip
            out = out.reshape(1, side // 2, side // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
            return out.reshape(x.shape)

        for t in self.scheduler.timesteps:
            predictions = [velocity(x, t, states) for states in branches]
            v = predictions[-1] + redraw["guidance"] * (predictions[0] - predictions[-1])
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        pixels = self.vae.decode((x / vae.scaling_factor + (vae.shift_factor or 0)).to(self.dtype)).sample
        return (pixels[0].float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu()


if __name__ == "__main__":
    model = UMM(Path(__file__).parent, *(("cuda", torch.bfloat16) if torch.cuda.is_available() else ()))
    words = model.caption(Image.open(sys.argv[1]))
    print(words)
    drawn = (model.draw(words).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(drawn).save(sys.argv[2] if len(sys.argv) > 2 else "redrawn.png")
