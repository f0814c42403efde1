#!/usr/bin/env python3
"""What `estimate` says of many devices, and how far off it is where they are there: docs/scale.md and docs/scale.json.

    python tools/scale.py [--program target/release/wgpu-llava]

Two parts. Measured: `train` on two and four devices of this machine, which all are its processor, beside the step time that
`estimate` gives once it knows the rate of as many devices that have nothing to do with each other: processes that run at the
same time. Predicted: 7B to 65B on 1 to 64 cards of named rates, which are assumptions and no measurement. Standard library
alone.
"""
import argparse
import array
import json
import pathlib
import random
import shutil
import statistics
import struct
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Assumed of each card, in the places of what `estimate` measures where it can.
CARD = {"memory": "24GB", "tflops": 50.0, "link": 12.0, "network": 10.0, "host_bandwidth": 200.0, "devices_of_a_host": 8}
SIZES = ["7b", "13b", "33b", "65b"]
COUNTS = [1, 4, 16, 64]
# Method, and what a run of that size needs on cards of 24 GB.
LAYOUTS = [
    ("qlora", ["zero_stage=2", "optim=adamw_8bit"]),
    ("qlora", ["zero_stage=3", "optim=adamw_8bit"]),
    ("lora", ["zero_stage=3"]),
    ("full", ["zero_stage=3", "precision=bfloat16", "optim=adamw_8bit"]),
    ("full", ["zero_stage=3", "offload=true", "precision=bfloat16"]),
]
COMMON = ["gradient_checkpointing=full", "per_device_train_batch_size=1", "gradient_accumulation_steps=8",
          "model_max_length=2048"]
# Wide enough that there is something to move.
DECODER = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 4, "head_dim": 64}
RUN = """model_name_or_path = "{model}"
data_path = "{data}"
per_device_train_batch_size = 2
max_steps = 5
learning_rate = 1e-4
"""
# Layouts of each method.
MEASURED = {"lora": [[]],
            "full": [[], ["zero_stage=1"], ["zero_stage=2"], ["zero_stage=3"], ["offload=true"]]}
REPEATS = 2


def settings(pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def estimate(program, arguments):
    return json.loads(subprocess.run([program, "estimate", "--json", *arguments], check=True, capture_output=True).stdout)


def make_model(program, folder):
    """A LLaMA of random weights, with the tokenizer of the embedded model."""
    start = 'model_name_or_path = "embedded:tiny"\ndata_path = "embedded:easy-vqa-questions"\nmethod = "full"\nmax_steps = 1\n'
    pathlib.Path(folder, "start.toml").write_text(start)
    out = pathlib.Path(folder, "start")
    subprocess.run([program, "--quiet", "train", pathlib.Path(folder, "start.toml"), "--output-dir", out], check=True)
    model = pathlib.Path(folder, "model")
    model.mkdir()
    for file in (out / "model").glob("*token*"):
        shutil.copy(file, model)
    config = json.loads((out / "model/config.json").read_text())["text_config"]
    config |= DECODER | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocab, width], "model.norm.weight": [width], "lm_head.weight": [vocab, width]}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [width, width] for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [inner, width] for name in ["gate", "up"]}
        shapes |= {f"{at}.mlp.down_proj.weight": [width, inner]}
        shapes |= {f"{at}.{name}_layernorm.weight": [width] for name in ["input", "post_attention"]}
    header, data, draws = {}, bytearray(), random.Random(0)
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        block = [draws.gauss(0, 0.02) for _ in range(min(count, 1 << 14))] if len(shape) > 1 else [1.0] * count
        values = array.array("f", (block * (count // len(block) + 1))[:count]).tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return model


def make_data(folder):
    """Records of text alone."""
    draws = random.Random(0)
    words = ["circle", "square", "triangle", "red", "blue", "green", "is", "a", "the", "what", "shape", "colour", "in"]
    text = lambda count: " ".join(draws.choice(words) for _ in range(count))
    turns = lambda: [{"from": "human", "value": text(20)}, {"from": "gpt", "value": text(20)}]
    path = pathlib.Path(folder, "data.json")
    path.write_text(json.dumps([{"id": str(at), "conversations": turns()} for at in range(64)]))
    return path


def step_seconds(program, config, folder, pairs, processes=1):
    """Of all steps but the first ones, of so many processes that run at the same time."""
    outs = [pathlib.Path(tempfile.mkdtemp(dir=folder), "run") for _ in range(processes)]
    runs = [subprocess.Popen([program, "--quiet", "train", config, "--output-dir", out, *settings(pairs)]) for out in outs]
    if any([run.wait() for run in runs]):
        raise SystemExit("a run failed")
    lines = [json.loads(line) for out in outs for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if line["step"] > 2]


def measured(program):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "run.toml")
        config.write_text(RUN.format(model=make_model(program, folder), data=make_data(folder)))
        for method, layouts in MEASURED.items():
            for devices in [2, 4]:
                common = [f"method={method}", f"gradient_accumulation_steps={4 // devices}"]
                several = [*common, f"devices={[0] * devices}"]
                apart, found = [], [[] for _ in layouts]
                # In turns, so that what else the machine does is in all of them.
                for _ in range(REPEATS):
                    apart += step_seconds(program, config, folder, [*common, "devices=[0]"], devices)
                    for others, seconds in zip(layouts, found):
                        seconds += step_seconds(program, config, folder, [*several, *others])
                apart = statistics.median(apart)
                for others, seconds in zip(layouts, found):
                    pairs, seconds = settings([*several, *others]), statistics.median(seconds)
                    flops = estimate(program, [config, *pairs])["stages"][0]["flops_per_step"]
                    told = estimate(program, [config, *pairs, "--tflops", str(flops / apart / 1e12)])["stages"][0]
                    rows.append({"method": method, "settings": others, "devices": devices, "apart": apart,
                                 "measured": seconds, "predicted": told["seconds_per_step"], "parts": told["seconds"],
                                 "error": told["seconds_per_step"] / seconds - 1})
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
                                           "--network", str(CARD["network"]),
                                           "--host-bandwidth", str(CARD["host_bandwidth"])])["stages"][0]
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
            f"Steps of a small decoder ({DECODER['num_hidden_layers']} layers of width {DECODER['hidden_size']}, random weights) "
            f"on two and four devices that all are the processor of one machine ({data['device']}): the median of "
            f"{3 * REPEATS} beside what `estimate` says for devices of the rate that as many had in processes of their own, at "
            "the same time. What is foretold is what it costs to be one run: links, sums and updates are measured by `estimate`.",
            "", "| method | settings | devices | apart | measured | predicted | off by |", "|---|---|---|---|---|---|---|"]
    for row in data["measured"]:
        text.append(f"| {row['method']} | {', '.join(row['settings'])} | {row['devices']} | {row['apart']:.3f} s | "
                    f"{row['measured']:.3f} s | "
                    f"{row['predicted']:.3f} s | {row['error']:+.0%} |")
    errors = [abs(row["error"]) for row in data["measured"]]
    text += ["", f"The median error is {statistics.median(errors):.0%}, the largest {max(errors):.0%}.", "",
             "## Clusters that are not there", "",
             f"Assumed, not measured: cards of {CARD['memory']}, {CARD['tflops']:.0f} TFLOP/s in products, "
             f"{CARD['link']:.0f} GB/s to the host, {CARD['devices_of_a_host']} a host, whose memory reads and writes "
             f"{CARD['host_bandwidth']:.0f} GB/s, {CARD['network']:.0f} GB/s between hosts. Eight micro-batches of one sequence of 2,048 positions on each card, full checkpointing, rank 64. "
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
