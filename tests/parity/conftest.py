"""Parity tests compare with torch, transformers and diffusers: the extra `parity`."""

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")


def redraw(model) -> None:
    """Re-draws every parameter of a torch module in place, seeded by its name.

    Nothing then hides behind ones and zeros: norm scales are 1 + .2 n, one-dimensional biases .2 n, matrices scaled by
    their fan-in.
    """
    with torch.no_grad():
        for name, p in model.named_parameters():
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
            draw = rng.standard_normal(tuple(p.shape))
            if p.ndim >= 2:
                draw *= 1.5 / np.sqrt(np.prod(p.shape[1:]))
            else:
                draw = draw * 0.2 + (1.0 if name.endswith("weight") else 0.0)
            p.copy_(torch.from_numpy(np.asarray(draw)).to(p.dtype))


def tensors(model) -> dict[str, np.ndarray]:
    """The module's state dict as NumPy arrays."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}
