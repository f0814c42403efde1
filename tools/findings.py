#!/usr/bin/env python3
"""The study's findings, small: its methods side by side on the embedded model and data, three seeds each.

    python tools/findings.py [--program target/release/wgpu-llava] [--work DIR] [--seeds 3] [--out docs]

Writes findings.json (every run) and prints the table of docs/findings.md. Runs that are in DIR already are not run again.
Needs Python 3.11 alone; 21 runs of a minute or two each on two cores (Mesa 26; some three times as long on Mesa 22).

Each row is a stage 2 from the same stage 1 of its seed and picture size: 120 steps of 32 records. Where text-only
records are mixed in they come on top, as in the study: a fifth of 150 steps, made by tools/base/make_corpus.py with a
seed that the base has not seen. Another such file, of 500 records, measures what a model still knows of language.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH, PICTURE_RECORDS, QUESTIONS = 120, 32, 38575, 1000
LAST = 20

# The study's ratio: adapters learn at five times the rate of full fine-tuning.
RATE, LOW_RATE = 1e-3, 2e-4
LORA_64 = {"method": "lora", "r": 64, "lora_alpha": 128, "learning_rate": RATE}
ROWS = {
    "full": {"method": "full", "learning_rate": LOW_RATE},
    "LoRA r 8, alpha 16": {**LORA_64, "r": 8, "lora_alpha": 16},
    "LoRA r 64, alpha 128": LORA_64,
    "QLoRA r 64, alpha 128": {**LORA_64, "method": "qlora"},
    "LoRA r 64, alpha 16, a fifth of the rate": {**LORA_64, "lora_alpha": 16, "learning_rate": LOW_RATE},
    "LoRA r 64, alpha 128, 32 pixels": {**LORA_64, "image_size": 32},
    "LoRA r 64, alpha 128, text mixed in": {**LORA_64, "text": True},
}


def toml(settings):
    lines = []
    for key, value in settings.items():
        if isinstance(value, list):
            entries = ", ".join("{ " + ", ".join(f"{k} = {json.dumps(v)}" for k, v in entry.items()) + " }"
                                for entry in value)
            lines.append(f"{key} = [{entries}]")
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Study:
    def __init__(self, program, work):
        self.program, self.work = program, work
        self.mixed = self.corpus("text-mixed.json", PICTURE_RECORDS // 4, 77)
        self.held_out = self.corpus("text-held-out.json", 500, 78)

    def corpus(self, name, count, seed):
        path = self.work / name
        if not path.exists():
            make = ROOT / "tools/base/make_corpus.py"
            command = [sys.executable, make, path, "--records", count, "--seed", seed]
            subprocess.run([str(part) for part in command], check=True)
        return path

    def run(self, *command):
        command = [str(part) for part in (self.program, *command)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def train(self, name, settings):
        """A stage's folder, trained unless it is there."""
        folder = self.work / name
        if not (folder / "done").exists():
            config = self.work / f"{name}.toml"
            config.write_text(toml(settings))
            resume = ["--resume"] if (folder / "metrics.jsonl").exists() else []
            self.run("train", config, "--output-dir", folder, "--quiet", *resume)
            (folder / "done").touch()
        return folder

    def stage_1(self, seed, size):
        return self.train(f"pretrain-{size}-{seed}", {
            "model_name_or_path": "embedded:tiny", "data_path": "embedded:easy-vqa-captions", "version": "plain",
            "method": "projector", "mm_projector_type": "mlp2x_gelu", "image_size": size, "seed": seed,
            "per_device_train_batch_size": BATCH, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
        }) / "model"

    def text_loss(self, model, adapter, name):
        """Nats a token of held-out text."""
        out = self.work / f"{name}.score.jsonl"
        if not out.exists():
            self.run("score", "--model", model, "--data", self.held_out, "--out", out, "--quiet",
                     *(["--adapter", adapter] if adapter else []))
        lines = read_lines(out)
        return sum(line["loss"] * line["tokens"] for line in lines) / sum(line["tokens"] for line in lines)

    def accuracy(self, model, adapter, name):
        out = self.work / f"{name}.accuracy.json"
        if not out.exists():
            text = self.run("eval", "easy-vqa", "--model", model, "--limit", QUESTIONS, "--json", "--quiet",
                            *(["--adapter", adapter] if adapter else []))
            out.write_text(text)
        return json.loads(out.read_text())

    def stage_2(self, row, seed):
        settings = dict(ROWS[row])
        size, text = settings.pop("image_size", 64), settings.pop("text", False)
        model = self.stage_1(seed, size)
        name = row.replace(",", "").replace(" ", "-") + f"-{seed}"
        data = [{"path": "embedded:easy-vqa-questions"}] + ([{"path": str(self.mixed)}] if text else [])
        folder = self.train(name, {
            "model_name_or_path": str(model), "data_path": data, "version": "v1", "seed": seed,
            "per_device_train_batch_size": BATCH, "max_steps": STEPS * 5 // 4 if text else STEPS,
            "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, **settings,
        })
        metrics = read_lines(folder / "metrics.jsonl")
        adapter = None if settings["method"] == "full" else folder / "adapter"
        model = folder / "model" if adapter is None else model
        return {
            "row": row, "seed": seed, "settings": ROWS[row],
            "accuracy": self.accuracy(model, adapter, name)["accuracy"],
            "loss": statistics.mean(step["loss"] for step in metrics[-LAST:]),
            "loss_at_half": statistics.mean(step["loss"] for step in metrics[STEPS // 2 - LAST : STEPS // 2]),
            "text_loss": self.text_loss(model, adapter, name),
            "seconds_per_step": statistics.median(step["step_seconds"] for step in metrics),
            "device_bytes": metrics[-1]["device_bytes"],
        }


def table(results, base_text_loss):
    lines = [
        f"| stage 2 | right of {QUESTIONS:,} | loss, last {LAST} steps | loss before the middle | held-out text, nats a token "
        "| memory |",
        "|---|---|---|---|---|---|",
        f"| the base, before any stage | | | | {base_text_loss:.4f} | |",
    ]

    def spread(rows, key, form):
        values = [row[key] for row in rows]
        mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{form(mean)} ± {form(deviation)}"

    for name in ROWS:
        rows = [result for result in results if result["row"] == name]
        if rows:
            percent, number = (lambda x: f"{100 * x:.1f} %"), (lambda x: f"{x:.4f}")
            lines.append(f"| {name} | {spread(rows, 'accuracy', percent)} | {spread(rows, 'loss', number)} "
                         f"| {spread(rows, 'loss_at_half', number)} | {spread(rows, 'text_loss', number)} "
                         f"| {rows[0]['device_bytes'] / 1e6:.1f} MB |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/wgpu-llava")
    parser.add_argument("--work", type=Path, default=Path("findings"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.program.resolve(), arguments.work.resolve())
    base_text_loss = study.text_loss("embedded:tiny", None, "base")
    results = []
    # Seed by seed: what is there at any time is a whole table.
    for seed in range(arguments.seeds):
        for row in ROWS:
            results.append(study.stage_2(row, seed))
            print(json.dumps(results[-1]), flush=True)
    versions = {"program": study.run("--version").strip(), "machine": platform.machine(),
                "adapters": [json.loads(line) for line in study.run("devices", "--json").splitlines()]}
    arguments.out.mkdir(exist_ok=True)
    whole = {"command": "tools/findings.py", "versions": versions, "base_text_loss": base_text_loss, "runs": results}
    (arguments.out / "findings.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(table(results, base_text_loss))


if __name__ == "__main__":
    main()
