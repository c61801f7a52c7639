"""One folder an architecture: `model.py` (linen modules) and `weights.py` (the Hugging Face name table)."""
