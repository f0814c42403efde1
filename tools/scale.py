#!/usr/bin/env python3
"""What `estimate` says of many devices, and how far off it is where they are there: docs/scale.md and docs/scale.json.

    python tools/scale.py [--program target/release/wgpu-llava]

Two parts. Measured: `train` on one to four devices of this machine, which all are its processor, beside the step time
that `estimate` gives once it knows the rate of one device (its measured step). Predicted: 7B to 65B on 1 to 64 cards of
named rates, which are assumptions and no measurement. Standard library alone.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Assumed of each card, in the places of what `estimate` measures where it can.
CARD = {"memory": "24GB", "tflops": 50.0, "link": 12.0, "network": 10.0, "devices_of_a_host": 8}
SIZES = ["7b", "13b", "33b", "65b"]
COUNTS = [1, 4, 16, 64]
# Method, and what a run of that size needs on cards of 24 GB.
LAYOUTS = [
    ("qlora", ["zero_stage=2", "optim=adamw_8bit"]),
    ("qlora", ["zero_stage=3", "optim=adamw_8bit"]),
    ("lora", ["zero_stage=3"]),
    ("full", ["zero_stage=2", "offload=true", "precision=bfloat16"]),
]
COMMON = ["gradient_checkpointing=full", "per_device_train_batch_size=1", "gradient_accumulation_steps=8",
          "model_max_length=2048"]
RUN = """model_name_or_path = "embedded:tiny"
data_path = [{ path = "embedded:easy-vqa-questions", limit = 256 }]
per_device_train_batch_size = 8
max_steps = 10
learning_rate = 1e-3
"""


def settings(pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def estimate(program, arguments):
    return json.loads(subprocess.run([program, "estimate", "--json", *arguments], check=True, capture_output=True).stdout)


def measured(program):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "run.toml")
        config.write_text(RUN)
        for method, others in [("lora", []), ("full", []), ("full", ["zero_stage=1"]), ("full", ["zero_stage=2"]),
                               ("full", ["offload=true"])]:
            rate = None
            for devices in [1, 2, 4]:
                pairs = [f"method={method}", f"devices={[0] * devices}", f"gradient_accumulation_steps={4 // devices}"]
                pairs += others
                out = pathlib.Path(tempfile.mkdtemp(dir=folder), "run")
                subprocess.run([program, "--quiet", "train", config, "--output-dir", out, *settings(pairs)], check=True)
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                seconds = statistics.median(line["step_seconds"] for line in lines[2:])
                stage = estimate(program, [config, *settings(pairs), "--tflops", str((rate or 1e9) / devices / 1e12)])
                stage = stage["stages"][0]
                if rate is None:
                    # What one device reached: it is what all of them share.
                    rate = stage["flops_per_step"] / seconds
                    continue
                rows.append({"method": method, "settings": others, "devices": devices, "measured": seconds,
                             "predicted": stage["seconds_per_step"], "error": stage["seconds_per_step"] / seconds - 1})
                print(rows[-1], flush=True)
    return rows


def predicted(program):
    rows = []
    for size in SIZES:
        for method, others in LAYOUTS:
            for devices in COUNTS:
                hosts = max(1, devices // CARD["devices_of_a_host"])
                found = estimate(program, ["--recipe", f"{size}-{method}", *settings(COMMON + others),
                                           "--devices", str(devices), "--hosts", str(hosts), "--memory", CARD["memory"],
                                           "--tflops", str(CARD["tflops"]), "--link", str(CARD["link"]),
                                           "--network", str(CARD["network"])])["stages"][0]
                positions = found["batch"]["tokens"] * 8 * devices
                rows.append({"size": size, "method": method, "settings": others, "devices": devices, "hosts": hosts,
                             "device_bytes": found["total_bytes"], "host_bytes": found["host_bytes"],
                             "fits": found["fits"], "seconds": found["seconds"],
                             "tokens_per_second": positions / found["seconds_per_step"]})
            print(size, method, others, flush=True)
    return rows


def table(data):
    text = ["# Many devices: what is predicted, and how far off it is", "",
            "Made by `tools/scale.py`; the figures are in [scale.json](scale.json).", "",
            "## Beside measured runs", "",
            f"Ten steps of the embedded model on one, two and four devices that all are the processor of one machine "
            f"({data['device']}): a step's median beside what `estimate` says for as many devices that share the rate of "
            "one device's own step. The links are measured by `estimate`.", "",
            "| method | settings | devices | measured | predicted | off by |", "|---|---|---|---|---|---|"]
    for row in data["measured"]:
        text.append(f"| {row['method']} | {', '.join(row['settings'])} | {row['devices']} | {row['measured']:.3f} s | "
                    f"{row['predicted']:.3f} s | {row['error']:+.0%} |")
    errors = [abs(row["error"]) for row in data["measured"]]
    text += ["", f"The median error is {statistics.median(errors):.0%}, the largest {max(errors):.0%}.", "",
             "## Clusters that are not there", "",
             f"Assumed, not measured: cards of {CARD['memory']}, {CARD['tflops']:.0f} TFLOP/s in products, "
             f"{CARD['link']:.0f} GB/s to the host, {CARD['devices_of_a_host']} a host, {CARD['network']:.0f} GB/s between "
             "hosts. Eight micro-batches of one sequence of 2,048 positions on each card, full checkpointing, rank 64. "
             "Thousands of tokens a second; in brackets what does not fit the card.", ""]
    for size in SIZES:
        text += [f"### {size.upper()}", "",
                 "| method | GB a card | GB a host | " + " | ".join(str(count) for count in COUNTS) + " |",
                 "|---" * (3 + len(COUNTS)) + "|"]
        for method, others in LAYOUTS:
            rows = [row for row in data["predicted"] if (row["size"], row["method"], row["settings"]) == (size, method, others)]
            cells = [f"{row['tokens_per_second'] / 1e3:.1f}" if row["fits"] else f"({row['tokens_per_second'] / 1e3:.1f})"
                     for row in rows]
            spread = f"{rows[0]['device_bytes'] / 1e9:.1f} to {rows[-1]['device_bytes'] / 1e9:.1f}"
            text.append(f"| {method}, {', '.join(others)} | {spread} | {max(row['host_bytes'] for row in rows) / 1e9:.0f} | "
                        + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=ROOT / "target/release/wgpu-llava")
    program = parser.parse_args().program
    device = json.loads(subprocess.run([program, "devices", "--json"], check=True, capture_output=True).stdout.splitlines()[0])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    data = {"command": "python tools/scale.py", "commit": commit, "device": device["name"], "driver": device["driver"],
            "assumed": CARD, "measured": measured(program), "predicted": predicted(program)}
    (ROOT / "docs/scale.json").write_text(json.dumps(data, indent=1) + "\n")
    (ROOT / "docs/scale.md").write_text(table(data))


if __name__ == "__main__":
    main()
