"""Writes the randomly initialised Hugging Face folders the tiny base is trained from, and puts the trained parts together.

    python make_init.py lm TOKENIZER_DIR OUT          a LLaMA (LlamaForCausalLM), before lm.toml
    python make_init.py captioner TOKENIZER_DIR OUT   a LLaVA of the vision tower and a one-layer LLaMA that only serves to
                                                      train it with captions, before tower.toml
    python make_init.py assemble LM TOWER OUT         the base: LLaMA from folder LM, tower from folder TOWER, fresh projector
    python make_init.py pack BASE OUT                 what goes into the program: the base without projector

Needs numpy and safetensors only.  Options: --seed N (default 0).
"""

import argparse
import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

IMAGE, PATCH = 64, 16
LM = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
CAPTIONER = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
TOWER = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4)
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def vocabulary(folder: str) -> tuple[int, int, int]:
    """Size rounded up to a multiple of 64, and the ids of <image> and <pad>."""
    with open(os.path.join(folder, "tokenizer.json")) as f:
        data = json.load(f)
    added = {t["content"]: t["id"] for t in data["added_tokens"]}
    count = max([*data["model"]["vocab"].values(), *added.values()]) + 1
    return -(-count // 64) * 64, added["<image>"], added["<pad>"]


def llama_config(size: dict, vocab: int, pad: int) -> dict:
    return {**size, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": size["num_attention_heads"],
            "head_dim": size["hidden_size"] // size["num_attention_heads"], "vocab_size": vocab, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad, "initializer_range": 0.02, "dtype": "float32"}


def llava_config(text: dict, image: int) -> dict:
    vision = {**TOWER, "model_type": "clip_vision_model", "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3, "hidden_act": "quick_gelu",
              "layer_norm_eps": 1e-5, "projection_dim": TOWER["hidden_size"], "attention_dropout": 0.0}
    return {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text, "vision_config": vision,
            "image_token_index": image, "image_token_id": image, "image_seq_length": (IMAGE // PATCH) ** 2, "projector_hidden_act": "gelu",
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "multimodal_projector_bias": True,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": text["pad_token_id"], "dtype": "float32"}


def normal(rng, std, *shape):
    return (rng.standard_normal(shape) * std).astype(np.float32)


def llama_weights(size: dict, vocab: int, rng, embedding_std: float, match: bool) -> dict:
    """`match`: keys start equal to queries, so that a token first looks at its like (the model has to compare words);
    otherwise queries start at zero, so that the one layer of the captioner first takes the mean of what it sees."""
    d, f, layers = size["hidden_size"], size["intermediate_size"], size["num_hidden_layers"]
    out = {"model.embed_tokens.weight": normal(rng, embedding_std, vocab, d), "model.norm.weight": np.ones(d, np.float32)}
    deep = (2 * layers) ** -0.5
    for i in range(layers):
        q = normal(rng, d**-0.5, d, d)
        attention = {"q": q if match else q * 0, "k": q.copy(), "v": normal(rng, d**-0.5, d, d), "o": normal(rng, d**-0.5 * deep, d, d)}
        out |= {f"model.layers.{i}.self_attn.{name}_proj.weight": w for name, w in attention.items()}
        mlp = {"gate": normal(rng, d**-0.5, f, d), "up": normal(rng, d**-0.5, f, d), "down": normal(rng, f**-0.5 * deep, d, f)}
        out |= {f"model.layers.{i}.mlp.{name}_proj.weight": w for name, w in mlp.items()}
        out |= {f"model.layers.{i}.{name}.weight": np.ones(d, np.float32) for name in ["input_layernorm", "post_attention_layernorm"]}
    return out


def cosine_patches(count: int, side: int) -> np.ndarray:
    """`count` patch filters [count, 3, side, side]: two-dimensional cosines of low frequency in brightness and, to half that
    frequency, in two color differences.  Higher frequencies are scaled up, since pictures hold less of them."""
    k = np.arange(side)
    basis = np.array([np.cos(np.pi * (k + 0.5) * u / side) * (2**0.5 if u else 1) / side**0.5 for u in range(side)])
    channels = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
    channels /= np.linalg.norm(channels, axis=1, keepdims=True)
    waves = [((u * u + v * v) * (1 if c == 0 else 2), u, v, c) for u in range(side) for v in range(side) for c in range(3)]
    filters = [channels[c][:, None, None] * np.outer(basis[u], basis[v]) * (1 + np.hypot(u, v)) / side for _, u, v, c in sorted(waves)[:count]]
    return np.array(filters, np.float32)


def tower_weights(rng) -> dict:
    d, f, layers = TOWER["hidden_size"], TOWER["intermediate_size"], TOWER["num_hidden_layers"]
    side = IMAGE // PATCH
    rows, columns = normal(rng, 0.3, side, 1, d), normal(rng, 0.3, 1, side, d)
    positions = np.concatenate([normal(rng, 0.3, 1, d), (rows + columns).reshape(-1, d)])
    out = {"embeddings.class_embedding": normal(rng, d**-0.5, d), "embeddings.patch_embedding.weight": cosine_patches(d, PATCH),
           "embeddings.position_embedding.weight": positions}

    def layer_norm(name):
        out[f"{name}.weight"], out[f"{name}.bias"] = np.ones(d, np.float32), np.zeros(d, np.float32)

    def linear(name, rows, columns, scale=1.0):
        out[f"{name}.weight"], out[f"{name}.bias"] = normal(rng, scale * columns**-0.5, rows, columns), np.zeros(rows, np.float32)

    deep = (2 * layers) ** -0.5
    layer_norm("pre_layrnorm")  # spelled so in the CLIP code
    layer_norm("post_layernorm")
    for i in range(layers):
        for name in "qkv":
            linear(f"encoder.layers.{i}.self_attn.{name}_proj", d, d)
        linear(f"encoder.layers.{i}.self_attn.out_proj", d, d, deep)
        linear(f"encoder.layers.{i}.mlp.fc1", f, d)
        linear(f"encoder.layers.{i}.mlp.fc2", d, f, deep)
        layer_norm(f"encoder.layers.{i}.layer_norm1")
        layer_norm(f"encoder.layers.{i}.layer_norm2")
    return {f"vision_tower.vision_model.{k}": v for k, v in out.items()}


def projector_weights(rng, inner: int, outer: int) -> dict:
    def uniform(rows, columns):
        return rng.uniform(-(columns**-0.5), columns**-0.5, (rows, columns)).astype(np.float32)

    out = {}
    for i, columns in [(1, inner), (2, outer)]:
        out[f"multi_modal_projector.linear_{i}.weight"] = uniform(outer, columns)
        out[f"multi_modal_projector.linear_{i}.bias"] = np.zeros(outer, np.float32)
    return out


def write(folder: str, config: dict, weights: dict, tokenizer: str) -> None:
    os.makedirs(folder, exist_ok=True)
    files = {"config.json": config, "generation_config.json": {k: config[k] for k in ["bos_token_id", "eos_token_id", "pad_token_id"]}}
    if config["model_type"] == "llava":
        files["preprocessor_config.json"] = {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": IMAGE}, "resample": 3, "do_center_crop": True, "crop_size": {"height": IMAGE, "width": IMAGE},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}
        files["processor_config.json"] = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "image_token": "<image>",
                                          "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    for name, data in files.items():
        with open(os.path.join(folder, name), "w") as f:
            json.dump(data, f, indent=2)
    for name in TOKENIZER_FILES:
        shutil.copyfile(os.path.join(tokenizer, name), os.path.join(folder, name))
    save_file({k: np.ascontiguousarray(v) for k, v in weights.items()}, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    print(f"{folder}: {sum(v.size for v in weights.values()):,} parameters")


def plain_names(weights: dict) -> dict:
    """Names as transformers before 4.52 wrote them: language_model.*, vision_tower.*; newer files begin with model."""
    out = {}
    for name, value in weights.items():
        for part in ["vision_tower.", "multi_modal_projector."]:
            name = name.removeprefix("model.") if name.startswith("model." + part) else name
        out[name] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lm", "captioner", "assemble", "pack"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.what == "assemble":
        lm, tower, out = args.paths
        with open(os.path.join(lm, "config.json")) as f:
            text = json.load(f)
        _, image, _ = vocabulary(lm)
        weights = {"language_model." + k: v for k, v in load_file(os.path.join(lm, "model.safetensors")).items() if k != "lm_head.weight"}
        trained = plain_names(load_file(os.path.join(tower, "model.safetensors")))
        weights |= {k: v for k, v in trained.items() if k.startswith("vision_tower.")}
        write(out, llava_config(text, image), weights | projector_weights(rng, TOWER["hidden_size"], text["hidden_size"]), lm)
        return
    if args.what == "pack":
        base, out = args.paths
        os.makedirs(out, exist_ok=True)
        for name in ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]:
            shutil.copyfile(os.path.join(base, name), os.path.join(out, name))
        weights = load_file(os.path.join(base, "model.safetensors"))
        kept = {k: v for k, v in weights.items() if not k.startswith("multi_modal_projector.")}
        save_file(kept, os.path.join(out, "model.safetensors"), {"format": "pt"})
        return
    tokenizer, out = args.paths
    vocab, image, pad = vocabulary(tokenizer)
    if args.what == "lm":
        write(out, llama_config(LM, vocab, pad), llama_weights(LM, vocab, rng, 0.1, match=True), tokenizer)
    else:
        text = llama_config(CAPTIONER, vocab, pad)
        weights = {"language_model." + k: v for k, v in llama_weights(CAPTIONER, vocab, rng, 0.3, match=False).items()}
        weights |= tower_weights(rng) | projector_weights(rng, TOWER["hidden_size"], text["hidden_size"])
        write(out, llava_config(text, image), weights, tokenizer)


if __name__ == "__main__":
    main()
