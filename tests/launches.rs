//! How many kernels a token of an answer launches on a GPU, and that they say what transformers says.

mod common;

use std::{collections::BTreeMap, ops::ControlFlow};

use common::{golden, numbers, read_json};
use wgpu_llava::{
    data::Turn,
    generate::{Options, generate},
    gpu::{AdapterOptions, Gpu},
    models::{
        llava::Pictures,
        open::{Place, open},
    },
};

/// Launches of each kernel for one more token, and the model's layers.
fn of_a_token(name: &str) -> (BTreeMap<String, u64>, u64) {
    let options = AdapterOptions { treat_as_gpu: true, without_cooperative: true, profile: true, ..Default::default() };
    let gpu = Gpu::open(&options).expect("an adapter; tools/test installs software Vulkan");
    let case = golden("parity").join(name);
    let opened = open(std::slice::from_ref(&gpu), Place::Folder(&case.join("model"), None), None).unwrap();
    let encoder = opened.encoder("v1", None).unwrap();
    let expected = read_json(&case.join("expected.json"));
    let words = expected["generate"].as_array().unwrap().iter().find(|one| one["image"].is_null()).unwrap();
    let prompt = encoder.prompt(&[Turn::human(words["prompt"].as_str().unwrap(), 0)]).unwrap();
    let ids: Vec<u32> = numbers(&words["token_ids"]).into_iter().map(|id| id as u32).collect();
    let counts = [ids.len() - 1, ids.len()].map(|tokens| {
        let options = Options::greedy(tokens, opened.stop_ids(&encoder.version).unwrap());
        gpu.start_profile();
        let mut unheard = |_, _| ControlFlow::Continue(());
        let answers =
            generate(&opened.model, std::slice::from_ref(&prompt), Pictures::Pixels(&[]), &options, &mut unheard);
        assert_eq!(answers.unwrap()[0].token_ids, ids[..tokens], "{name}");
        gpu.profile().into_iter().map(|(kernel, launches, _)| (kernel, launches)).collect::<BTreeMap<_, _>>()
    });
    let [fewer, mut all] = counts;
    for (kernel, launches) in &mut all {
        *launches -= fewer.get(kernel).unwrap_or(&0);
    }
    all.retain(|_, launches| *launches > 0);
    println!("{name}: {all:?}");
    (all, opened.model.config.text().num_hidden_layers as u64)
}

fn launches(of: &BTreeMap<String, u64>, kernel: &str) -> u64 {
    of.iter().filter(|(name, _)| name.starts_with(kernel)).map(|(_, launches)| launches).sum()
}

#[test]
fn a_layer_is_eleven_where_weights_are_alone() {
    let (of, layers) = of_a_token("mha_untied_mlp");
    assert_eq!(launches(&of, "matmul.rows.joint3"), layers, "{of:?}");
    assert_eq!(launches(&of, "matmul.rows.gated"), layers, "{of:?}");
    assert_eq!(launches(&of, "elementwise"), 0, "residuals are added by products: {of:?}");
    // Two norms, query with key and value, two rotations, two rows to the cache, attention over one part, and three
    // products. Once: the token's embedding, a norm, the row for the head, the head.
    assert_eq!(launches(&of, ""), 11 * layers + 4, "{of:?}");
}

#[test]
fn biased_layers_are_products_of_their_own() {
    let (of, layers) = of_a_token("llama3_rope_biases");
    assert_eq!(launches(&of, "matmul.rows.nt"), 7 * layers + 1, "{of:?}");
    assert_eq!(launches(&of, "elementwise"), 0, "residuals are added by products: {of:?}");
}
