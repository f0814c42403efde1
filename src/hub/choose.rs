//! Which of a repository's files a model, an adapter or a projector is made of.
//!
//! One form of the weights, and no other framework's: a repository often has the same weights three times.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Wanted;
use crate::error::{Error, Result};

/// The forms of a model's weights, the best first: the one file, or the index of several.
const FORMS: [(&str, &str); 2] =
    [("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json")];
const PROJECTORS: [&str; 2] = ["mm_projector.safetensors", "mm_projector.bin"];
const ADAPTER: &str = "adapter_config.json";
const ADAPTER_WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];
const TRAINED_BESIDE: &str = "non_lora_trainables.bin";
/// JSON that is about a training run and not about a model; it can be large.
const NOT_NEEDED: [&str; 4] = ["trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"];

/// What to fetch, in this order: with the weights at the end, a snapshot that has them has all.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Config, tokenizer, processor, and the index of the weights if there is one.
    pub first: Vec<String>,
    /// Weights known by name.
    pub weights: Vec<String>,
    /// Which of `first` names more weights.
    pub index: Option<String>,
}

/// Chooses among the names of files. Those in folders are never wanted.
///
/// # Errors
/// What is lacking, in words.
pub(super) fn plan(names: &BTreeSet<String>, wanted: Wanted) -> std::result::Result<Plan, Vec<String>> {
    let has = |name: &str| names.contains(name);
    let mut lacking = Vec::new();
    let mut plan = Plan::default();
    match wanted {
        Wanted::Adapter => {
            if !has(ADAPTER) {
                lacking.push(ADAPTER.to_owned());
            }
            match ADAPTER_WEIGHTS.into_iter().find(|name| has(name)) {
                Some(weights) => plan.weights.push(weights.to_owned()),
                None => lacking.push(ADAPTER_WEIGHTS.join(" or ")),
            }
            plan.weights.extend(has(TRAINED_BESIDE).then(|| TRAINED_BESIDE.to_owned()));
        }
        Wanted::Projector if PROJECTORS.into_iter().any(has) => {
            plan.weights.extend(PROJECTORS.into_iter().find(|name| has(name)).map(str::to_owned));
        }
        Wanted::Model | Wanted::Tower | Wanted::Projector => model(names, wanted, &mut plan, &mut lacking),
    }
    plan.first.extend(names.iter().filter(|name| is_small(name)).cloned());
    if lacking.is_empty() { Ok(plan) } else { Err(lacking) }
}

fn model(names: &BTreeSet<String>, wanted: Wanted, plan: &mut Plan, lacking: &mut Vec<String>) {
    let has = |name: &str| names.contains(name);
    let form = FORMS.into_iter().find(|(single, index)| has(single) || has(index));
    let ggufs: Vec<&String> = names.iter().filter(|name| name.ends_with(".gguf") && !name.contains('/')).collect();
    match form {
        Some((single, _)) if has(single) => plan.weights.push(single.to_owned()),
        Some((_, index)) => {
            plan.first.push(index.to_owned());
            plan.index = Some(index.to_owned());
        }
        None if has(PROJECTORS[1]) => {}
        None => {
            let (projectors, models): (Vec<&String>, Vec<&String>) =
                ggufs.into_iter().partition(|name| name.to_lowercase().contains("mmproj"));
            match models[..] {
                [one] => plan.weights.push(one.clone()),
                [] => lacking.push("weights (model.safetensors, pytorch_model.bin or a .gguf)".to_owned()),
                _ => {
                    let list: Vec<&str> = models.iter().map(|name| name.as_str()).collect();
                    lacking.push(format!("one .gguf, where it has several: {}", list.join(", ")));
                }
            }
            if let [one] = projectors[..] {
                plan.weights.push(one.clone());
            }
            return;
        }
    }
    // Beside .bin weights; a repository with safetensors has its projector among them.
    if form != Some(FORMS[0]) && has(PROJECTORS[1]) {
        plan.weights.push(PROJECTORS[1].to_owned());
    }
    if !has("config.json") {
        lacking.push("config.json".to_owned());
    }
    if wanted == Wanted::Model && !has("tokenizer.json") && !has("tokenizer.model") && form.is_some() {
        lacking.push("tokenizer.json or tokenizer.model".to_owned());
    }
}

/// Configs, tokenizers, templates: everything that is no weights.
fn is_small(name: &str) -> bool {
    let json = name.ends_with(".json") && !name.ends_with(".index.json") && !NOT_NEEDED.contains(&name);
    !name.contains('/')
        && (json
            || name.ends_with(".jinja")
            || name == "tokenizer.model"
            || name == "merges.txt"
            || name == "vocab.txt")
}

/// The files that an index of weights names, once each.
///
/// # Errors
/// `Data`: it is no index, or names a file that is not beside it.
pub(super) fn shards(shown: &str, index: &[u8]) -> Result<Vec<String>> {
    let parsed: Value = serde_json::from_slice(index)
        .map_err(|source| Error::data(format!("{shown} is not JSON")).caused_by(source))?;
    let map = parsed.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::data(format!("{shown} has no weight_map (tensor name to file name)")))?;
    let mut files = BTreeSet::new();
    for (tensor, file) in map {
        match file.as_str().filter(|file| is_plain(file)) {
            Some(file) => files.insert(file.to_owned()),
            None => return Err(Error::data(format!("{shown}: {tensor}: {file} is not the name of a file beside it"))),
        };
    }
    Ok(files.into_iter().collect())
}

/// Whether a name is of a file in the folder itself, on every system.
pub(super) fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', ':']) && !name.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(names: &[&str], wanted: Wanted) -> std::result::Result<Plan, Vec<String>> {
        plan(&names.iter().map(|name| name.to_string()).collect(), wanted)
    }

    fn all(plan: Plan) -> Vec<String> {
        plan.first.into_iter().chain(plan.weights).collect()
    }

    const SMALL: [&str; 3] = ["config.json", "tokenizer.json", "tokenizer_config.json"];

    #[test]
    fn weights_come_in_one_form_and_no_other_framework_s() {
        let crowd = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
            ".gitattributes",
            "model.safetensors",
            "pytorch_model.bin",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "tf_model.h5",
            "flax_model.msgpack",
            "flax_model.msgpack.index.json",
            "trainer_state.json",
            "onnx/model.onnx",
            "original/params.json",
            "openvino/config.json",
            "x-q4.gguf",
        ];
        let mut expected = SMALL.to_vec();
        expected.push("model.safetensors");
        assert_eq!(all(of(&crowd, Wanted::Model).unwrap()), expected);
    }

    #[test]
    fn shards_come_by_their_index_and_bin_brings_its_projector() {
        let sharded = of(&["config.json", "tokenizer.json", "model.safetensors.index.json", "a.bin"], Wanted::Model);
        let sharded = sharded.unwrap();
        assert_eq!(sharded.index.as_deref(), Some("model.safetensors.index.json"));
        assert!(sharded.first.contains(&"model.safetensors.index.json".to_owned()) && sharded.weights.is_empty());
        let bin =
            of(&["config.json", "tokenizer.model", "pytorch_model.bin.index.json", "mm_projector.bin"], Wanted::Model);
        let bin = bin.unwrap();
        assert_eq!((bin.index.as_deref(), bin.weights), (Some(FORMS[1].1), vec!["mm_projector.bin".to_owned()]));
        let mixed = ["config.json", "tokenizer.model", "model.safetensors", "mm_projector.bin"];
        assert_eq!(of(&mixed, Wanted::Model).unwrap().weights, ["model.safetensors"]);
    }

    #[test]
    fn adapters_projectors_and_ggufs_are_known() {
        let adapter = ["adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin", "config.json"];
        assert_eq!(
            all(of(&adapter, Wanted::Adapter).unwrap()),
            ["adapter_config.json", "config.json", "adapter_model.bin", "non_lora_trainables.bin"]
        );
        let both = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"];
        assert_eq!(of(&both, Wanted::Adapter).unwrap().weights, ["adapter_model.safetensors"]);
        assert_eq!(of(&["mm_projector.bin"], Wanted::Projector).unwrap().weights, ["mm_projector.bin"]);
        let gguf = ["x-q4.gguf", "mmproj-f16.gguf", "README.md"];
        assert_eq!(of(&gguf, Wanted::Model).unwrap().weights, ["x-q4.gguf", "mmproj-f16.gguf"]);
        assert!(of(&["a.gguf", "b.gguf"], Wanted::Model).unwrap_err()[0].contains("a.gguf, b.gguf"));
    }

    #[test]
    fn what_is_lacking_is_listed() {
        assert_eq!(of(&["model.safetensors"], Wanted::Model).unwrap_err().len(), 2);
        assert_eq!(of(&["model.safetensors", "config.json"], Wanted::Tower).unwrap().weights, ["model.safetensors"]);
        assert!(of(&["README.md"], Wanted::Model).unwrap_err()[0].contains("weights"));
        assert_eq!(of(&[], Wanted::Adapter).unwrap_err().len(), 2);
    }

    #[test]
    fn an_index_leads_nowhere_else() {
        let index = br#"{"weight_map": {"a": "m-2.bin", "b": "m-1.bin", "c": "m-2.bin"}}"#;
        assert_eq!(shards("i", index).unwrap(), ["m-1.bin", "m-2.bin"]);
        for wrong in [&b"{"[..], b"{}", br#"{"weight_map": {"a": "../x"}}"#, br#"{"weight_map": {"a": 3}}"#] {
            assert_eq!(shards("i", wrong).unwrap_err().kind, crate::error::ErrorKind::Data);
        }
    }
}
