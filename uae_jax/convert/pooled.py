"""The pooled vector of an empty prompt, which conditions a decoder whose text towers are replaced by a captioner.

SD3's is CLIP-L's text embedding (768) and OpenCLIP bigG's (1280) one after the other, both with their projection;
FLUX's is CLIP-L's pooled state. It is a constant of the decoder, computed once at import, and lies beside the
transformer's weights as `pooled.safetensors`: one tensor, `pooled` [pooled_projection_dim], float32.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from uae_jax.convert import files, folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.clip.model import CLIPText
from uae_jax.storage import write_atomic

FILE = "pooled.safetensors"
NAME = "pooled"
# A pipeline's towers with their tokenizers, in the order in which their vectors stand, by the transformer's class.
TOWERS = {
    "SD3Transformer2DModel": (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")),
    "FluxTransformer2DModel": (("text_encoder", "tokenizer"),),
}


def read(path: Path, size: int) -> np.ndarray:
    """The vector float32 [size] of a file.

    Raises:
      UserError: there is no such file, or it holds another vector.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing: import the whole pipeline with its text encoders "
            "(python -m uae_jax.convert import PIPELINE_DIR WEIGHTS_DIR)"
        )
    headers = files.read_header(path)
    if {name: (x.dtype, x.shape) for name, x in headers.items()} != {NAME: ("F32", (size,))}:
        raise UserError(f"{path} must hold one tensor, {NAME!r}, float32 [{size}]: import the pipeline again")
    return np.array(files.map_tensors(headers)[NAME])


def write(path: Path, vector: np.ndarray) -> None:
    """Writes what `read` reads."""
    write_atomic(path, save({NAME: np.ascontiguousarray(vector, np.float32)}))


def of_empty_prompt(pipeline: Path, transformer: Any, kind: str) -> np.ndarray:
    """The pooled vector [pooled_projection_dim] of "" by the text towers of a pipeline's folder.

    Args:
      pipeline: a diffusers folder.
      transformer: its transformer's config.
      kind: that transformer's class.

    Raises:
      UserError: a tower or a tokenizer is missing, or they do not make up the vector that the transformer reads.
    """
    vectors = []
    for tower, tokenizer in TOWERS[kind]:
        model = folder.load_model(pipeline / tower)
        if not hasattr(model.config, "text"):
            raise UserError(f"{pipeline / tower} is not a CLIP text tower, whose pooled vector {kind} reads")
        tokens = empty_tokens(pipeline / tokenizer, model.config.text.max_position_embeddings)
        _, pooled = jax.jit(lambda p, t, m=model: apply(CLIPText(m.config), p, t))(model.params, tokens)
        vectors.append(np.asarray(pooled))
    vector = np.concatenate(vectors)
    if len(vector) != transformer.pooled_projection_dim:
        raise UserError(
            f"{pipeline}: the text encoders give a pooled vector of {len(vector)}, but the transformer reads "
            f"{transformer.pooled_projection_dim}"
        )
    return vector


def empty_tokens(tokenizer: Path, length: int) -> np.ndarray:
    """Ids int32 [length] of "" as CLIP's tokenizer writes it: start, end, padding.

    Raises:
      UserError: the folder is not a CLIP tokenizer's.
    """
    special = {}
    try:
        names = json.loads((tokenizer / "tokenizer_config.json").read_text())
        ids = _vocabulary(tokenizer)
        for key in ("bos_token", "eos_token", "pad_token"):
            name = names[key]
            special[key] = ids[name["content"] if isinstance(name, dict) else name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{tokenizer} is not the folder of a CLIP tokenizer ({error!r}): tokenizer_config.json, and vocab.json or "
            "tokenizer.json are needed"
        ) from None
    tokens = np.full(length, special["pad_token"], np.int32)
    tokens[:2] = special["bos_token"], special["eos_token"]
    return tokens


def _vocabulary(tokenizer: Path) -> dict[str, int]:
    """Ids of all tokens, in either of transformers' files."""
    if (tokenizer / "vocab.json").is_file():
        found = json.loads((tokenizer / "vocab.json").read_text())
        added = tokenizer / "added_tokens.json"
        return found | (json.loads(added.read_text()) if added.is_file() else {})
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    return raw["model"]["vocab"] | {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
