#!/usr/bin/env python3
"""Writes tests/golden/adapters: adapters of every form that PEFT saves, for the models of tests/golden/parity, with what
PEFT computes with them and what merge_and_unload makes of the weights.

    python tools/golden_adapters.py [FORM]...

Each folder is an adapter as PEFT reads it, except where `rewrite` brings it to another layout with the same numbers.
expected.json: `model` (the parity case), `score` as in that case's expected.json, and `merged`: name and summary of every
tensor that merging changes. merged.safetensors holds two or three of them whole, in float32 and (`bfloat16.` before the
name) merged into a model that was loaded in bfloat16.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from golden.checkpoint import Checkpoint
from golden.precision import library_versions
from golden.reference import encode
from golden.training import token_losses

ROOT = Path(__file__).resolve().parent.parent
PARITY = ROOT / "tests/golden/parity"
OUT = ROOT / "tests/golden/adapters"
DECODER = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
LAYER = r".*language_model\.layers\.\d+\."
MAPPED = [
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
]


@dataclass
class Form:
    name: str
    model: str
    settings: dict
    whole: list = field(default_factory=list)  # tensors of merged.safetensors, canonical names
    rewrite: str = ""
    bfloat16: bool = False


Q0, DOWN0 = (f"language_model.model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj"))

FORMS = [
    Form(
        "dora",
        "mha_untied_mlp",
        dict(r=2, lora_alpha=4, target_modules=DECODER, use_dora=True, modules_to_save=["multi_modal_projector"]),
        whole=[Q0, DOWN0],
        bfloat16=True,
    ),
    Form(
        "dora_rslora_patterns_biases",
        "qwen2_dynamic",
        dict(
            r=2,
            lora_alpha=3,
            target_modules=DECODER,
            use_dora=True,
            use_rslora=True,
            bias="lora_only",
            rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 1},
            alpha_pattern={"v_proj": 5, r"layers\.0\.mlp\.up_proj": 2},
        ),
        whole=[Q0.replace("layers.0", "layers.1"), DOWN0],
    ),
    Form(
        "rslora_patterns",
        "mqa_untied_mlp_full_features",
        dict(
            r=3,
            lora_alpha=4,
            target_modules=["q_proj", "o_proj", "up_proj"],
            exclude_modules=".*vision_tower.*",
            layers_to_transform=[0, 2],
            use_rslora=True,
            rank_pattern={"up_proj": 2},
            alpha_pattern={r"layers\.2\.self_attn\.o_proj": 1.5},
        ),
        whole=[Q0, "language_model.model.layers.2.self_attn.o_proj.weight"],
        rewrite="transformers_4_51",
        bfloat16=True,
    ),
    Form("all_linear", "mha_untied_mlp", dict(r=1, lora_alpha=1, target_modules="all-linear"), whole=[Q0]),
    Form(
        "dora_tower_projector",
        "qwen2_dynamic",
        dict(
            r=1, lora_alpha=1, use_dora=True, target_modules=["q_proj", "v_proj", "fc1", "linear_1"]
        ),
        whole=["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"],
        rewrite="transformers_4_52",
    ),
    Form(
        "lora_bias",
        "llama3_rope_biases",
        dict(r=2, lora_alpha=6, target_modules=DECODER, lora_bias=True),
        whole=[Q0, Q0.replace("weight", "bias"), DOWN0.replace("weight", "bias")],
    ),
    Form(
        "all_biases",
        "qwen2_dynamic",
        dict(r=1, lora_alpha=2, target_modules=LAYER + r"self_attn\.(q|o)_proj", bias="all"),
        whole=[Q0.replace("weight", "bias")],
    ),
    Form(
        "embeddings_and_head",
        "mha_untied_linear",
        dict(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "gate_proj"]),
        whole=["language_model.model.layers.0.mlp.gate_proj.weight"],
    ),
    Form(
        "norms_and_head_saved",
        "mha_untied_linear",
        dict(
            r=2,
            lora_alpha=4,
            target_modules=LAYER + r"mlp\.(up|down)_proj",
            modules_to_save=["lm_head", "post_attention_layernorm", "language_model.norm", "multi_modal_projector"],
        ),
        whole=["language_model.model.norm.weight"],
    ),
    Form(
        "tied_embeddings_saved",
        "qwen2_dynamic",
        dict(r=1, lora_alpha=2, target_modules=LAYER + r"mlp\.up_proj", modules_to_save=["embed_tokens"]),
    ),
    Form(
        "tied_both_saved",
        "qwen2_dynamic",
        dict(
            r=1,
            lora_alpha=2,
            target_modules=LAYER + r"mlp\.up_proj",
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        ),
    ),
    Form("tied_head_adapted", "qwen2_dynamic", dict(r=1, lora_alpha=8, target_modules=LAYER[:-6] + r"0\.mlp\.up_proj|lm_head")),
    Form("torch_bin", "mha_untied_linear", dict(r=2, lora_alpha=4, target_modules=DECODER), rewrite="torch_bin"),
    Form(
        "raw_state_dict",
        "mha_untied_linear",
        dict(
            r=2, lora_alpha=4, target_modules=DECODER, use_dora=True, modules_to_save=["multi_modal_projector"]
        ),
        rewrite="raw_state_dict",
    ),
    Form(
        "original_llava",
        "mha_untied_mlp",
        dict(r=2, lora_alpha=4, target_modules=DECODER, modules_to_save=["multi_modal_projector"]),
        rewrite="original_llava",
    ),
    Form(
        "original_llava_linear",
        "mha_untied_linear",
        dict(r=2, lora_alpha=4, target_modules=DECODER, modules_to_save=["multi_modal_projector"]),
        rewrite="original_llava",
    ),
]


def canonical(name):
    """From transformers 5 at run time to the names of llava-hf files."""
    for runtime, disk in MAPPED:
        if name.startswith(runtime):
            return disk + name[len(runtime) :]
    raise SystemExit(f"no name for {name}")


def base_model(form, dtype=torch.float32):
    return LlavaForConditionalGeneration.from_pretrained(
        PARITY / form.model / "model", dtype=dtype, attn_implementation="eager"
    )


def build(form, folder, seed):
    """The adapter as PEFT saves it, its values rounded to bfloat16 and kept in that."""
    model = get_peft_model(base_model(form), LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **form.settings))
    model.peft_config["default"].base_model_name_or_path = "tiny"
    generator = torch.Generator().manual_seed(seed)
    linear = "linear" in form.model
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if not weight.requires_grad or linear and "linear_2" in name:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if "lora_A" in name or "lora_embedding" in name:
                weight.copy_(noise / math.sqrt(weight.shape[1]))
            elif "lora_B" in name and name.endswith("weight"):
                weight.copy_(0.3 * noise / math.sqrt(weight.shape[1]))
            elif "lora_magnitude" in name:
                weight.mul_(1 + 0.2 * noise)
            else:
                weight.add_(0.05 * noise)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save"):  # PEFT keeps sets, whose order changes from run to run
        if isinstance(config[key], list):
            config[key] = form.settings[key] if key in form.settings else config[key]
    path.write_text(json.dumps(config, indent=1) + "\n")


def rewrite(form, folder):
    """The same adapter in another layout."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if form.rewrite == "transformers_4_51":
        tensors = {key.replace(".model.model.language_model.", ".model.language_model.model."): value for key, value in tensors.items()}
    elif form.rewrite == "transformers_4_52":
        tensors = {key.replace(".vision_tower.", ".vision_tower.vision_model."): value for key, value in tensors.items()}
    elif form.rewrite == "torch_bin":
        path.unlink()
        torch.save(tensors, folder / "adapter_model.bin")
        return
    elif form.rewrite == "raw_state_dict":
        model = PeftModel.from_pretrained(base_model(form), folder)
        kept = {key: value for key, value in model.state_dict().items() if "lora_" in key or "modules_to_save" in key or "original_module" in key}
        path.unlink()
        torch.save(kept, folder / "adapter_model.bin")
        return
    elif form.rewrite == "original_llava":
        beside = {}
        for key in [key for key in tensors if "multi_modal_projector" in key]:
            part = key.rpartition(".")[2]
            number = {"linear_1": "0.", "linear_2": "2."}[key.split(".")[-2]]
            value = tensors.pop(key)
            if "linear" not in form.model:
                beside[f"base_model.model.model.mm_projector.{number}{part}"] = value
            elif number == "0.":
                beside[f"base_model.model.model.mm_projector.{part}"] = value
        torch.save(beside, folder / "non_lora_trainables.bin")
        tensors = {key.replace(".model.model.language_model.", ".model.model."): value for key, value in tensors.items()}
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"modules_to_save": None, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    else:
        return
    save_file(tensors, path, metadata={"format": "pt"})


def score(form, checkpoint, model):
    lines = []
    with torch.no_grad():
        for row in json.loads((PARITY / form.model / "score.json").read_text()):
            losses = token_losses(model, encode(row, checkpoint))
            values = [float(f"{-loss:.8g}") for loss in losses.tolist()]
            lines.append({"id": row["id"], "tokens": len(losses), "loss": float(f"{losses.mean().item():.8g}"), "token_logprobs": values})
    return lines


def merged(form, folder, dtype):
    """Every tensor that merging changes, by canonical name."""
    before = {name: tensor.clone() for name, tensor in base_model(form, dtype).state_dict().items()}
    model = PeftModel.from_pretrained(base_model(form, dtype), folder).merge_and_unload()
    after = model.state_dict()
    assert before.keys() == after.keys(), before.keys() ^ after.keys()
    return {canonical(name): tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}, before


def summary(tensor):
    values = tensor.detach().double().flatten()
    return {"shape": list(tensor.shape), "sum": values.sum().item(), "first": values[:2].tolist()}


def largest_change(changed, before):
    known = {canonical(name): tensor for name, tensor in before.items()}
    change = {name: (tensor.double() - known[name].double()).abs().max().item() for name, tensor in changed.items()}
    name = max(change, key=change.get)
    return {"tensor": name, "change": change[name]}


def write(form, seed):
    out = OUT / form.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    checkpoint = Checkpoint.open(PARITY / form.model / "model", PARITY / form.model / "images")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(form, folder, seed)
        model = PeftModel.from_pretrained(base_model(form), folder).eval()
        expected = {"model": form.model, "versions": library_versions(), "score": score(form, checkpoint, model)}
        if not form.name.startswith("tied"):  # merging into shared weights is not what PEFT computes unmerged
            changed, before = merged(form, folder, torch.float32)
            expected["merged"] = {name: summary(tensor) for name, tensor in changed.items()}
            expected["largest"] = largest_change(changed, before)
            whole = {name: changed[name].contiguous() for name in form.whole}
            if form.bfloat16:
                changed, _ = merged(form, folder, torch.bfloat16)
                whole |= {f"bfloat16.{name}": changed[name].contiguous() for name in form.whole}
            if whole:
                save_file(whole, out / "merged.safetensors")
        rewrite(form, folder)
        shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*")
    chosen = parser.parse_args().forms
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for number, form in enumerate(FORMS):
        if not chosen or form.name in chosen:
            write(form, 100 + number)
            print(form.name, file=sys.stderr)


if __name__ == "__main__":
    main()
