"""Library versions, and a true float64 mode for the reference models.

transformers computes norms, softmax and rotary angles in float32 whatever the model's dtype. To know how far
float32 itself is from the truth, `float64_mode` makes the modelling files see float64 where they say float32.
"""

import contextlib
import platform

import numpy
import peft
import PIL
import safetensors
import tokenizers
import torch
import transformers
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

MODELLING = (modeling_clip, modeling_llama, modeling_mistral, modeling_qwen2)


def library_versions():
    """What the numbers were made with, for expected.json."""
    modules = (torch, transformers, peft, tokenizers, safetensors, numpy)
    versions = {module.__name__: str(module.__version__) for module in modules}
    return {"python": platform.python_version(), **versions, "pillow": PIL.__version__}


class _DoubleTorch:
    """The torch module with float32 replaced by float64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def float64_mode(enabled=True):
    """Build and run models inside this context; with `enabled` false it does nothing."""
    if not enabled:
        yield
        return
    try:
        for module in MODELLING:
            module.torch = _DoubleTorch()
        yield
    finally:
        for module in MODELLING:
            module.torch = torch
