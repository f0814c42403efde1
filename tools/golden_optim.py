#!/usr/bin/env python3
"""Writes tests/golden/optim: train configs over the models of tests/golden/parity, and what PyTorch and bitsandbytes
compute of them: moments in eight bits, weights in 16 bits under f32 masters, a tower that trains at its own rate.

    python tools/golden_optim.py [--out DIR] [RUN]...

tests/README.md says what the numbers mean. Takes a few minutes on one core. Needs what tools/golden_parity.py needs, and
bitsandbytes.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import bitsandbytes
import torch
import transformers

from golden.cases import CASES, Run
from golden.checkpoint import Checkpoint, write_adapter
from golden.optim import HALVES, train
from golden.precision import library_versions
from golden_parity import ROOT, one_line_lists, rounded, toml_text

FULL = {"method": "full", "max_steps": 12, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
LORA = {**FULL, "method": "lora"}
ADAPTER = {"r": 64, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"],
           "adapter_name_or_path": "../lora_8bit/adapter"}
# Name, parity case, settings.
RUNS = [
    ("full_8bit", "mha_untied_mlp",
     {**FULL, "optim": "adamw_8bit", "learning_rate": 1e-3, "per_device_train_batch_size": 2, "weight_decay": 0.1}),
    ("full_8bit_tied", "gqa_tied_mlp_vision",
     {**FULL, "optim": "adamw_8bit", "learning_rate": 5e-4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}),
    ("lora_8bit", "mha_untied_mlp",
     {**LORA, "optim": "adamw_8bit", "learning_rate": 1e-3, "mm_projector_lr": 3e-4, "per_device_train_batch_size": 2,
      "r": 64, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}),
    ("lora_bf16", "mha_untied_mlp",
     {**LORA, "precision": "bfloat16", "learning_rate": 1e-3, "per_device_train_batch_size": 2, **ADAPTER}),
    ("lora_f16", "mha_untied_mlp",
     {**LORA, "precision": "float16", "learning_rate": 1e-3, "per_device_train_batch_size": 2, "optim": "adamw_8bit",
      "initial_scale_power": 8, **ADAPTER}),
    ("full_bf16", "mha_untied_mlp",
     {**FULL, "precision": "bfloat16", "learning_rate": 5e-4, "per_device_train_batch_size": 2, "weight_decay": 0.1}),
    ("full_bf16_biases", "qwen2_dynamic",
     {**FULL, "precision": "bfloat16", "learning_rate": 5e-4, "per_device_train_batch_size": 3}),
    ("full_bf16_8bit", "gqa_tied_mlp_vision",
     {**FULL, "precision": "bfloat16", "optim": "adamw_8bit", "learning_rate": 3e-4, "per_device_train_batch_size": 2}),
    ("full_f16", "mha_untied_mlp",
     {**FULL, "precision": "float16", "learning_rate": 5e-4, "per_device_train_batch_size": 2,
      "initial_scale_power": 8}),
    ("tower", "gqa_tied_mlp_vision",
     {**FULL, "unfreeze_mm_vision_tower": True, "learning_rate": 5e-4, "mm_projector_lr": 2e-3,
      "mm_vision_tower_lr": 1e-4, "weight_decay": 0.1, "per_device_train_batch_size": 2}),
    ("tower_bf16", "gqa_tied_mlp_vision",
     {**FULL, "unfreeze_mm_vision_tower": True, "precision": "bfloat16", "learning_rate": 3e-4,
      "mm_projector_lr": 5e-4, "mm_vision_tower_lr": 1e-4, "per_device_train_batch_size": 2}),
]


def largest(rows, other, key):
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(rows, other))


def write_run(out, name, case, settings):
    """The config, an adapter where one is needed, and the expected steps."""
    parity = ROOT / "tests/golden/parity" / case.name
    checkpoint = Checkpoint.open(parity / "model", parity / "images")
    folder = out / name
    folder.mkdir(parents=True)
    there = f"../../parity/{case.name}"
    config = {
        "model_name_or_path": f"{there}/model",
        "data_path": f"{there}/{case.data_name}",
        "image_folder": f"{there}/images",
        "precision": "float32",
        "shuffle": False,
        **settings,
    }
    if settings["method"] == "lora" and "adapter_name_or_path" not in settings:
        config["adapter_name_or_path"] = "adapter"
        write_adapter(folder / "adapter", checkpoint, Run(name, settings), case.seed, case.linear_projector)
    path = folder / "run.toml"
    path.write_text(toml_text(config))
    half = HALVES.get(config["precision"])
    eight = settings.get("optim") == "adamw_8bit"
    steps = train(checkpoint, path, "blockwise" if eight else "torch", half)
    result = {"versions": library_versions() | {"bitsandbytes": bitsandbytes.__version__}}
    print(f"{name}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}")
    if eight:
        library, on_grid = (train(checkpoint, path, kind, half) for kind in ("bitsandbytes", "blockwise_on_grid"))
        result["bitsandbytes_on_cpu"] = {
            "with_its_indices": largest(on_grid, library, "loss"),
            "with_the_nearest_indices": largest(steps, library, "loss"),
        }
        print("  loss against bitsandbytes on a processor:", result["bitsandbytes_on_cpu"])
        assert result["bitsandbytes_on_cpu"]["with_its_indices"] < 1e-4
    if half is not None:
        other = train(checkpoint, path, "blockwise" if eight else "torch", half, whole=True)
        print(f"  whole model: loss within {largest(steps, other, 'loss'):.1e}")
        for step, row in zip(steps, other):
            step["whole_model_in_16_bits"] = {"loss": row["loss"], "grad_norm": row["grad_norm"]}
    text = json.dumps(rounded(result | {"steps": steps}), indent=1)
    (folder / "expected.json").write_text(one_line_lists(text) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="names of runs (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/golden/optim")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases = {case.name: case for case in CASES}
    for name, case, settings in RUNS:
        if arguments.runs and name not in arguments.runs:
            continue
        if (arguments.out / name).exists():
            shutil.rmtree(arguments.out / name)
        write_run(arguments.out, name, cases[case], settings)
    for path in arguments.out.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
