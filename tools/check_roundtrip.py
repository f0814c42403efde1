"""Loads a model folder, and an adapter if given, that wgpu-llava wrote in transformers and PEFT, and compares greedy
answers with those of `wgpu-llava generate --json`. Ends with 1 if any differs.

Checked with torch 2.15.0, peft 0.21.2, pillow 13.0.0, and both transformers 5.23.0 and 4.57.1:

    python tools/check_roundtrip.py --binary target/release/wgpu-llava --model DIR [--adapter DIR] \
        [--image FILE] --prompt TEXT [--prompt TEXT ...] [--version v1|plain] [--max-new-tokens N]

Where transformers' own two best logits lie within --tie of each other, either token is right; the comparison of that
answer ends there, and says so.
"""

import argparse
import json
import subprocess
import sys

import torch
import transformers
from PIL import Image
from transformers import (AutoConfig, AutoTokenizer, AutoModelForCausalLM, AutoProcessor, CLIPImageProcessor,
                          LlavaForConditionalGeneration)

from golden.checkpoint import forget_lengths

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
          "and polite answers to the user's questions.")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--prompt", action="append", required=True)
    parser.add_argument("--version", choices=["v1", "plain"], default="v1")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--tie", type=float, default=0.005)
    return parser.parse_args()


def load(args):
    """The model in float32, with a complaint for every weight that transformers had to make up or leave out."""
    is_llava = AutoConfig.from_pretrained(args.model).model_type == "llava"
    kind = LlavaForConditionalGeneration if is_llava else AutoModelForCausalLM
    model, info = kind.from_pretrained(args.model, output_loading_info=True)
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        sys.exit(f"{args.model}: transformers loads it with {wrong}")
    model = model.float().eval()
    if args.adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, args.adapter).eval()
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        outside = [name for name in adapted if "vision_tower" in name or "multi_modal_projector" in name]
        if outside or not adapted:
            sys.exit(f"{args.adapter}: PEFT adapts {len(adapted)} modules, outside the language model: {outside[:4]}")
        print(f"PEFT adapts {len(adapted)} modules")
    if is_llava:
        processor = AutoProcessor.from_pretrained(args.model)
        if processor.image_token_id != model.config.image_token_index:
            sys.exit(f"{args.model}: <image> is token {processor.image_token_id}, not {model.config.image_token_index}")
    return model, is_llava


def prompt_ids(tokenizer, text, config, pictures):
    """BOS, then chunk by chunk, each picture as so many image tokens."""
    empty = tokenizer.encode("")
    ids = [token for token in empty if token != tokenizer.eos_token_id]
    chunks = text.split("<image>")
    for number, chunk in enumerate(chunks):
        ids += tokenizer.encode(chunk, add_special_tokens=False) if chunk else []
        if number + 1 < len(chunks):
            ids += [config.image_token_index] * pictures
    return ids


def ask_transformers(model, is_llava, tokenizer, args, prompt):
    text = "".join("<image>\n" for _ in args.image) + prompt
    if args.version == "plain":
        # Nothing is asked: a picture without a text has no newline after it.
        text = text if prompt else "\n".join("<image>" for _ in args.image)
    else:
        text = f"{SYSTEM} USER: {text} ASSISTANT:"
    inputs, pictures = {}, 0
    if is_llava and args.image:
        vision = model.config.vision_config
        whole = model.config.vision_feature_select_strategy == "full"
        pictures = (vision.image_size // vision.patch_size) ** 2 + int(whole)
        images = [Image.open(path).convert("RGB") for path in args.image]
        inputs["pixel_values"] = CLIPImageProcessor.from_pretrained(args.model)(images, return_tensors="pt").pixel_values
    ids = torch.tensor([prompt_ids(tokenizer, text, model.config, pictures)])
    forget_lengths(model)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                         max_new_tokens=args.max_new_tokens, output_logits=True, return_dict_in_generate=True, **inputs)
    best = [step[0].float().topk(2).values for step in out.logits]
    return out.sequences[0, ids.shape[1]:].tolist(), [(two[0] - two[1]).item() for two in best]


def ask_binary(args, prompt):
    command = [args.binary, "generate", "--model", args.model, "--prompt", prompt, "--version", args.version, "--json",
               "--temperature", "0", "--max-new-tokens", str(args.max_new_tokens)]
    command += ["--adapter", args.adapter] if args.adapter else []
    for path in args.image:
        command += ["--image", path]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)["token_ids"]


def compare(ours, theirs, gaps, tokenizer, args):
    """A word on the answers and whether they agree."""
    if args.version == "plain":
        # The template ends an answer with a newline; transformers knows nothing of it.
        stop = tokenizer.encode("\n", add_special_tokens=False)
        if len(stop) == 1 and stop[0] in theirs:
            end = theirs.index(stop[0]) + 1
            theirs, ours = theirs[:end], ours[:end]
    for position, (gap, token) in enumerate(zip(gaps, theirs)):
        if position >= len(ours) or ours[position] != token:
            if gap <= args.tie:
                return f"tie at token {position} (gap {gap:.2e})", True
            return f"DIFFERS at token {position} (gap {gap:.2e}): {ours} for {theirs}", False
    return ("same", True) if len(ours) == len(theirs) else (f"DIFFERS in length: {ours} for {theirs}", False)


def main():
    args = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    model, is_llava = load(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    right = 0
    for prompt in args.prompt:
        ours = ask_binary(args, prompt)
        theirs, gaps = ask_transformers(model, is_llava, tokenizer, args, prompt)
        verdict, agrees = compare(ours, theirs, gaps, tokenizer, args)
        right += agrees
        print(f"{prompt!r} -> {tokenizer.decode(theirs)!r}: {verdict}")
    print(f"{right} of {len(args.prompt)} answers agree")
    sys.exit(right != len(args.prompt))


if __name__ == "__main__":
    main()
