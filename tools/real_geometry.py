#!/usr/bin/env python3
"""Writes tests/golden/real_geometry.json: one 7B decoder layer and a whole CLIP ViT-L/14-336, in figures.

    python tools/real_geometry.py [--out FILE] [--threads N]

Weights and inputs follow golden/hash_rule.py, so neither side stores them. Tensor number t is the index of the
tensor's name in the byte-wise sorted list of names; u is the rule's value for (t, element), in float64, and the
result is rounded to float32 once:

    norm gains (1-D `.weight`)                      1 + 0.1 u
    biases                                          0.05 u
    class_embedding, position_embedding.weight      0.2 u
    matrices and the patch convolution              sqrt(3 / fan_in) u      (keeps the variance of its input)

Decoder layer (LlamaDecoderLayer: hidden 4096, intermediate 11008, 32 heads, eps 1e-5, theta 10000), names
input_layernorm.weight ... self_attn.v_proj.weight (t = 0 ... 8). Input: u(1000) of [1, 643, 4096], positions
0 ... 642, causal. Backward from loss = sum(output * cotangent), cotangent = u(1001).

Vision tower (24 layers of 1024, patch 14), 391 names as in a CLIPVisionModel without the `vision_model.` prefix.
Pixels: 2 u(1000) of [1, 3, 336, 336]. Outputs: hidden states 0, 1, 12 and 23 (the one that feature layer -2 selects,
with the class token).

Of each tensor: L2 norm, mean, its projection sum(x * u(2000)), which notices elements in wrong places, and 16
elements spread evenly over the flat tensor, flat index (n - 1) * j / 15 rounded down. All in float32 with float64
accumulation; `float64` beside them is the largest distance of a true float64 run, relative to the norm.
Takes a few minutes and 6 GB on two cores.
"""

import argparse
import json
import re
import time
from pathlib import Path

import numpy
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from golden.hash_rule import tensor, uniform
from golden.precision import float64_mode, library_versions

ROOT = Path(__file__).resolve().parent.parent
TOKENS, HIDDEN, SAMPLES = 643, 4096, 16
INPUT, COTANGENT, PROJECTION = 1000, 1001, 2000
KEPT_STATES = (0, 1, 12, 23)


def fill(model):
    """Gives every parameter its hash-rule value; the numbering is by the stored names."""
    named = {name.removeprefix("vision_model."): weight for name, weight in model.named_parameters()}
    for number, name in enumerate(sorted(named, key=str.encode)):
        weight = named[name]
        if name.endswith(".bias"):
            scale, offset = 0.05, 0.0
        elif "class_embedding" in name or "position_embedding" in name:
            scale, offset = 0.2, 0.0
        elif weight.ndim == 1:
            scale, offset = 0.1, 1.0
        else:
            scale, offset = float(numpy.sqrt(3.0 / weight[0].numel())), 0.0
        weight.data = tensor(number, weight.shape, scale, offset).to(weight.dtype)
    return named


def decoder_layer(kind):
    """Output, dX and weight gradients of the layer in dtype `kind`."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=11008, num_attention_heads=32, rms_norm_eps=1e-5)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to_empty(device="cpu").to(kind)
    named = fill(layer)
    x = tensor(INPUT, (1, TOKENS, HIDDEN)).to(kind).requires_grad_()
    positions = torch.arange(TOKENS)[None]
    mask = torch.full((TOKENS, TOKENS), torch.finfo(kind).min, dtype=kind).triu(1)[None, None]
    angles = LlamaRotaryEmbedding(config)(x, positions)
    output = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(tensor(COTANGENT, output.shape).to(kind))
    gradients = {f"gradient.{name}": weight.grad for name, weight in sorted(named.items())}
    return {"output": output.detach(), "input_gradient": x.grad, **gradients}


def vision_tower(kind):
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config._attn_implementation = "eager"
    model = CLIPVisionModel(config).to(kind).eval()
    assert len(fill(model)) == 391
    pixels = tensor(INPUT, (1, 3, 336, 336), 2.0).to(kind)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 25
    return {f"hidden_state.{index}": states[index] for index in KEPT_STATES}


def summary(value):
    """The figures of one tensor, accumulated in float64."""
    flat = value.detach().double().flatten()
    places = [(flat.numel() - 1) * j // (SAMPLES - 1) for j in range(SAMPLES)]
    return {
        "shape": list(value.shape),
        "norm": flat.norm().item(),
        "mean": flat.mean().item(),
        "projection": torch.dot(flat, torch.from_numpy(uniform(PROJECTION, (flat.numel(),)))).item(),
        "at": [flat[place].item() for place in places],
    }


def measure(part):
    """Float32 figures, each with the distance of float64's values."""
    single = part(torch.float32)
    result = {name: summary(value) for name, value in single.items()}
    with float64_mode():
        exact = part(torch.float64)
    for name, value in exact.items():
        result[name]["float64"] = ((single[name].double() - value).norm() / value.norm()).item()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/real_geometry.json")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {"versions": library_versions()}
    for name, part in (("decoder_layer", decoder_layer), ("vision_tower", vision_tower)):
        start = time.time()
        result[name] = measure(part)
        far = max(row["float64"] for row in result[name].values())
        print(f"{name}: {time.time() - start:.0f} s, float64 within {far:.1e}")
    text = json.dumps(json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.8g}")), indent=1)
    arguments.out.write_text(re.sub(r"\[[^\[\]{}\"]*\]", lambda m: " ".join(m.group().split()), text) + "\n")


if __name__ == "__main__":
    main()
