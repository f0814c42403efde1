//! LoRA and DoRA as they train: PEFT's formulas with our own masks, what the tape keeps, and how a DoRA starts.

mod common;

use std::path::Path;

use common::{golden, open_gpu, program, read_json, run, stderr};
use serde_json::Value;
use wgpu_llava::{
    autograd::{
        Tape, Weight,
        functions::{self, DoraWeights, DropoutKey, LoraWeights},
    },
    formats::{model_folder::ModelFolder, peft::Adapter},
    gpu::Gpu,
    ops::{Random, dropout, matmul},
    tensor::Tensor,
};

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// A B^T for a [M, K] and b [N, K], in f64.
fn product(a: &[f64], b: &[f64], sizes: [usize; 3]) -> Vec<f64> {
    matmul::reference(matmul::Layout::Nt, a, b, sizes)
}

#[track_caller]
fn assert_close(what: &str, got: &[f32], want: &[f64]) {
    let largest = want.iter().fold(1e-3f64, |largest, x| largest.max(x.abs()));
    let worst = got.iter().zip(want).map(|(&a, b)| (f64::from(a) - b).abs() / largest).fold(0.0, f64::max);
    assert!(got.len() == want.len() && worst <= 1e-5, "{what}: {worst:e}");
}

/// PEFT's `lora.Linear` and `DoraLinearVariant` in training, written out as they are there.
#[test]
fn outputs_are_those_of_pefts_formulas() {
    let gpu = open_gpu();
    let [t, k, n] = [19, 70, 33];
    for (rank, probability) in [(1, 0.0), (3, 0.4), (512, 0.1)] {
        let mut random = Random::new(rank as u64);
        let mut draw = |shape: &[usize]| random.tensor(&gpu, shape);
        let ((x, tx), (w, tw), (bias, tbias)) = (draw(&[t, k]), draw(&[n, k]), draw(&[n]));
        let ((a, ta), (b, tb), (m, tm)) = (draw(&[rank, k]), draw(&[n, rank]), draw(&[n]));
        let norm: Vec<f32> = draw(&[n]).0.iter().map(|x| x.abs() + 0.5).collect();
        let key = DropoutKey { probability, seed: 9, stream: 4, step: 2 };
        let scale = 2.0 / rank as f32;
        let frozen = |tensor: &Tensor| Weight::frozen(tensor.clone());
        let lora = LoraWeights { a: frozen(&ta), b: frozen(&tb), scale, dropout: Some(key) };

        let dropped = dropout::reference(&x, key);
        let base = product(&wide(&x), &wide(&w), [t, n, k]);
        let lora_of = product(&product(&dropped, &wide(&a), [t, rank, k]), &wide(&b), [t, n, rank]);
        let mut tape = Tape::silent();
        let x = tape.constant(tx);
        let y = functions::linear_lora(&mut tape, &x, &frozen(&tw), Some(&frozen(&tbias)), &lora);
        let column = |at: usize| f64::from(bias[at % n]);
        let want: Vec<f64> = (0..t * n).map(|at| base[at] + column(at) + lora_of[at] * f64::from(scale)).collect();
        assert_close("LoRA", &y.value.to_vec().unwrap(), &want);

        let dora = DoraWeights { magnitude: frozen(&tm), norm: Tensor::from_f32(&gpu, &norm, &[n]) };
        let y = functions::linear_dora(&mut tape, &x, &frozen(&tw), Some(&frozen(&tbias)), &lora, &dora);
        let base_of_dropped = product(&dropped, &wide(&w), [t, n, k]);
        let want: Vec<f64> = (0..t * n)
            .map(|at| {
                let g = f64::from(m[at % n]) / f64::from(norm[at % n]);
                base[at] + column(at) + (g - 1.0) * base_of_dropped[at] + g * lora_of[at] * f64::from(scale)
            })
            .collect();
        assert_close("DoRA", &y.value.to_vec().unwrap(), &want);
    }
}

/// Device bytes between forward and backward that were not there before.
fn kept(gpu: &Gpu, probability: f64, dora: bool) -> u64 {
    let [t, k, n, rank] = [512, 1024, 64, 4];
    let mut random = Random::new(1);
    let mut draw = |shape: &[usize]| random.tensor(gpu, shape).1;
    let (x, w) = (draw(&[t, k]), Weight::frozen(draw(&[n, k])));
    let mut trains = |shape: &[usize]| Weight { value: draw(shape), grad: Some(draw(shape)) };
    let (a, b, magnitude) = (trains(&[rank, k]), trains(&[n, rank]), trains(&[n]));
    let dropout = Some(DropoutKey { probability, seed: 1, stream: 0, step: 0 });
    let lora = LoraWeights { a, b, scale: 1.0, dropout };
    let dora = dora.then(|| DoraWeights { norm: magnitude.value.clone(), magnitude });
    let mut tape = Tape::recording();
    let x = tape.leaf(x);
    gpu.sync().unwrap();
    gpu.trim();
    let before = gpu.device_bytes();
    let y = match &dora {
        Some(dora) => functions::linear_dora(&mut tape, &x, &w, None, &lora, dora),
        None => functions::linear_lora(&mut tape, &x, &w, None, &lora),
    };
    gpu.sync().unwrap();
    gpu.trim();
    let held = gpu.device_bytes() - before;
    let seed = y.value.clone();
    let gradients = tape.backward(&y, seed);
    assert!(gradients.of(&x).is_some());
    held
}

#[test]
fn nothing_that_dropout_made_is_kept_for_the_backward() {
    let gpu = open_gpu();
    for dora in [false, true] {
        let (without, with) = (kept(&gpu, 0.0, dora), kept(&gpu, 0.3, dora));
        // x and what is dropped of it are 2 MiB each; kept are y, U, and DoRA's product before its scaling.
        assert_eq!(with, without, "dora {dora}");
        assert!(without < 512 << 10, "dora {dora}: {without}");
    }
}

/// A config file that trains on a parity case.
fn write_config(case: &str, text: &str, path: &Path) {
    let case = golden("parity").join(case);
    let data = ["data.json", "data.jsonl"].map(|name| case.join(name)).into_iter().find(|path| path.exists()).unwrap();
    let (model, images) = (case.join("model"), case.join("images"));
    let (model, data, images) = (model.display(), data.display(), images.display());
    let text = format!("model_name_or_path = '{model}'\ndata_path = '{data}'\nimage_folder = '{images}'\n{text}");
    std::fs::write(path, text).unwrap();
}

/// Trains steps of a fresh adapter on a parity case's model and reads what was written.
fn trained(case: &str, settings: &[&str], out: &Path) -> (ModelFolder, Adapter) {
    let config = out.with_extension("toml");
    write_config(case, "", &config);
    let mut line: Vec<String> = vec!["train".into(), "--output-dir".into(), out.display().to_string()];
    line.push(config.display().to_string());
    settings.iter().for_each(|setting| line.extend(["--set".to_owned(), (*setting).to_owned()]));
    run(line);
    let folder = ModelFolder::open(&golden("parity").join(case).join("model")).unwrap();
    let adapter = Adapter::read(&out.join("adapter"), folder.config()).unwrap();
    (folder, adapter)
}

#[test]
fn a_fresh_dora_starts_with_the_lengths_of_the_weights_rows() {
    let dir = tempfile::tempdir().unwrap();
    let settings = ["use_dora=true", "r=1", "max_steps=1", "learning_rate=0", "freeze_mm_mlp_adapter=true"];
    let (folder, adapter) = trained("llama3_rope_biases", &settings, &dir.path().join("run"));
    assert_eq!(adapter.modules.len(), 14);
    for (module, weights) in &adapter.modules {
        let weight = folder.tensor(&format!("{module}.weight")).unwrap();
        let lengths: Vec<f64> = weight.data.chunks(weight.shape[1]).map(common::norm).collect();
        assert_close(module, &weights.magnitude.as_ref().unwrap().data, &lengths);
        assert!(weights.lora_b.data.iter().all(|&x| x == 0.0), "{module}");
    }
    assert_eq!(read_json(&dir.path().join("run/adapter/adapter_config.json"))["use_dora"], true);
}

#[test]
fn a_dora_that_trains_moves_its_magnitudes() {
    let dir = tempfile::tempdir().unwrap();
    let settings = ["use_dora=true", "r=2", "max_steps=3", "lora_dropout=0.1", "warmup_ratio=0"];
    let (folder, adapter) = trained("llama3_rope_biases", &settings, &dir.path().join("run"));
    for (module, weights) in &adapter.modules {
        let weight = folder.tensor(&format!("{module}.weight")).unwrap();
        let magnitude = &weights.magnitude.as_ref().unwrap().data;
        let moved = |(row, m): (&[f32], &f32)| (common::norm(row) - f64::from(*m)).abs() > 1e-5;
        let moved = weight.data.chunks(weight.shape[1]).zip(magnitude).filter(|&pair| moved(pair)).count();
        assert!(moved * 2 > magnitude.len(), "{module}: {moved} of {}", magnitude.len());
    }
}

/// The modules of a fresh adapter under some target_modules, by layer and last name.
#[test]
fn target_modules_take_names_paths_and_patterns() {
    let dir = tempfile::tempdir().unwrap();
    let layer = |number: usize, names: &[&str]| -> Vec<String> {
        names.iter().map(|name| format!("language_model.model.layers.{number}.{name}")).collect()
    };
    let q = "self_attn.q_proj";
    for (number, (targets, expected)) in [
        ("['q_proj']", [layer(0, &[q]), layer(1, &[q])].concat()),
        // Full paths: of transformers now, and up to 4.51.
        ("['model.language_model.layers.1.self_attn.q_proj']", layer(1, &[q])),
        (
            "['language_model.model.layers.0.self_attn.q_proj', 'layers.1.mlp.up_proj']",
            [layer(0, &[q]), layer(1, &["mlp.up_proj"])].concat(),
        ),
        // As in the original LLaVA.
        (r"'model\.layers\.0\.self_attn\.[qv]_proj'", layer(0, &[q, "self_attn.v_proj"])),
        (r"'^(?!.*vision_tower)(?!.*layers\.0).*\.(up|down)_proj$'", layer(1, &["mlp.down_proj", "mlp.up_proj"])),
    ]
    .into_iter()
    .enumerate()
    {
        let (path, out) = (dir.path().join(format!("{number}.toml")), dir.path().join(number.to_string()));
        let text = format!("target_modules = {targets}\nr = 3\nmax_steps = 1\n");
        write_config("llama3_rope_biases", &text, &path);
        run([Path::new("train"), &path, Path::new("--output-dir"), &out]);
        let folder = ModelFolder::open(&golden("parity/llama3_rope_biases/model")).unwrap();
        let adapter = Adapter::read(&out.join("adapter"), folder.config()).unwrap();
        assert_eq!(adapter.modules.keys().cloned().collect::<Vec<_>>(), expected, "{targets}");
    }
    let path = dir.path().join("none.toml");
    for (targets, word) in
        [("'q_proj'", "model.language_model.layers.0.self_attn.q_proj"), ("['q_proj', 'out_proj']", "`out_proj`")]
    {
        write_config("llama3_rope_biases", &format!("target_modules = {targets}\n"), &path);
        let output = program([Path::new("train"), &path, Path::new("--dry-run")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn an_adapter_to_start_from_decides_what_the_config_does_not_say() {
    let dir = tempfile::tempdir().unwrap();
    let case = golden("parity/qwen2_dynamic");
    let adapter = case.join("adapter-lora_dora");
    let start = format!("adapter_name_or_path = '{}'\nmax_steps = 1\n", adapter.display());
    let refused = |text: &str, words: &[&str]| {
        let path = dir.path().join("refused.toml");
        write_config("qwen2_dynamic", &format!("{start}{text}"), &path);
        let output = program([Path::new("train"), &path, Path::new("--dry-run")]).output().unwrap();
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{text}: {told}");
        words.iter().for_each(|word| assert!(told.contains(word), "{text}: {told}"));
    };
    refused("r = 4\nuse_rslora = true\n", &["r is 4, the adapter's 3", "use_rslora is true, the adapter's false"]);
    refused("use_dora = false\nlora_alpha = 5\n", &["use_dora is false, the adapter's true", "lora_alpha is 5"]);
    refused("target_modules = ['q_proj']\n", &["target_modules leaves out", "mlp.down_proj"]);

    // What it says itself, and the dropout, which may change.
    let path = dir.path().join("run.toml");
    let text = format!("{start}lora_alpha = 6\nlora_dropout = 0.25\ntarget_modules = 'all-linear'\n");
    write_config("qwen2_dynamic", &text, &path);
    let out = dir.path().join("run");
    run([Path::new("train"), &path, Path::new("--output-dir"), &out]);
    let json = read_json(&out.join("adapter/adapter_config.json"));
    let read = ["r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora"].map(|key| json[key].clone());
    assert_eq!(read, [3.into(), 6.into(), 0.25.into(), true.into(), Value::from(false)]);
    // The run's own config repeats it, and goes on from the adapter without saying what that says.
    run([Path::new("train"), &out.join("config.toml"), Path::new("--output-dir"), &dir.path().join("again")]);
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("\nlora_alpha = 6") && !config.contains("\nr = "), "{config}");

    // A second stage goes on with what the first one made.
    let stages = "max_steps = 1\n[[stage]]\nname = 'one'\nr = 5\nuse_dora = true\nuse_rslora = true\n\
                  target_modules = ['v_proj']\nlora_dropout = 0.1\n[[stage]]\nname = 'two'\n";
    write_config("qwen2_dynamic", stages, &path);
    let out = dir.path().join("stages");
    run([Path::new("train"), &path, Path::new("--output-dir"), &out]);
    let configs = ["one", "two"].map(|stage| read_json(&out.join(stage).join("adapter/adapter_config.json")));
    assert_eq!(configs[0], configs[1]);
    assert_eq!((&configs[1]["r"], &configs[1]["lora_dropout"]), (&5.into(), &0.1.into()));
}
