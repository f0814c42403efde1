"""Tiny random model and adapter folders, as transformers and PEFT save them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from . import layouts
from . import tokenizer as tiny_tokenizer

TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
LAYER_LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@dataclass
class Checkpoint:
    """A model folder and the things read from it."""

    folder: Path
    images: Path
    tokenizer: object
    processor: object
    legacy: bool
    image_token_id: int
    image_tokens: int

    @classmethod
    def open(cls, folder, images):
        config = json.loads((folder / "config.json").read_text())
        vision = config["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        return cls(
            folder=folder,
            images=images,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            processor=CLIPImageProcessorPil.from_pretrained(folder),
            legacy=json.loads((folder / "tokenizer_config.json").read_text())["legacy"],
            image_token_id=config["image_token_index"],
            image_tokens=patches + (config["vision_feature_select_strategy"] == "full"),
        )

    def load(self, double, adapter=None, quantization=None):
        """The model in float32 or float64, eager attention, with a trainable adapter on top if one is given.

        With `quantization` (a BitsAndBytesConfig) the decoder's linears are bitsandbytes'; in float64, dense ones with
        what these stand for.
        """
        quantized = {"quantization_config": quantization, "device_map": "cpu"} if quantization else {}
        model = LlavaForConditionalGeneration.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager", **quantized
        )
        if quantization and double:
            dense = LlavaForConditionalGeneration.from_pretrained(
                self.folder, dtype=torch.float32, attn_implementation="eager"
            )
            for name, module in model.named_modules():
                if hasattr(getattr(module, "weight", None), "quant_state"):
                    weight = module.weight
                    values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                    dense.get_submodule(name).weight.data = values
            model = dense
        if adapter:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        if double:
            model.double()
            for rotary in rotaries(model):
                rotary.inv_freq, _ = rope_function(rotary)(rotary.config, "cpu")
                rotary.original_inv_freq = rotary.inv_freq
        return model.eval()


def four_bits(kind, double):
    """The decoder's linears in four bits, computed with in float32."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )


def rotaries(model):
    return (module for module in model.modules() if hasattr(module, "original_inv_freq"))


def rope_function(rotary):
    scaled = ROPE_INIT_FUNCTIONS.get(rotary.rope_type)
    return scaled or (lambda config, device: rotary.compute_default_rope_parameters(config))


def forget_lengths(model):
    """Dynamic frequencies follow the longest record seen so far; here every record is on its own."""
    for rotary in rotaries(model):
        if rotary.rope_type == "dynamic":
            rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len


def randomise(model, seed, linear_projector):
    """Weights large enough that every part matters to the logits (transformers' 0.02 would hide mistakes).

    Only untied embeddings are small, as in real models: that is where a wrong epsilon shows.
    """
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    hidden = model.config.text_config.hidden_size
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith(".bias"):
                weight.copy_(0.1 * noise)
            elif "norm" in name or "layrnorm" in name:
                weight.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise * (1.5 / math.sqrt(hidden) if tied else 0.03))
            elif "embedding" in name and "patch" not in name:
                weight.copy_(0.3 * noise)
            else:
                # Wide inputs to the projector's GELU tell its exact form from the tanh one.
                gain = {"lm_head": 1.5, "linear_1": 2.5}.get(name.split(".")[-2], 1.0)
                weight.copy_(noise * gain / math.sqrt(weight[0].numel()))
        if linear_projector:
            second = model.model.multi_modal_projector.linear_2
            torch.nn.init.eye_(second.weight)
            torch.nn.init.zeros_(second.bias)


def write_model(folder: Path, case):
    """config.json, model.safetensors, tokenizer and preprocessor files of a case."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer.build(case.merges, case.legacy)
    patches = (case.vision["image_size"] // 14) ** 2
    settings = dict(case.text)
    text_config = TEXT_CONFIGS[settings.pop("model_type")]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(patch_size=14, projection_dim=8, **case.vision),
        text_config=text_config(vocab_size=tokenizer.get_vocab_size() + case.unused_rows, **settings),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_seq_length=patches + (case.feature_strategy == "full"),
        projector_hidden_act="linear" if case.linear_projector else "gelu",
        vision_feature_layer=case.feature_layer,
        vision_feature_select_strategy=case.feature_strategy,
        tie_word_embeddings=case.text["tie_word_embeddings"],
        pad_token_id=tokenizer.token_to_id("<pad>"),
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, case.seed, case.linear_projector)
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    layouts.rewrite(folder, case.layout)
    assert_same_weights(model, LlavaForConditionalGeneration.from_pretrained(folder))
    tiny_tokenizer.save(tokenizer, folder, case.legacy, max_length=2048)
    side = case.vision["image_size"]
    preprocessor = layouts.preprocessor(side, numbers_only=case.layout == "released")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def assert_same_weights(model, other):
    """The rewritten folder must still be the same model to transformers."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for part in ("text_config", "vision_config"):
        before, after = getattr(model.config, part).to_dict(), getattr(other.config, part).to_dict()
        changed = {key for key in before if before[key] != after.get(key)}
        assert changed <= {"dtype", "_name_or_path", "transformers_version", "use_cache"}, changed


def write_adapter(folder: Path, checkpoint, run, seed, linear_projector):
    """A LoRA folder whose B is not zero, so that the first step already shows errors in its path."""
    settings = run.settings
    copied = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    trains_projector = not settings.get("freeze_mm_mlp_adapter", False)
    chosen = settings.get("target_modules")
    config = LoraConfig(
        **{key: settings[key] for key in copied if key in settings},
        **run.adapter,
        target_modules=chosen or rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({LAYER_LINEARS})",
        exclude_modules=r".*vision_tower.*" if chosen else None,
        modules_to_save=["multi_modal_projector"] if trains_projector else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(checkpoint.load(double=False), config)
    model.peft_config["default"].base_model_name_or_path = "../model"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
            elif "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
            elif "lora_magnitude" in name:
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif "modules_to_save" in name and not (linear_projector and "linear_2" in name):
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if chosen:  # PEFT keeps a set, whose order changes from run to run
        path = folder / "adapter_config.json"
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(saved | {"target_modules": chosen}, indent=2) + "\n")
