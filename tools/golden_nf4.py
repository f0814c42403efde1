#!/usr/bin/env python3
"""Writes tests/golden/nf4: tensors as bitsandbytes packs them in four bits on a processor, and what it makes of the bytes.

    python tools/golden_nf4.py

Made with bitsandbytes 0.50.2 and torch 2.15.0 (AVX2), one thread: its mean of the factors depends on both. Large
inputs come from tools/golden/hash_rule.py, so that no file carries them.
"""

import json
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import bitsandbytes  # noqa: E402
import numpy  # noqa: E402
import torch  # noqa: E402
from bitsandbytes import functional  # noqa: E402
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import golden_tiny_fixture  # noqa: E402
from golden.hash_rule import tensor  # noqa: E402

OUT = Path("tests/golden/nf4")
# Dequantised values are kept of tensors up to this size.
KEPT = 3000
# Numbers of factors whose mean is compared.
MEANS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 255, 256, 257, 513, 1000, 2048, 4097, 16384, 32767, 32768, 65537, 180224]


def bounds_block(kind):
    """Blocks whose largest value is 1 and whose others lie on the bounds of the codes, one up, and one down."""
    bounds, _ = _get_4bit_quantize_bounds(kind, torch.device("cpu"))
    bounds = bounds.numpy()
    rows = [numpy.nextafter(bounds, numpy.float32(2)), bounds, numpy.nextafter(bounds, numpy.float32(-2))]
    values = numpy.concatenate([[1.0], *rows]).astype(numpy.float32)
    # Further factors, a power of two and not.
    blocks = [numpy.resize(values * numpy.float32(scale), 64) for scale in (1.0, 0.25, 3.0, 1.7e-3, 0.1)]
    return torch.from_numpy(numpy.concatenate(blocks))


def special(kind):
    random = tensor(900, (6400,))
    outlier = random[:1000] * 1e-3
    outlier[70] = 1e30
    outlier[200] = -7.0
    signs = torch.cat([torch.ones(32), -torch.ones(32)])
    scales = torch.logspace(-44, -36, 33, dtype=torch.float64)
    tiny = (random[:33 * 64].double().reshape(33, 64) * scales[:, None]).float()
    large = (random[:640].double() * 3.4028e38).float()
    # Every other block holds the smallest and the largest there are.
    far = torch.where(torch.arange(64) % 2 == 0, 1e-44, 1e-38).repeat(3) * signs.repeat(3)
    far[0], far[64], far[130] = 1.0, 2.0**107, 3e38
    return {
        "sines": torch.cat([torch.sin(torch.arange(64.0)), 2.5 * torch.sin(torch.arange(64.0, 128.0))]),
        "bounds": bounds_block(kind),
        "zeros": torch.zeros(640),
        "zeros_partial": torch.zeros(100),
        "zero_blocks": torch.cat([torch.zeros(64), random[:64], torch.zeros(64), random[:30]]),
        "outlier": outlier,
        "one": torch.tensor([-0.3]),
        "odd": random[:65],
        "negative_zeros": torch.cat([-torch.zeros(64), torch.tensor([1e-30, -1e-30, 0.0, -0.0, 1.0])]),
        "tiny": tiny.flatten(),
        "large": large,
        "far": far,
        "constant": torch.full((777,), -0.02),
    }


# name: (number of the hash, shape, scale, offset)
HASHED = {
    "square": (901, [64, 64], 0.05, 0.0),
    "crossing": (902, [37, 83], 0.3, 0.01),
    "odd_columns": (903, [129, 127], 2.0, 0.0),
    "blocks_257": (904, [257, 64], 1.0, 0.0),
    "wide": (905, [24, 2731], 0.02, 0.0),
}


def pack(kind, values, shape, out, name, double):
    values = values.reshape(shape)
    packed, state = functional.quantize_4bit(values, blocksize=64, compress_statistics=double, quant_type=kind)
    key = f"{kind}.{name}"
    if not double:
        out[f"{key}.codes"] = packed.flatten().clone()
        out[f"{key}.absmax"] = state.absmax.clone()
    else:
        out[f"{key}.nested"] = state.absmax.clone()
        out[f"{key}.nested_absmax"] = state.state2.absmax.clone()
        out[f"{key}.nested_map"] = state.state2.code.clone()
        out[f"{key}.offset"] = state.offset.reshape(1).clone()
        # The factors that the stored bytes give.
        factors = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        out[f"{key}.factors"] = factors.clone()
    if values.numel() <= KEPT:
        end = "double" if double else "plain"
        out[f"{key}.{end}"] = functional.dequantize_4bit(packed, state).flatten().float().clone()


def fixture_losses(double):
    """Losses of the fixture of golden_tiny_fixture.py with the decoder's linears through NF4, computed with in float32."""
    losses = {}
    for projector in ("mlp2x_gelu", "linear"):
        model, parameters = golden_tiny_fixture.build(projector)
        for name, weight in parameters.items():
            if name.startswith("language_model.model.layers.") and weight.ndim == 2:
                packed, state = functional.quantize_4bit(
                    weight.data, blocksize=64, compress_statistics=double, quant_type="nf4"
                )
                weight.data = functional.dequantize_4bit(packed, state)
        with torch.no_grad():
            losses[projector] = round(golden_tiny_fixture.forward(model)[0].item(), 7)
    return losses


def main():
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    out, cases = {}, []
    for kind in ("nf4", "fp4"):
        for name, values in special(kind).items():
            out[f"{kind}.{name}.input"] = values.clone()
            cases.append({"kind": kind, "name": name, "shape": [len(values)]})
        for name, (number, shape, scale, offset) in HASHED.items():
            cases.append({"kind": kind, "name": name, "shape": shape, "hash": [number, scale, offset]})
        for case in (case for case in cases if case["kind"] == kind):
            values = out.get(f"{kind}.{case['name']}.input")
            if values is None:
                number, scale, offset = case["hash"]
                values = tensor(number, case["shape"], scale, offset)
            for double in (False, True):
                pack(kind, values, case["shape"], out, case["name"], double)
    factors = tensor(906, (max(MEANS),), 0.02, 0.03)
    means = [[count, factors[:count].mean().view(torch.int32).item()] for count in MEANS]
    maps = {f"{kind}.nested_map": out[f"{kind}.sines.nested_map"].clone() for kind in ("nf4",)}
    out = {key: value for key, value in out.items() if not key.endswith("nested_map")} | maps
    save_file(out, OUT / "packed.safetensors")
    expected = {
        "versions": {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__.split("+")[0]},
        "fixture": {"plain": fixture_losses(False), "double": fixture_losses(True)},
        "cases": cases,
        "means": {"hash": [906, 0.02, 0.03], "bits": means},
    }
    (OUT / "expected.json").write_text(json.dumps(expected, separators=(",", ":")).replace('},{', '},\n{') + "\n")


if __name__ == "__main__":
    main()
