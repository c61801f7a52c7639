"""Unified-GRPO in JAX: image -> caption -> redrawn image -> cosine reward -> clipped-ratio update."""

__version__ = "0.1.0"
