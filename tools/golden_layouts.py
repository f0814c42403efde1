#!/usr/bin/env python3
"""Writes tests/golden/layouts: models of tests/golden/parity in the layouts that people bring, and what transformers
computes where it differs from the parity case.

    python tools/golden_layouts.py

Needs torch, transformers and safetensors. Folders:

original_bin            `LlavaLlamaForCausalLM` of the original authors, sharded .bin in float32, vocabulary without
                        <image> and <pad>, no tower inside: mm_vision_tower names clip_tower
clip_tower              a whole CLIP (text half too), as transformers saves it, with its preprocessor_config.json
mm_projector.bin        the projector alone, as their stage 1 leaves it
original_linear         the other case: a single linear, tower inside, safetensors
expected.json           `score` of original_bin: transformers' logits without the two rows that the original lacks;
                        clip_tower's position embeddings for pictures of other sizes
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from golden.checkpoint import Checkpoint
from golden.precision import library_versions
from golden.reference import encode
from golden.training import IGNORE_INDEX, read_rows

ROOT = Path(__file__).resolve().parent.parent
PARITY, OUT = ROOT / "tests/golden/parity", ROOT / "tests/golden/layouts"


def tensors_of(folder):
    """By the names of released llava-hf files, whatever the parity case has."""
    files = sorted(folder.glob("*.safetensors"))
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tower = re.compile(r"^vision_tower\.(?!vision_model\.)")
    return {tower.sub("vision_tower.vision_model.", name): tensor for name, tensor in loaded.items()}


def original_name(name, tower):
    """The name that the original code gives a tensor of llava-hf; none for what it does not keep."""
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return f"model.vision_tower.{name}" if tower else None
    projector = {"linear_1": "0", "linear_2": "2"}
    _, layer, part = name.split(".")
    return f"model.mm_projector.{projector[layer]}.{part}"


def original_config(config, **more):
    text, vision = config["text_config"], config["vision_config"]
    kept = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
            "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "hidden_act", "initializer_range")
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "torch_dtype": "float32", "use_cache": True, "freeze_mm_mlp_adapter": False,
        "mm_hidden_size": vision["hidden_size"], "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "mm_vision_select_layer": config["vision_feature_layer"], "mm_vision_select_feature": "patch",
        "tune_mm_mlp_adapter": False, "use_mm_proj": True,
        **{key: text[key] for key in kept if key in text}, **more,
    }


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def copy_tokenizer(source, target, drop):
    """tokenizer files without the tokens that llava-hf adds."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in drop]
    write_json(target / "tokenizer.json", tokenizer)
    config = json.loads((source / "tokenizer_config.json").read_text())
    for key in ("pad_token", "image_token", "extra_special_tokens", "added_tokens_decoder"):
        config.pop(key, None)
    write_json(target / "tokenizer_config.json", config)


def score_without(case, rows, width):
    """`score` with the logits of the first `width` tokens alone."""
    checkpoint = Checkpoint.open(PARITY / case / "model", PARITY / case / "images")
    model = checkpoint.load(double=False)
    lines = []
    with torch.no_grad():
        for row in rows:
            record = encode(row, checkpoint)
            inputs = {} if record.pixels is None else {"pixel_values": record.pixels}
            logits = model(input_ids=torch.tensor([record.input_ids]), **inputs, use_cache=False).logits[0, :-1, :width]
            targets = torch.tensor(record.labels[1:])
            keep = targets != IGNORE_INDEX
            found = torch.log_softmax(logits[keep], dim=-1).gather(1, targets[keep, None])[:, 0]
            losses = [float(f"{value:.8g}") for value in found.tolist()]
            lines.append({"id": row["id"], "tokens": len(losses), "loss": -sum(losses) / len(losses),
                          "token_logprobs": losses})
    return lines


def original_bin():
    case = "mha_untied_mlp"
    source, target = PARITY / case / "model", OUT / "original_bin"
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    rows = config["image_token_index"]
    tensors = {}
    for name, tensor in tensors_of(source).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[:rows].clone()
        if original := original_name(name, tower=False):
            tensors[original] = tensor
    # Two shards; rotary buffers as old files have them.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(config["text_config"]["head_dim"] // 2)
    names = list(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in shard}, target / file)
        weight_map |= {name: file for name in shard}
    write_json(target / "pytorch_model.bin.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    write_json(target / "config.json", original_config(
        config, vocab_size=rows, mm_vision_tower="openai/clip_tower", mm_projector_type="mlp2x_gelu"))
    copy_tokenizer(source, target, drop=("<image>", "<pad>"))

    projector = {name: tensor for name, tensor in tensors.items() if "mm_projector" in name}
    torch.save(projector, OUT / "mm_projector.bin")
    return score_without(case, read_rows(PARITY / case / "score.json"), rows)


def clip_tower():
    source, target = PARITY / "mha_untied_mlp/model", OUT / "clip_tower"
    config = json.loads((source / "config.json").read_text())
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
                max_position_embeddings=8, projection_dim=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=config["vision_config"], projection_dim=8))
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in tensors_of(source).items()
             if name.startswith("vision_tower.")}
    missing, unexpected = model.load_state_dict(tower, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("vision_model.")]
    model.save_pretrained(target)
    shutil.copy(source / "preprocessor_config.json", target)
    embeddings = model.vision_model.embeddings
    interpolated = {}
    with torch.no_grad():
        for size in (14, 42, 70):
            tokens = torch.empty(1, (size // 14) ** 2 + 1, model.config.vision_config.hidden_size)
            values = embeddings.interpolate_pos_encoding(tokens, size, size)[0].flatten().tolist()
            interpolated[size] = [float(f"{value:.8g}") for value in values]
    return interpolated


def original_linear():
    source, target = PARITY / "mha_untied_linear/model", OUT / "original_linear"
    target.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    defaults = dict(max_position_embeddings=2048, tie_word_embeddings=False, hidden_act="silu")
    config["text_config"] = {**defaults, **config["text_config"]}
    tensors = {}
    for name, tensor in tensors_of(source).items():
        if name.startswith("multi_modal_projector.linear_2"):
            continue
        original = original_name(name, tower=True)
        tensors[original.replace("mm_projector.0.", "mm_projector.")] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # No mm_projector_type: a linear. The tower's geometry is in a folder of its config alone.
    write_json(target / "config.json", original_config(config, model_type="llava_llama", mm_vision_tower="tower"))
    copy_tokenizer(source, target, drop=())
    shutil.copy(source / "preprocessor_config.json", target)
    (target / "tower").mkdir()
    write_json(target / "tower/config.json", {"model_type": "clip_vision_model", **config["vision_config"]})


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    scores = original_bin()
    interpolated = clip_tower()
    original_linear()
    write_json(OUT / "expected.json",
               {"versions": library_versions(), "original_bin": scores, "position_embeddings": interpolated})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
