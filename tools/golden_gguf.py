"""Writes tests/golden/gguf: tensors of every block type with the values that the gguf package gives them, rounded
tensors, a tiny random LLaMA with what transformers loads from it, and names, keys and factors (expected.json).

Made with gguf 0.19.0, numpy 2.4.6, torch 2.15.0, transformers 5.23.0, safetensors 0.8.0:

    python tools/golden_gguf.py
"""

import json
import math
import pathlib
from importlib.metadata import version

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import MODEL_ARCH, GGUFValueType, GGUFWriter
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

OUT = pathlib.Path(__file__).parent.parent / "tests/golden/gguf"
# Places of the f16 scales in a block, by type.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
          T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
LLAMA3 = {"llama-3.1": (500000.0, 128, 8.0, 1.0, 4.0, 8192), "llama-3.2": (500000.0, 64, 32.0, 1.0, 4.0, 8192),
          "other": (10000.0, 64, 4.0, 2.0, 6.0, 4096)}


def write(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(rng, kind, rows, blocks):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for place in SCALES.get(kind, []):
        scales = (rng.standard_normal((rows, blocks)) * 0.05).astype(np.float16)
        data[..., place:place + 2] = scales[..., None].view(np.uint8)
    return data.reshape(rows, blocks * size)


def quants():
    rng = np.random.default_rng(7)
    writer = GGUFWriter(OUT / "quants.gguf", "test")
    writer.add_string("t.string", "Grüße")
    for name, kind in [("uint8", 200), ("int8", -3), ("uint16", 65000), ("int16", -300), ("uint32", 4_000_000_000),
                       ("int32", -5), ("float32", 1e-5), ("uint64", 2**63), ("int64", -(2**40)), ("float64", 0.1),
                       ("bool", True)]:
        getattr(writer, f"add_{name}")(f"t.{name}", kind)
    writer.add_array("t.strings", ["a", "", "ä"])
    writer.add_array("t.floats", [0.5, -0.25])
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.bools", [True, False])
    writer.add_key_value("t.bytes", [0, 255], GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT8)
    writer.add_array("t.nested", [[1, 2], [3], [4, 5, 6]])
    half = rng.integers(0, 0x7c00, (3, 10), dtype=np.uint16) | rng.integers(0, 2, (3, 10), dtype=np.uint16) << 15
    brain = rng.integers(0, 0x7f80, (3, 10), dtype=np.uint16) | rng.integers(0, 2, (3, 10), dtype=np.uint16) << 15
    for name, kind, data in [("F16", T.F16, half.view(np.float16)), ("BF16", T.BF16, brain.view(np.uint8))]:
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(f"{name}.expected", gguf.dequantize(data, kind))
    for kind in SCALES:
        blocks = 2 if gguf.GGML_QUANT_SIZES[kind][0] == 32 else 1
        data = random_blocks(rng, kind, 3, blocks)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        writer.add_tensor(f"{kind.name}.expected", gguf.dequantize(data, kind))
    writer.add_tensor("IQ4_XS", random_blocks(rng, T.IQ4_XS, 1, 1), raw_dtype=T.IQ4_XS)
    write(writer)


def rounded():
    rng = np.random.default_rng(8)
    values = rng.standard_normal((6, 64)).astype(np.float32)
    values[1] *= 1e-6
    values[2] = 0
    values[3, :32] = np.float32(1e-44)
    values[4] = np.round(values[4] * 20) / 2  # halves, which are rounded away from zero in Q8_0
    values[4, 0] = 127
    values[5] *= np.float32(2.0) ** rng.integers(-30, 12, 64).astype(np.float32)
    writer = GGUFWriter(OUT / "rounded.gguf", "test")
    writer.add_uint32("t.uint32", 7)
    writer.add_array("t.strings", ["x", "yz"])
    writer.add_tensor("F32", values)
    for kind in [T.F16, T.BF16, T.Q8_0]:
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    write(writer)


def permuted(weights, heads):
    """As LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def tiny_llama():
    torch.manual_seed(9)
    rng = np.random.default_rng(9)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=40, rms_norm_eps=1e-5, max_position_embeddings=64,
                         rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    writer = GGUFWriter(OUT / "tiny_llama.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(40)
    writer.add_rope_dimension_count(8)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    names = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        if data.ndim == 1:  # norms that are not all ones
            data = data + 0.1 * rng.random(data.shape, np.float32)
        if ".q_proj." in name:
            data = permuted(data, 4)
        if ".k_proj." in name:
            data = permuted(data, 2)
        kind = T.F32 if data.ndim == 1 else T.F16 if "mlp" in name else T.Q4_1 if "_proj" in name else T.Q8_0
        data = gguf.quantize(np.ascontiguousarray(data, np.float32), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    write(writer)
    loaded = LlamaForCausalLM.from_pretrained(OUT, gguf_file="tiny_llama.gguf", dtype=torch.float32)
    tensors = {name: tensor.contiguous() for name, tensor in loaded.state_dict().items()}
    save_file(tensors, OUT / "tiny_llama.safetensors", metadata={"format": "pt"})
    (OUT / "tiny_llama.safetensors").chmod(0o644)


def llama3_factors(theta, dim, factor, low, high, original):
    """As LlamaModel.generate_extra_tensors of llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for freq in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * math.pi / freq
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32).tolist()


def all_keys():
    keys = set()

    def collect(owner):
        for value in vars(owner).values():
            if isinstance(value, str) and "." in value and not value.startswith("gguf."):
                keys.add(value.replace("{arch}", "llama"))
            elif isinstance(value, type):
                collect(value)

    collect(gguf.Keys)
    return sorted(key for key in keys if key.startswith(("general.", "llama.", "clip.", "tokenizer.")))


def expected():
    language = {}
    names = gguf.get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=40)
    with torch.device("meta"):
        for name in LlamaForCausalLM(config).state_dict():
            language[name] = names.get_name(name, try_suffixes=(".weight",))
    tower = {}
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, 3)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                              image_size=28, patch_size=14)
    with torch.device("meta"):
        state = CLIPVisionModel(vision).state_dict()
    for name in state:
        name = "vision_tower.vision_model." + name.removeprefix("vision_model.")
        tower[name] = names.get_name(name, try_suffixes=(".weight", ".bias"))
    libraries = ["gguf", "numpy", "torch", "transformers", "safetensors"]
    result = {
        "versions": {library: version(library).split("+")[0] for library in libraries},
        "language_names": language,
        "tower_names": tower,
        "keys": all_keys(),
        "llama3": {name: {"parameters": list(row), "factors": llama3_factors(*row)} for name, row in LLAMA3.items()},
    }
    (OUT / "expected.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    quants()
    rounded()
    tiny_llama()
    expected()
