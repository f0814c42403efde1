"""Writes tests/golden/formats: a tiny random LLaVA in each name layout, a tiny LLaMA in shards, PEFT adapters, and what
PyTorch, transformers and PEFT say about them (expected.json).

Made with torch 2.15.0, transformers 5.23.0, peft 0.21.2, safetensors 0.8.0, tokenizers 0.23.3:

    python tools/golden_formats.py
"""

import json
import pathlib
import shutil

import peft
import safetensors
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

OUT = pathlib.Path(__file__).parent.parent / "tests/golden/formats"
WORDS = "what is in the picture ? a red blue circle square two three USER: ASSISTANT: caption".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
MAPPED = [("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
          ("model.vision_tower.", "vision_tower.vision_model."), ("model.multi_modal_projector.", "multi_modal_projector.")]


def canonical(name):
    """From transformers 5 at run time to the names of llava-hf files."""
    for runtime, disk in MAPPED:
        if name.startswith(runtime):
            return disk + name[len(runtime):]
    raise SystemExit(f"no name for {name}")


def text_config(**more):
    return dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=24, rms_norm_eps=1e-5, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **more)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 and name.endswith("weight") else 0.3 * noise)
    return model.eval()


def tokenizer(folder):
    words = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))


def folder(name):
    path = OUT / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def summary(tensor):
    values = tensor.detach().double().flatten()
    return {"shape": list(tensor.shape), "sum": values.sum().item(), "first": values[:3].tolist()}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def llava_layouts(expected):
    vision = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text_config()),
                         image_token_index=3, image_seq_length=4)
    model = randomise(LlavaForConditionalGeneration(config), 1)
    model.save_pretrained(folder("llava_v5"))
    runtime = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # As releases up to 4.x write it: sparse, ids at the top, rope_theta not in rope_parameters.
    old_config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 3,
                  "ignore_index": -100, "projector_hidden_act": "gelu", "pad_token_id": 4, "torch_dtype": "float32",
                  "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "transformers_version": "4.37.0",
                  "text_config": {"model_type": "llama", "torch_dtype": "float32", **text_config()},
                  "vision_config": {"model_type": "clip_vision_model", **vision}}
    with_vision_model = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in runtime.items()}
    layouts = {"llava_old": {canonical(name): tensor for name, tensor in runtime.items()},
               "llava_runtime_4_52": with_vision_model, "llava_runtime_5": runtime}
    for name, tensors in layouts.items():
        path = folder(name)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        write_json(path / "config.json", old_config)
    tokenizer(OUT / "llava_old")
    expected["llava"] = {canonical(name): summary(tensor) for name, tensor in runtime.items()}
    return model


def llama(expected):
    config = LlamaConfig(**text_config(tie_word_embeddings=True, head_dim=6, rope_parameters={"rope_type": "default",
                                                                                           "rope_theta": 50000.0}))
    model = randomise(LlamaForCausalLM(config), 2).to(torch.bfloat16)
    path = folder("llama_sharded")
    model.save_pretrained(path, max_shard_size="3KB")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}) + "\n")
    tied = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    expected["llama"] = {f"language_model.{name}": summary(tensor) for name, tensor in tied.items()}
    return model


def adapter(expected, model, name, target, prefix, **more):
    """Trains nothing: gives both matrices random values, and notes scale·B·A of every module as PEFT computes it."""
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, lora_dropout=0.05, target_modules=target, **more))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    path = folder(name)
    wrapped.save_pretrained(path)
    (path / "README.md").unlink()
    settings = json.loads((path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "tiny"
    write_json(path / "adapter_config.json", settings)
    deltas = {}
    for module_name, module in wrapped.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            module_name = module_name.removeprefix("base_model.model.")
            plain = canonical(module_name) if "language_model" in module_name else f"language_model.{module_name}"
            deltas[plain] = {"scale": module.scaling["default"], **summary(module.get_delta_weight("default"))}
    saved = load_file(path / "adapter_model.safetensors")
    whole = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items() if ".lora_" not in key}
    expected[name] = {"deltas": deltas, "saved": {canonical(key): summary(tensor) for key, tensor in whole.items()}}
    if prefix:
        renamed = {key.replace(prefix[0], prefix[1]): tensor for key, tensor in saved.items()}
        save_file(renamed, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return wrapped.unload()


def main():
    torch.set_num_threads(1)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, safetensors, tokenizers)}
    expected = {"versions": versions}
    llava = llava_layouts(expected)
    linears = r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    everywhere = rf".*language_model\.layers\.\d+\.{linears}"
    adapter(expected, llava, "adapter_llava", everywhere, None, modules_to_save=["multi_modal_projector"])
    llava = randomise(LlavaForConditionalGeneration(llava.config), 1)
    adapter(expected, llava, "adapter_llava_4_51", everywhere, ("model.model.language_model.", "model.language_model.model."),
            use_rslora=True, rank_pattern={r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 1},
            alpha_pattern={"v_proj": 5, r"layers\.0\.mlp\.up_proj": 0.5})
    small = llama(expected)
    adapter(expected, small.float(), "adapter_llama", ["q_proj", "v_proj"], None)
    write_json(OUT / "expected.json", expected)


if __name__ == "__main__":
    main()
