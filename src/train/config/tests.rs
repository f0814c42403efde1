use super::*;
use crate::{error::ErrorKind, models::loading::Quantization, quant::QuantType};

fn resolve_all(recipe: Option<&str>, file: Option<&str>, set: &[&str]) -> Result<RunConfig> {
    let set: Vec<String> = set.iter().map(|argument| argument.to_string()).collect();
    RunConfig::resolve(&Request {
        recipe: recipe.map(|text| ("test", text)),
        file: file.map(|text| (Path::new("conf/run.toml"), text)),
        set: &set,
        output_dir: None,
        default_output_dir: Path::new("runs/today"),
        working_dir: Path::new("/home/ada"),
    })
}

fn resolve(file: &str, set: &[&str]) -> Result<RunConfig> {
    resolve_all(None, Some(file), set)
}

fn message(file: &str, set: &[&str]) -> String {
    let error = resolve(file, set).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Usage);
    format!("{}\n{}", error.message, error.hints.join("\n"))
}

const MINIMAL: &str = "model_name_or_path = \"base\"\ndata_path = \"data/train.json\"\n";
const TWO_STAGES: &str = r#"
model_name_or_path = "embedded:tiny"
seed = 7
save_steps = 100
[[stage]]
name = "pretrain"
method = "projector"
version = "plain"
data_path = "embedded:captions"
max_steps = 40
learning_rate = 1e-3
[[stage]]
name = "finetune"
data_path = [{path = "a.json", weight = 2, limit = 10}, {path = "/b/b.jsonl", image_folder = "pictures"}]
r = 8
save_steps = 50
"#;

#[test]
fn defaults_are_those_of_the_documentation() {
    let run = resolve(MINIMAL, &[]).unwrap();
    assert_eq!(run.output_dir, Path::new("/home/ada/runs/today"));
    assert_eq!((run.devices.len(), run.eval_limit, run.eval_after.len()), (0, None, 0));
    let stage = &run.stages[0];
    assert_eq!((stage.name.as_str(), stage.output_dir.as_path()), ("", run.output_dir.as_path()));
    assert_eq!(stage.model_name_or_path, Some(Source::Local("/home/ada/conf/base".into())));
    let data = &stage.data_path[0];
    assert_eq!(data.path, DataSource::File("/home/ada/conf/data/train.json".into()));
    assert_eq!(data.image_folder.as_deref(), Some(Path::new("/home/ada/conf/data")));
    assert_eq!((data.weight, data.limit), (1.0, None));
    assert_eq!((stage.version.as_str(), stage.image_aspect_ratio), ("v1", ImageAspectRatio::Square));
    assert_eq!((stage.shuffle, stage.seed, stage.group_by_modality_length), (true, 0, false));
    assert_eq!(
        (stage.method, stage.freeze_mm_mlp_adapter, stage.unfreeze_mm_vision_tower),
        (Method::Lora, false, false)
    );
    assert_eq!((stage.r, stage.lora_alpha, stage.lora_dropout, stage.lora_scale()), (64, 128.0, 0.0, 2.0));
    assert_eq!((&stage.target_modules, stage.use_rslora), (&TargetModules::AllLinear, false));
    assert_eq!((stage.num_train_epochs, stage.max_steps, stage.global_batch()), (1.0, None, 1));
    assert_eq!((stage.learning_rate, stage.mm_projector_lr), (1e-4, 1e-4));
    assert_eq!((stage.lr_scheduler_type, stage.warmup_ratio), (LrSchedulerType::Cosine, 0.03));
    assert_eq!(stage.warmup_steps, None);
    assert_eq!((stage.weight_decay, stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon), (0.0, 0.9, 0.999, 1e-8));
    assert_eq!((stage.max_grad_norm, stage.loss_norm), (1.0, LossNorm::GlobalTokens));
    assert_eq!((stage.precision, stage.gradient_checkpointing), (None, GradientCheckpointing::None));
    assert_eq!((stage.logging_steps, stage.save_steps, stage.save_total_limit), (1, 500, 2));
    assert_eq!(resolve(MINIMAL, &["method=full"]).unwrap().stages[0].learning_rate, 2e-5);
    assert_eq!(resolve(MINIMAL, &["r=4"]).unwrap().stages[0].lora_alpha, 8.0);
    let rs = resolve(MINIMAL, &["r=4", "lora_alpha=16", "use_rslora=true"]).unwrap();
    assert_eq!(rs.stages[0].lora_scale(), 8.0);
}

#[test]
fn stages_inherit_the_top_and_start_from_the_one_before() {
    let run = resolve(TWO_STAGES, &[]).unwrap();
    let [first, second] = &run.stages[..] else { panic!("two stages") };
    assert_eq!(first.output_dir, Path::new("/home/ada/runs/today/pretrain"));
    assert_eq!((first.seed, second.seed, first.save_steps, second.save_steps), (7, 7, 100, 50));
    assert_eq!(first.model_name_or_path, Some(Source::Embedded("embedded:tiny".into())));
    assert_eq!(second.model_name_or_path, None);
    assert_eq!((first.max_steps, second.max_steps), (Some(40), None));
    assert_eq!(first.data_path[0].path, DataSource::Embedded("embedded:captions".into()));
    assert_eq!(first.data_path[0].image_folder, None);
    assert_eq!((second.data_path[0].weight, second.data_path[0].limit), (2.0, Some(10)));
    assert_eq!(second.data_path[0].image_folder.as_deref(), Some(Path::new("/home/ada/conf")));
    assert_eq!(second.data_path[1].path, DataSource::File("/b/b.jsonl".into()));
    assert_eq!(second.data_path[1].image_folder.as_deref(), Some(Path::new("/home/ada/conf/pictures")));
}

#[test]
fn the_command_line_wins_and_a_stage_of_it_wins_over_all() {
    let set = ["learning_rate=0.5", "finetune.learning_rate=0.25", "model_name_or_path=other/base", "max_steps=3"];
    let run = resolve(TWO_STAGES, &set).unwrap();
    assert_eq!([run.stages[0].learning_rate, run.stages[1].learning_rate], [0.5, 0.25]);
    assert_eq!([run.stages[0].max_steps, run.stages[1].max_steps], [Some(3), Some(3)]);
    assert_eq!(run.stages[0].model_name_or_path, Some(Source::Hub("other/base".into())));
    assert_eq!(run.stages[1].model_name_or_path, None);
    let origin = |key: &str| run.stages[1].values.iter().find(|v| v.key == key).unwrap().origin.clone();
    assert_eq!(origin("learning_rate"), Origin::CommandLine);
    assert_eq!(origin("r"), Origin::File("/home/ada/conf/run.toml".into()));
    assert_eq!(origin("weight_decay"), Origin::Default);
    assert_eq!(resolve(MINIMAL, &["r=1", "r=2"]).unwrap().stages[0].r, 2);
}

#[test]
fn a_file_wins_over_a_recipe_and_keeps_its_stages() {
    let run = resolve_all(Some(TWO_STAGES), Some("seed = 1\nlearning_rate = 0.5\n"), &["output_dir=here"]).unwrap();
    assert_eq!(run.stages.len(), 2);
    assert_eq!((run.stages[0].seed, run.stages[0].learning_rate), (1, 0.5));
    assert_eq!(run.output_dir, Path::new("/home/ada/here"));
    let file = "output_dir = \"out\"\n[[stage]]\nname = \"finetune\"\nr = 2\nmodel_name_or_path = \"m\"\n";
    let run = resolve_all(Some(TWO_STAGES), Some(file), &[]).unwrap();
    assert_eq!((run.stages.len(), run.stages[0].r, run.stages[0].save_steps), (1, 2, 50));
    assert_eq!(run.output_dir, Path::new("/home/ada/conf/out"));
}

#[test]
fn the_resolved_file_repeats_the_run() {
    let three = format!("{TWO_STAGES}[[stage]]\nname = \"more\"\nmodel_name_or_path = \"m\"\ndata_path = \"a.json\"\n");
    let run_keys = "eval_after = [\"easy-vqa\"]\neval_limit = 5\ndevices = \"llvm\"\n";
    let odd = "target_modules = '.*\\.q_proj\"?'\nlora_alpha = 3\nunfreeze_mm_vision_tower = true\n";
    let names = "target_modules = [\"q_proj\"]\nwarmup_steps = 0\nmm_projector_type = \"mlp2x_gelu\"\n";
    for text in [MINIMAL, TWO_STAGES, &three, &format!("{run_keys}{MINIMAL}{odd}"), &format!("{MINIMAL}{names}")] {
        let run = resolve(text, &["seed=3"]).unwrap();
        let written = run.to_toml();
        assert!(!written.contains("output_dir"), "{written}");
        let again = resolve(&written, &[]).unwrap();
        assert_eq!(again, run, "{written}");
        assert_eq!(again.to_toml(), written);
    }
}

#[test]
fn a_saved_config_is_the_run_of_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let run = resolve(TWO_STAGES, &[]).unwrap();
    std::fs::write(dir.path().join("config.toml"), run.to_toml()).unwrap();
    let saved = RunConfig::load_saved(dir.path()).unwrap();
    assert_eq!(saved.stages[0].output_dir, dir.path().join("pretrain"));
    run.check_resumable(&saved).unwrap();
    resolve(TWO_STAGES, &["save_steps=1"]).unwrap().check_resumable(&saved).unwrap();
    let error = resolve(TWO_STAGES, &["finetune.r=9"]).unwrap().check_resumable(&saved).unwrap_err();
    assert!(error.message.contains("finetune.r was 8, now it is 9"), "{error}");
    assert!(resolve(MINIMAL, &[]).unwrap().check_resumable(&saved).is_err());
    assert_eq!(RunConfig::load_saved(&dir.path().join("none")).unwrap_err().kind, ErrorKind::Usage);
}

#[test]
fn mistakes_are_named_with_place_and_way_out() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("learning_rat = 1.0", &[], &["run.toml, line 3", "`learning_rat`", "did you mean `learning_rate`"]),
        ("[[stage]]\nname = \"a\"\nmehtod = \"lora\"", &[], &["line 5, stage `a`", "`mehtod`", "`method`"]),
        ("[lora]\nr = 3", &[], &["line 3", "unknown key `lora`"]),
        ("r = \"big\"", &[], &["line 3", "r = \"big\"", "whole number"]),
        ("method = \"lroa\"", &[], &["method = \"lroa\"", "`projector`", "nearest is `lora`"]),
        ("r =", &[], &["run.toml: not a TOML file"]),
        ("[stage]\nname = \"a\"", &[], &["list of tables", "[[stage]]"]),
        ("[[stage]]\nr = 1", &[], &["stage 1 has no `name`"]),
        ("[[stage]]\nname = \"a.b\"", &[], &["cannot be named \"a.b\""]),
        ("[[stage]]\nname = \"a\"\n[[stage]]\nname = \"a\"", &[], &["two stages named `a`"]),
        ("[[stage]]\nname = \"a\"\noutput_dir = \"x\"", &[], &["whole run", "move `output_dir`"]),
        ("[[stage]]\nname = \"fine\"", &["fien.r=1"], &["no stage `fien`", "nearest is `fine`"]),
        ("", &["tune.r=1"], &["no stage `tune`", "has no stages"]),
        ("", &["r"], &["--set r: there is no `=`"]),
        ("", &["lr=1"], &["--set lr=1: unknown key `lr`"]),
        ("", &["r=0"], &["--set r=0", "from 1 to 65536"]),
        ("method = \"projector\"\nfreeze_mm_mlp_adapter = true", &[], &["nothing to train"]),
    ];
    for (text, set, parts) in cases {
        let message = message(&format!("{MINIMAL}{text}"), set);
        for part in *parts {
            assert!(message.contains(part), "{text}: {message} lacks {part}");
        }
    }
    assert!(message("data_path = \"a\"", &[]).contains("`model_name_or_path` is required"));
    let no_data = message("model_name_or_path = \"a\"\n[[stage]]\nname = \"a\"", &[]);
    assert!(no_data.contains("stage `a`: `data_path` is required"), "{no_data}");
}

#[test]
fn rounding_at_random_is_for_full_fine_tuning_in_bfloat16() {
    let wanted = ["stochastic_rounding=true", "method=full", "precision=bfloat16"];
    assert!(resolve(MINIMAL, &wanted).unwrap().stages[0].stochastic_rounding);
    for other in ["method=lora", "precision=float16"] {
        let message = message(MINIMAL, &[wanted[0], wanted[1], wanted[2], other]);
        assert!(message.contains("bfloat16") && message.contains("full"), "{message}");
    }
    assert!(message(MINIMAL, &wanted[..1]).contains("stochastic_rounding"));
    assert!(message(MINIMAL, &["loss_scale=1e-40"]).contains("1e-30 to 1e30"));
    assert!(message(MINIMAL, &["min_loss_scale=1e300"]).contains("min_loss_scale"));
}

#[test]
fn every_group_has_the_learning_rate_that_is_not_told_otherwise() {
    let stage = &resolve(MINIMAL, &["learning_rate=3e-4", "mm_vision_tower_lr=2e-6"]).unwrap().stages[0];
    assert_eq!((stage.mm_projector_lr, stage.mm_vision_tower_lr), (3e-4, 2e-6));
    assert_eq!(resolve(MINIMAL, &["learning_rate=3e-4"]).unwrap().stages[0].mm_vision_tower_lr, 3e-4);
}

#[test]
fn what_is_known_but_not_built_says_so() {
    for setting in ["bits=8", "bits=5"] {
        let message = message(MINIMAL, &[setting]);
        assert!(message.contains("not built yet"), "{message}");
    }
    let built =
        ["bits=4", "use_dora=true", "optim=adamw", "gradient_checkpointing=none", "zero_stage=2", "offload=true"];
    resolve(MINIMAL, &built).unwrap();
    assert!(resolve(MINIMAL, &["optim=adamw_8bit", "offload=true"]).is_err());
    let folded = message(MINIMAL, &["method=full", "zero_stage=3", "adapter_name_or_path=some/adapter"]);
    assert!(folded.contains("cannot fold an adapter"), "{folded}");
    for method in ["method=full", "use_dora=true"] {
        resolve(MINIMAL, &[method, "zero_stage=3"]).unwrap();
    }
    for set in [["layer_split=true", "zero_stage=1"], ["layer_split=true", "offload=true"]] {
        let told = message(MINIMAL, &set);
        assert!(told.contains("layer_split") && told.contains(set[1].split('=').next().unwrap()), "{told}");
    }
    let split = &resolve(MINIMAL, &["layer_split=true"]).unwrap().stages[0];
    assert_eq!((split.layer_split, split.ranks(3), split.zero_stage), (true, 1, 0));
    for mode in ["selective", "full", "offload"] {
        resolve(MINIMAL, &[&format!("gradient_checkpointing={mode}")]).unwrap();
    }
    let run = resolve(MINIMAL, &["devices=[1]", "precision=float32"]).unwrap();
    assert_eq!((run.devices, run.stages[0].precision), (vec![DeviceChoice::Index(1)], Some(Precision::Float32)));
    let twice = resolve(MINIMAL, &["devices=[0, 0, \"llvm\"]"]).unwrap().devices;
    assert_eq!(twice, [DeviceChoice::Index(0), DeviceChoice::Index(0), DeviceChoice::Name("llvm".into())]);
}

#[test]
fn four_bits_are_for_qlora_alone() {
    assert_eq!(resolve(MINIMAL, &["quant_type=fp4"]).unwrap().stages[0].quantization, None);
    let of = |set: &[&str]| {
        let run = resolve(MINIMAL, set).unwrap();
        let stage = &run.stages[0];
        let Quantization { kind, double, lm_head } = stage.quantization.unwrap();
        assert!(stage.method.trains_adapter());
        (kind, double, lm_head, stage.method_line())
    };
    assert_eq!(of(&["method=qlora"]), (QuantType::Nf4, true, false, "qlora (nf4, double quantisation)".into()));
    let other = ["method=qlora", "quant_type=fp4", "double_quant=false", "quantize_lm_head=true"];
    assert_eq!(of(&other), (QuantType::Fp4, false, true, "qlora (fp4, the head too)".into()));
}
