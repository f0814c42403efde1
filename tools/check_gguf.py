"""Checks the GGUF files that `wgpu-llava convert --to gguf` wrote of a Hugging Face folder, with the gguf package and,
asked for by --llama, with llama.cpp itself. Ends with 1 if anything differs.

Checked with gguf 0.19.0, torch 2.15.0, transformers 5.24.0 and llama-cpp-python 0.3.36:

    python tools/check_gguf.py --source HF_DIR --written GGUF_DIR [--llama] [--logits 0.02]

Of every tensor: that its name is the one of gguf.get_tensor_name_map, its shape, its type, and its bytes, which must be
those that gguf.quantize makes of the source's values. Of the keys: sizes, positions and special tokens. --llama
compares token ids and logits with transformers', and for a LLaVA what comes out of its projector for one picture.
"""

import argparse
import ctypes
import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import MODEL_ARCH
from safetensors import safe_open

TEXTS = ["USER: What is in the picture?\nASSISTANT: One red square.", "a", " two  spaces", "Grüße, 12345 日本 🙂\n\n\tend",
         "they're 3.14 of I'LL", "def f(x):\n    return x**2  # ok", "nɔ́ə", "", "\n\n\n"]
# Layouts that transformers has at run time, and the one on disk.
RUNTIME = [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
           ("model.multi_modal_projector.", "multi_modal_projector.")]
problems = []


def check(what, got, wanted, show=True):
    if got != wanted:
        problems.append(f"{what}: {got}, expected {wanted}" if show else f"{what} differs")


def source_tensors(folder):
    import torch
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                values = file.get_tensor(name).to(torch.float32).numpy()
                for found, known in RUNTIME:
                    name = known + name.removeprefix(found) if name.startswith(found) else name
                tensors[name] = values
    return tensors


def permuted(weights, heads):
    rows = weights.shape[0]
    return weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def compare(reader, wanted, wanted_type):
    """`wanted`: values by name in the file."""
    found = {tensor.name: tensor for tensor in reader.tensors}
    check("names", sorted(found), sorted(wanted))
    for name in sorted(set(found) & set(wanted)):
        tensor, values = found[name], np.ascontiguousarray(wanted[name], np.float32)
        kind = wanted_type(name, values)
        check(f"{name} type", tensor.tensor_type, kind)
        check(f"{name} shape", [int(n) for n in tensor.shape][::-1], list(values.shape))
        if tensor.tensor_type == kind:
            rounded = gguf.quantize(values, kind)
            same = np.array_equal(np.asarray(tensor.data).reshape(-1).view(np.uint8), rounded.reshape(-1).view(np.uint8))
            check(f"{name} bytes", same, True)
    return len(found)


def type_of(file_type):
    whole = {0: T.F32, 1: T.F16, 7: T.Q8_0, 32: T.BF16}[file_type]

    def kind(name, values):
        if values.ndim == 1 or name == "v.position_embd.weight":
            return T.F32
        if name == "v.patch_embd.weight":
            return T.F16 if whole == T.F16 else T.F32
        return whole if values.shape[-1] % gguf.GGML_QUANT_SIZES[whole][0] == 0 else T.F16
    return kind


def language(reader, config, tensors):
    text = config.get("text_config", config)
    arch = reader.fields["general.architecture"].contents()
    family = text.get("model_type", "llama")
    check("architecture", arch, "qwen2" if family == "qwen2" else "llama")
    get = lambda key: reader.fields[f"{arch}.{key}"].contents() if f"{arch}.{key}" in reader.fields else None
    heads = text["num_attention_heads"]
    kv = text.get("num_key_value_heads") or heads
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 10000.0), **(text.get("rope_scaling") or {})}
    for key, wanted in [("block_count", text["num_hidden_layers"]), ("context_length", text["max_position_embeddings"]),
                        ("embedding_length", text["hidden_size"]), ("feed_forward_length", text["intermediate_size"]),
                        ("attention.head_count", heads), ("attention.head_count_kv", kv),
                        ("attention.layer_norm_rms_epsilon", float(np.float32(text["rms_norm_eps"]))),
                        ("rope.freq_base", float(np.float32(rope["rope_theta"]))), ("vocab_size", text["vocab_size"])]:
        check(key, get(key), wanted)
    map_ = gguf.get_tensor_name_map(MODEL_ARCH.QWEN2 if arch == "qwen2" else MODEL_ARCH.LLAMA, text["num_hidden_layers"])
    wanted = {}
    tied = text.get("tie_word_embeddings") or config.get("tie_word_embeddings")
    for name, values in tensors.items():
        name = name.removeprefix("language_model.")
        if not name.startswith(("model.", "lm_head")) or (tied and name.startswith("lm_head")):
            continue
        if arch == "llama" and ".q_proj." in name:
            values = permuted(values, heads)
        if arch == "llama" and ".k_proj." in name:
            values = permuted(values, kv)
        wanted[map_.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    if rope.get("rope_type", rope.get("type")) == "llama3":
        found = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        check("rope_freqs", len(found), 1)
        if found:
            wanted["rope_freqs.weight"] = np.array(found[0].data)
    count = compare(reader, wanted, type_of(reader.fields["general.file_type"].contents()))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    check("tokens", len(tokens), text["vocab_size"])
    check("token types", len(reader.fields["tokenizer.ggml.token_type"].contents()), len(tokens))
    return count


def seeing(reader, config, tensors):
    vision = config["vision_config"]
    get = lambda key: reader.fields[f"clip.{key}"].contents()
    used = config["vision_feature_layer"]
    used = used if used >= 0 else vision["num_hidden_layers"] + 1 + used
    for key, wanted in [("vision.block_count", used), ("vision.feature_layer", [used]), ("projector_type", "mlp"),
                        ("vision.image_size", vision["image_size"]), ("vision.patch_size", vision["patch_size"]),
                        ("vision.embedding_length", vision["hidden_size"]),
                        ("vision.feed_forward_length", vision["intermediate_size"]), ("use_gelu", False),
                        ("vision.attention.head_count", vision["num_attention_heads"]), ("has_vision_encoder", True),
                        ("vision.projection_dim", config["text_config"]["hidden_size"])]:
        check(key, get(key), wanted)
    map_ = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    wanted = {}
    for name, values in tensors.items():
        if name.startswith("vision_tower."):
            name = "vision_tower.vision_model." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
            layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "0"
            if int(layer) < used and "post_layernorm" not in name:
                known = map_.get_name(name, try_suffixes=(".weight", ".bias"))
                check(f"{name} has a name", known is not None, True)
                wanted[str(known)] = values
    part = lambda name: tensors[f"multi_modal_projector.{name}"]
    first, bias, second, end = part("linear_1.weight"), part("linear_1.bias"), part("linear_2.weight"), part("linear_2.bias")
    if config.get("projector_hidden_act") == "linear":
        size = first.shape[0]
        first, bias = np.concatenate([first, -first]), np.concatenate([bias, -bias])
        second, end = np.concatenate([np.eye(size), 0 - np.eye(size)], axis=1), np.zeros(size)
    wanted |= {"mm.0.weight": first, "mm.0.bias": bias, "mm.2.weight": second, "mm.2.bias": end}
    kind = type_of(reader.fields["general.file_type"].contents())
    linear = config.get("projector_hidden_act") == "linear"
    # Ones are not exact in Q8_0.
    exact = lambda name, values: T.F16 if linear and name == "mm.2.weight" and kind(name, values) == T.Q8_0 else kind(name, values)
    return compare(reader, wanted, exact)


def llama(path, folder, config, tolerance):
    import llama_cpp
    import torch
    from transformers import AutoTokenizer, AutoModelForCausalLM, LlavaForConditionalGeneration
    theirs = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_ctx=512, n_threads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    differing = 0
    for text in TEXTS:
        ours = tokenizer.encode(text, add_special_tokens=False)
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        if ours != ids:
            differing += 1
            print(f"  {text!r}: llama.cpp {ids}, transformers {ours}")
    print(f"  {differing} of {len(TEXTS)} texts have other ids in llama.cpp")
    kind = LlavaForConditionalGeneration if "vision_config" in config else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [token for text in TEXTS for token in tokenizer.encode(text, add_special_tokens=False)][:90]
    theirs.eval(ids)
    logits = np.array(theirs.scores[:len(ids)])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    distance = float(np.abs(logits - wanted).max())
    print(f"  logits of {len(ids)} tokens: largest distance to transformers {distance:.2e} (of {np.abs(wanted).max():.1f})")
    check("logits are near", distance <= tolerance, True)
    return theirs, model


def projected(path, theirs, model, config, folder, tolerance):
    import torch
    from llama_cpp import mtmd_cpp as m
    from PIL import Image
    from transformers import CLIPImageProcessor
    params = m.mtmd_context_params_default()
    params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, 1, False, False
    context = m.mtmd_init_from_file(str(path).encode(), theirs._model.model, params)
    check("mtmd opens the mmproj", bool(context), True)
    if not context:
        return
    side = config["vision_config"]["image_size"]
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    bitmap = m.mtmd_bitmap_init(side, side, (ctypes.c_uint8 * pixels.size).from_buffer_copy(pixels.tobytes()))
    chunks = m.mtmd_input_chunks_init()
    marker = m.mtmd_get_marker(context)
    text = m.mtmd_input_text(marker, len(marker), True, True)
    rc = m.mtmd_tokenize(context, chunks, ctypes.byref(text), (m.mtmd_bitmap_p_ctypes * 1)(bitmap), 1)
    check("mtmd_tokenize", rc, 0)
    for number in range(m.mtmd_input_chunks_size(chunks)):
        chunk = m.mtmd_input_chunks_get(chunks, number)
        if m.mtmd_input_chunk_get_type(chunk) != m.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            continue
        check("mtmd_encode_chunk", m.mtmd_encode_chunk(context, chunk), 0)
        rows, width = m.mtmd_input_chunk_get_n_tokens(chunk), config["text_config"]["hidden_size"]
        found = np.ctypeslib.as_array(m.mtmd_get_output_embd(context), (rows * width,)).reshape(rows, width).copy()
        processor = CLIPImageProcessor.from_pretrained(folder)
        values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows_of = {last: features(model, values, last).numpy() for last in (False, True)}
        check("rows of a picture", found.shape, rows_of[False].shape)
        distances = {last: float(np.abs(found - wanted).max()) for last, wanted in rows_of.items()}
        largest = np.abs(rows_of[False]).max()
        print(f"  projector's output: largest distance to transformers {distances[False]:.2e} (of {largest:.1f})")
        if distances[False] > tolerance >= distances[True]:
            print(f"  this llama.cpp puts the class token behind the patches: with that, {distances[True]:.2e}")
        check("the projector's output is near", min(distances.values()) <= tolerance, True)


def features(model, values, class_last):
    """What the projector makes of a picture [N, D]. `class_last`: with the class token behind the patches, whose position
    embeddings are then those of the places before, as releases of llama.cpp since 2025 compute it."""
    import torch
    tower, config = model.model.vision_tower, model.config
    tower = getattr(tower, "vision_model", tower)
    parts = tower.embeddings
    patches, first = parts.patch_embedding(values).flatten(2).transpose(1, 2), parts.class_embedding.expand(1, 1, -1)
    state = torch.cat([patches, first] if class_last else [first, patches], 1) + parts.position_embedding.weight[None]
    state = tower.pre_layrnorm(state)
    count = len(tower.encoder.layers) + 1
    used = config.vision_feature_layer if config.vision_feature_layer >= 0 else count + config.vision_feature_layer
    for layer in tower.encoder.layers[:used]:
        state = layer(state, attention_mask=None)
        state = state[0] if isinstance(state, tuple) else state
    return model.model.multi_modal_projector(state[:, 1:])[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, type=pathlib.Path)
    parser.add_argument("--written", required=True, type=pathlib.Path)
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--logits", type=float, default=0.02)
    arguments = parser.parse_args()
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(arguments.source).to_dict()
    tensors = source_tensors(arguments.source)
    files = sorted(arguments.written.glob("*.gguf"))
    mmproj = [path for path in files if path.name.startswith("mmproj-")]
    (main_file,) = [path for path in files if path not in mmproj]
    check("mmproj files", len(mmproj), int("vision_config" in config))
    count = language(gguf.GGUFReader(main_file), config, tensors)
    print(f"{main_file.name}: {count} tensors")
    for path in mmproj:
        print(f"{path.name}: {seeing(gguf.GGUFReader(path), config, tensors)} tensors")
    if arguments.llama:
        theirs, model = llama(main_file, arguments.source, config, arguments.logits)
        for path in mmproj:
            projected(path, theirs, model, config, arguments.source, arguments.logits)
    for problem in problems:
        print("DIFFERS", problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
