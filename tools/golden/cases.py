"""The cases: which shapes, which data, which training runs. Every case varies something the others do not."""

from dataclasses import dataclass, field


@dataclass
class Run:
    """One training run: a TOML of these settings, and an adapter folder for `lora`."""

    name: str
    settings: dict  # config keys of the program, written to <name>.toml as they are
    adapter: dict = field(default_factory=dict)  # what PEFT's LoraConfig has besides them


@dataclass
class Case:
    name: str
    about: str
    seed: int
    text: dict
    vision: dict
    linear_projector: bool = False
    feature_layer: int = -2
    feature_strategy: str = "default"
    legacy: bool = False  # the tokenizer's `legacy` flag
    merges: int = 90
    unused_rows: int = 0  # embedding rows past the tokenizer's vocabulary
    layout: str = "saved"  # how the folder is written, see golden.layouts
    shard_size: str = "5GB"
    data_name: str = "data.json"
    packed: list = field(default_factory=list)  # (nf4 or fp4, double): the model in four bits, as bitsandbytes stores it
    runs: list = field(default_factory=list)


def text(hidden, intermediate, layers, heads, kv, eps, theta, tied, rope=None, **others):
    """`others`: model_type and whatever its config class takes."""
    return {
        "model_type": "llama",
        "max_position_embeddings": 2048,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(rope or {})},
        "tie_word_embeddings": tied,
        **others,
    }


def vision(hidden, intermediate, layers, heads, image):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
    }


def micro(batch, accumulation):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


PLAIN = {"method": "projector", "version": "plain", "data_path": "captions.json", "max_steps": 12}
FULL = {"method": "full", "version": "v1", "max_steps": 12}
LORA = {"method": "lora", "version": "v1", "max_steps": 12}
QLORA = {"method": "qlora", "version": "v1", "max_steps": 12, "learning_rate": 2e-3}

CASES = [
    Case(
        name="mha_untied_mlp",
        about="plain multi-head attention, head size 24, untied, two-layer projector, legacy tokenizer",
        seed=11,
        text=text(72, 60, 2, 3, 3, 1e-5, 10000.0, False),
        vision=vision(24, 40, 3, 2, 28),
        legacy=True,
        shard_size="200KB",
        runs=[
            Run(
                "projector",
                {**PLAIN, **micro(2, 1), "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
            ),
            Run(
                "full",
                {
                    **FULL,
                    **micro(1, 2),
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": 3,
                    "weight_decay": 0.1,
                },
            ),
            Run(
                "lora",
                {
                    **LORA,
                    **micro(2, 1),
                    "r": 4,
                    "lora_alpha": 8,
                    "learning_rate": 2e-3,
                    "mm_projector_lr": 3e-4,
                    "lr_scheduler_type": "linear",
                    "warmup_ratio": 0.2,
                    "max_grad_norm": 0.0,
                },
            ),
        ],
    ),
    Case(
        name="mqa_untied_mlp_full_features",
        about="one key/value head for two of size 20, three layers, 3x3 patches and the class token of the last layer",
        seed=12,
        text=text(40, 52, 3, 2, 1, 1e-6, 500000.0, False),
        vision=vision(32, 36, 2, 4, 42),
        feature_layer=-1,
        feature_strategy="full",
        layout="runtime",
        merges=80,
        unused_rows=7,
        runs=[
            Run(
                "full_global_tokens",
                {
                    **{key: value for key, value in FULL.items() if key != "max_steps"},
                    **micro(2, 2),
                    "num_train_epochs": 6,
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "constant_with_warmup",
                    "warmup_ratio": 0.25,
                    "max_grad_norm": 0.0,
                    "loss_norm": "global_tokens",
                },
            ),
            Run(
                "full_micro_mean",
                {
                    **FULL,
                    **micro(1, 3),
                    "learning_rate": 1e-3,
                    "lr_scheduler_type": "linear",
                    "loss_norm": "micro_mean",
                },
            ),
            Run(
                "lora_frozen_projector",
                {
                    **LORA,
                    **micro(1, 2),
                    "freeze_mm_mlp_adapter": True,
                    "r": 3,
                    "lora_alpha": 5,
                    "learning_rate": 3e-3,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 1.0,
                },
            ),
            Run(
                "lora_patterns",
                {
                    **LORA,
                    **micro(2, 1),
                    "freeze_mm_mlp_adapter": True,
                    "learning_rate": 3e-3,
                    "weight_decay": 0.1,
                    "lr_scheduler_type": "linear",
                },
                {
                    "r": 2,
                    "lora_alpha": 6,
                    "use_dora": True,
                    "rank_pattern": {"layers.1.mlp.up_proj": 5, "q_proj": 1},
                    "alpha_pattern": {r"layers\.[02]\..*v_proj": 3, "down_proj": 1},
                },
            ),
        ],
    ),
    Case(
        name="gqa_tied_linear_pad",
        about="three heads share a key/value head of size 16, tied, linear projector, pictures padded to squares",
        seed=13,
        text=text(96, 70, 1, 6, 2, 1e-5, 1000.0, True),
        vision=vision(40, 44, 4, 4, 28),
        linear_projector=True,
        layout="released",
        legacy=True,
        runs=[
            Run(
                "projector",
                {
                    **PLAIN,
                    **micro(1, 3),
                    "image_aspect_ratio": "pad",
                    "learning_rate": 1e-2,
                    "lr_scheduler_type": "linear",
                    "warmup_steps": 2,
                    "weight_decay": 0.1,
                },
            ),
            Run(
                "full_truncated",
                {
                    **FULL,
                    **micro(2, 1),
                    "image_aspect_ratio": "pad",
                    "model_max_length": 150,
                    "learning_rate": 5e-4,
                    "lr_scheduler_type": "cosine",
                    "warmup_ratio": 0.03,
                },
            ),
            Run(
                "lora_two_targets",
                {
                    **LORA,
                    **micro(3, 1),
                    "image_aspect_ratio": "pad",
                    "freeze_mm_mlp_adapter": True,
                    "target_modules": ["q_proj", "down_proj"],
                    "r": 5,
                    "lora_alpha": 10,
                    "learning_rate": 5e-3,
                    "lr_scheduler_type": "cosine",
                    "warmup_ratio": 0.1,
                },
            ),
            Run(
                "lora_regex",
                {
                    **LORA,
                    **micro(2, 1),
                    "target_modules": r"^(?!.*(k_proj|gate)).*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
                    "r": 1,
                    "lora_alpha": 3,
                    "use_dora": True,
                    "use_rslora": True,
                    "learning_rate": 5e-3,
                    "mm_projector_lr": 1e-3,
                },
            ),
        ],
    ),
    Case(
        name="gqa_tied_mlp_vision",
        about="two heads of size 20 share a key/value head, tied, unused rows; also trains the vision tower",
        seed=14,
        text=text(80, 60, 2, 4, 2, 1e-6, 10000.0, True),
        vision={**vision(20, 28, 3, 2, 28), "layer_norm_eps": 1e-2},
        unused_rows=55,
        runs=[
            Run(
                "full_vision",
                {
                    **FULL,
                    **micro(2, 1),
                    "unfreeze_mm_vision_tower": True,
                    "learning_rate": 5e-4,
                    "mm_projector_lr": 2e-3,
                    "lr_scheduler_type": "constant_with_warmup",
                    "warmup_steps": 1,
                },
            ),
            Run(
                "lora",
                {
                    **LORA,
                    **micro(1, 4),
                    "r": 6,
                    "lora_alpha": 6,
                    "learning_rate": 2e-3,
                    "lr_scheduler_type": "cosine",
                    "warmup_ratio": 0.1,
                },
            ),
        ],
    ),
    Case(
        name="mha_untied_linear",
        about="head size 12, one layer, linear projector, JSON Lines",
        seed=15,
        text=text(36, 50, 1, 3, 3, 1e-6, 10000.0, False),
        vision=vision(16, 24, 3, 2, 28),
        linear_projector=True,
        layout="released",
        merges=70,
        data_name="data.jsonl",
        runs=[
            Run(
                "projector",
                {
                    **PLAIN,
                    **micro(3, 1),
                    "learning_rate": 5e-3,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 0.0,
                },
            ),
            Run(
                "lora",
                {
                    **LORA,
                    **micro(1, 2),
                    "r": 2,
                    "lora_alpha": 4,
                    "learning_rate": 5e-3,
                    "weight_decay": 0.1,
                    "lr_scheduler_type": "linear",
                    "warmup_ratio": 0.1,
                },
            ),
            Run("full", {**FULL, **micro(1, 1), "learning_rate": 2e-3, "lr_scheduler_type": "cosine"}),
            Run(
                "lora_rslora",
                {**LORA, **micro(2, 1), "r": 64, "lora_alpha": 16, "use_rslora": True, "learning_rate": 1e-3},
            ),
        ],
    ),
    Case(
        name="llama3_rope_biases",
        about="LLaMA 3.1's rotary scaling, biases on every linear of the decoder",
        seed=26,
        text=text(
            48, 70, 2, 4, 2, 1e-5, 500000.0, False,
            rope={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 64},
            attention_bias=True, mlp_bias=True,
        ),
        vision=vision(16, 24, 2, 2, 28),
        runs=[
            Run("full", {**FULL, **micro(2, 1), "learning_rate": 1e-3, "weight_decay": 0.1}),
            Run("lora", {**LORA, **micro(2, 1), "r": 4, "lora_alpha": 8, "learning_rate": 2e-3}),
            Run(
                "lora_dora_dropout",
                {
                    **LORA,
                    **micro(2, 2),
                    "r": 3,
                    "lora_alpha": 4,
                    "use_dora": True,
                    "use_rslora": True,
                    "lora_dropout": 0.15,
                    "seed": 21,
                    "learning_rate": 2e-3,
                },
            ),
        ],
    ),
    Case(
        name="mistral_window",
        about="Mistral's sliding window, narrower than the records; positions stretched linearly",
        seed=17,
        text=text(
            64, 60, 2, 4, 1, 1e-6, 10000.0, False,
            rope={"rope_type": "linear", "factor": 2.5},
            model_type="mistral", sliding_window=24,
        ),
        vision=vision(16, 24, 2, 2, 28),
        runs=[Run("full", {**FULL, **micro(1, 2), "learning_rate": 1e-3})],
    ),
    Case(
        name="qwen2_dynamic",
        about="Qwen2's biases on queries, keys and values, tied; theta grows with records longer than 96 positions",
        seed=18,
        text=text(
            56, 64, 2, 4, 2, 1e-6, 1000.0, True,
            rope={"rope_type": "dynamic", "factor": 8.0},
            model_type="qwen2", max_position_embeddings=96,
        ),
        vision=vision(16, 24, 2, 2, 28),
        runs=[
            Run("full", {**FULL, **micro(3, 1), "learning_rate": 1e-3}),
            Run("lora", {**LORA, **micro(2, 1), "r": 3, "lora_alpha": 6, "learning_rate": 2e-3, "freeze_mm_mlp_adapter": True}),
            Run("lora_dora", {**LORA, **micro(2, 1), "r": 3, "lora_alpha": 6, "use_dora": True, "learning_rate": 2e-3}),
            Run(
                "lora_dropout",
                {
                    **LORA,
                    **micro(3, 1),
                    "freeze_mm_mlp_adapter": True,
                    "target_modules": ["model.language_model.layers.1.self_attn.q_proj", "v_proj", "mlp.down_proj"],
                    "r": 2,
                    "lora_alpha": 4,
                    "lora_dropout": 0.4,
                    "seed": 5,
                    "learning_rate": 2e-3,
                },
            ),
        ],
    ),
    Case(
        name="qlora",
        about="weights in four bits: rows of 96, and of 100, whose words and blocks go across them",
        seed=29,
        text=text(96, 100, 2, 4, 2, 1e-5, 10000.0, False),
        vision=vision(24, 32, 2, 2, 28),
        packed=[("nf4", True), ("fp4", False)],
        runs=[
            Run("qlora_r8", {**QLORA, **micro(2, 1), "r": 8, "lora_alpha": 16}),
            Run(
                "qlora_r64",
                {
                    **QLORA,
                    **micro(1, 2),
                    "freeze_mm_mlp_adapter": True,
                    "target_modules": ["q_proj", "down_proj"],
                    "r": 64,
                    "lora_alpha": 128,
                    "learning_rate": 5e-4,
                },
            ),
            Run(
                "qlora_fp4",
                {
                    **QLORA,
                    **micro(1, 1),
                    "freeze_mm_mlp_adapter": True,
                    "quant_type": "fp4",
                    "double_quant": False,
                    "r": 4,
                    "lora_alpha": 8,
                    "lr_scheduler_type": "linear",
                },
            ),
            # From the bytes that bitsandbytes stores.
            Run("qlora_stored", {**QLORA, **micro(2, 1), "model_name_or_path": "model-nf4", "r": 2, "lora_alpha": 4}),
        ],
    ),
]
