"""The demo that `make demo` runs: fine-tune SmolLM2-135M with LoRA on tech-support answers."""

from __future__ import annotations

import os

# Read once, when huggingface_hub is first imported: set it before. Everything the demo needs is installed.
os.environ["HF_HUB_OFFLINE"] = "1"
