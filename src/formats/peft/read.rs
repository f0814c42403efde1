//! Reading an adapter's folder. Every tensor in it must find its place in the model: the classic silent failure of
//! adapters is a name that matches nothing.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::{Path, PathBuf},
};

use super::{
    super::{hf_write::identity_layer, host_tensor::HostTensor, safetensors::Checkpoint, torch_bin::TorchFile},
    Adapter, LoraWeights, NON_LORA_FILE, PREFIX, TORCH_WEIGHTS_FILE, WEIGHTS_FILE,
    config::AdapterConfig,
    embeddings, head, scale, transposed,
};
use crate::{
    error::{Error, Result, nearest},
    models::{config::ModelConfig, names},
};

/// How many names an error lists.
const SHOWN: usize = 6;

impl Adapter {
    /// Reads the folder of an adapter made for a model of this config, whatever release of transformers it was made with,
    /// or the original LLaVA. Every tensor in it must belong to the model.
    ///
    /// # Errors
    /// `Data`: missing or broken files, tensors that match nothing, do not fit or lack their counterparts, and kinds of
    /// adapters that are not built.
    pub fn read(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let settings = AdapterConfig::load(folder)?;
        let weights = weights_file(folder)?;
        let mut found = Found::new(config);
        found.read_file(&weights)?;
        let beside = folder.join(NON_LORA_FILE);
        if beside.exists() {
            found.read_file(&beside)?;
        }
        found.refuse_unmatched(&weights, config)?;
        found.check_targets(&weights, &settings, config)?;
        found.check_saved(&weights, &settings, config)?;
        found.into_adapter(&weights, &settings, config)
    }
}

fn weights_file(folder: &Path) -> Result<PathBuf> {
    let known = [WEIGHTS_FILE, TORCH_WEIGHTS_FILE];
    known.iter().map(|name| folder.join(name)).find(|path| path.exists()).ok_or_else(|| {
        Error::data(format!("{} holds neither {WEIGHTS_FILE} nor {TORCH_WEIGHTS_FILE}", folder.display()))
            .hint("name the folder that PEFT's save_pretrained wrote")
    })
}

/// A name without what PEFT, DistributedDataParallel and torch.compile put before the model's own path.
fn path_in_model(mut stored: &str) -> &str {
    for wrapper in ["module.", "_orig_mod.", PREFIX, "_orig_mod."] {
        stored = stored.strip_prefix(wrapper).unwrap_or(stored);
    }
    stored
}

/// The tensors of an adapter's files by what they are.
struct Found {
    /// Shapes of all that a saved tensor may replace.
    wholes: BTreeMap<String, Vec<usize>>,
    /// `[out, in]` of all that may be adapted, the embeddings `[V, D]` among them.
    linears: BTreeMap<String, [usize; 2]>,
    parts: BTreeMap<String, Parts>,
    saved: BTreeMap<String, HostTensor>,
    /// The paths that `saved` had in the file.
    saved_paths: Vec<String>,
    /// What a raw state dict calls its adapter.
    adapters: BTreeSet<String>,
    unmatched: Vec<String>,
}

/// The tensors of one adapted module.
#[derive(Default)]
struct Parts {
    /// The module's path in the model that was adapted, which rank_pattern and alpha_pattern speak of.
    path: String,
    tensors: BTreeMap<Part, HostTensor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Bias,
    Magnitude,
    EmbeddingA,
    EmbeddingB,
}

impl Part {
    /// What stands behind `.lora_` in a name, and the adapter's name, which PEFT strips on saving and a raw state dict has.
    fn parse(text: &str) -> Option<(Self, Option<&str>)> {
        let words: Vec<&str> = text.split('.').collect();
        let (part, ending) = match words[0] {
            "A" => (Self::A, Some("weight")),
            "B" if words.last() == Some(&"bias") => (Self::Bias, Some("bias")),
            "B" => (Self::B, Some("weight")),
            "magnitude_vector" => (Self::Magnitude, None),
            "embedding_A" => (Self::EmbeddingA, None),
            "embedding_B" => (Self::EmbeddingB, None),
            _ => return None,
        };
        match (&words[1..], ending) {
            ([last], Some(ending)) if *last == ending => Some((part, None)),
            ([name, last], Some(ending)) if *last == ending => Some((part, Some(name))),
            // In memory DoRA's vector is the weight of a layer of its own.
            ([] | ["weight"], None) => Some((part, None)),
            ([name] | [name, "weight"], None) => Some((part, Some(name))),
            _ => None,
        }
    }
}

impl Found {
    fn new(config: &ModelConfig) -> Self {
        let mut wholes: BTreeMap<String, Vec<usize>> = names::expected_tensors(config).into_iter().collect();
        wholes.extend(config.llava().map(names::projector_identity_tensors).unwrap_or_default());
        wholes.extend(names::unused_vision_tensors(config));
        let text = config.text();
        // Of a tied model too: an adapter may untie it.
        wholes.insert(names::LM_HEAD.to_owned(), vec![text.vocab_size, text.hidden_size]);
        let mut linears: BTreeMap<String, [usize; 2]> = names::linears(config).into_iter().collect();
        linears.insert(embeddings().to_owned(), [text.vocab_size, text.hidden_size]);
        Self {
            wholes,
            linears,
            parts: BTreeMap::new(),
            saved: BTreeMap::new(),
            saved_paths: Vec::new(),
            adapters: BTreeSet::new(),
            unmatched: Vec::new(),
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<()> {
        if path.extension().is_some_and(|extension| extension == "bin") {
            let file = TorchFile::open(path)?;
            return file.names().try_for_each(|name| self.sort(path, name, || file.require(name)?.to_f32()));
        }
        let file = Checkpoint::open(path)?;
        file.names().try_for_each(|name| self.sort(path, name, || file.require(name)?.to_f32()))
    }

    fn sort(&mut self, file: &Path, stored: &str, read: impl FnOnce() -> Result<HostTensor>) -> Result<()> {
        let path = path_in_model(stored);
        // What a wrapper keeps of the module that it stands for.
        if path.contains(".original_module.") || names::is_ignorable(path) {
            return Ok(());
        }
        if let Some((module, part)) = path.split_once(".lora_") {
            let name = names::canonical_module(module);
            let Some((part, adapter)) = Part::parse(part).filter(|(part, _)| self.takes(&name, *part)) else {
                self.unmatched.push(stored.to_owned());
                return Ok(());
            };
            self.adapters.extend(adapter.map(str::to_owned));
            if self.adapters.len() > 1 {
                let all: Vec<&str> = self.adapters.iter().map(String::as_str).collect();
                let message = format!("{} holds several adapters: {}", file.display(), all.join(", "));
                return Err(
                    Error::data(message).hint("save one of them alone: save_pretrained(selected_adapters=[...])")
                );
            }
            let parts = self.parts.entry(name).or_default();
            parts.path = module.to_owned();
            return place(file, stored, parts.tensors.entry(part), read()?);
        }
        let path = path.replace(".base_layer.", ".");
        let Some((path, name)) = self.whole(&path) else {
            self.unmatched.push(stored.to_owned());
            return Ok(());
        };
        let (tensor, shape) = (read()?, &self.wholes[&name]);
        if *shape != tensor.shape {
            let found = &tensor.shape;
            let message = format!("{}: {stored} is {found:?}, the model asks for {shape:?}", file.display());
            return Err(Error::data(message).hint("the adapter was made for another model"));
        }
        self.saved_paths.push(path);
        place(file, stored, self.saved.entry(name), tensor)
    }

    /// Whether a part of an adapter can be one of this module's.
    fn takes(&self, module: &str, part: Part) -> bool {
        let of_embedding = matches!(part, Part::EmbeddingA | Part::EmbeddingB);
        self.linears.contains_key(module) && (module == embeddings()) == of_embedding
    }

    /// The path and canonical name of a whole tensor; a raw state dict has the adapter's name in its path.
    fn whole(&self, path: &str) -> Option<(String, String)> {
        let candidates = match path.split_once(".modules_to_save.") {
            None => vec![path.to_owned(), path.replace(".default.", ".")],
            Some((module, rest)) => {
                let unnamed = rest.split_once('.').map_or(rest, |(_, rest)| rest);
                vec![format!("{module}.{rest}"), format!("{module}.{unnamed}")]
            }
        };
        let named = candidates.into_iter().map(|path| (names::canonical(&path), path));
        named.map(|(name, path)| (path, name)).find(|(_, name)| self.wholes.contains_key(name))
    }

    fn refuse_unmatched(&self, weights: &Path, config: &ModelConfig) -> Result<()> {
        if self.unmatched.is_empty() {
            return Ok(());
        }
        let count = self.unmatched.len();
        let mut listed: Vec<String> =
            self.unmatched.iter().take(SHOWN).map(|name| format!("  {name}{}", self.near(name, config))).collect();
        if count > SHOWN {
            listed.push(format!("  … {} more", count - SHOWN));
        }
        let message = format!("{}: tensors that match nothing in the model:\n{}", weights.display(), listed.join("\n"));
        Err(Error::data(message).hint("the adapter was made for another model"))
    }

    /// The nearest name that would have matched.
    fn near(&self, stored: &str, config: &ModelConfig) -> String {
        let path = path_in_model(stored);
        let near = match path.split_once(".lora_") {
            Some((module, part)) => {
                let part = Part::parse(part).map_or("A.weight", |_| part);
                let known = self.linears.keys().map(String::as_str);
                nearest(&names::canonical_module(module), known)
                    .map(|name| format!("{PREFIX}{}.lora_{part}", names::at_runtime(name, config)))
            }
            None => nearest(&names::canonical(path), self.wholes.keys().map(String::as_str))
                .map(|name| format!("{PREFIX}{}", names::at_runtime(name, config))),
        };
        near.map(|near| format!("\n    the nearest is {near}")).unwrap_or_default()
    }

    /// A module that target_modules lists, and that the model has, must have left something in the file.
    fn check_targets(&self, weights: &Path, settings: &AdapterConfig, config: &ModelConfig) -> Result<()> {
        for target in settings.target_modules.iter().filter(|_| !settings.excludes) {
            let whole = names::canonical_module(target);
            let is_meant = |path: &str| path == target || path.ends_with(&format!(".{target}"));
            let in_file =
                self.parts.iter().any(|(name, parts)| *name == whole || is_meant(name) || is_meant(&parts.path));
            let in_model =
                |name: &String| *name == whole || is_meant(name) || is_meant(&names::at_runtime(name, config));
            if !in_file && let Some(module) = self.linears.keys().find(|name| in_model(name)) {
                let message = format!("{} holds nothing of {target}, which target_modules names", weights.display());
                return Err(Error::data(message).hint(format!(
                    "tensors such as {PREFIX}{}.lora_A.weight are missing: the file was not saved whole",
                    names::at_runtime(module, config)
                )));
            }
        }
        Ok(())
    }

    fn check_saved(&mut self, weights: &Path, settings: &AdapterConfig, config: &ModelConfig) -> Result<()> {
        let shown = weights.display();
        if let Some(llava) = config.llava() {
            for (name, _) in names::projector_identity_tensors(llava) {
                if self.saved.remove(&name).is_some_and(|tensor| tensor != identity_layer(&tensor.shape)) {
                    let message = format!("{shown}: the model's projector is `linear`, but {name} is not an identity");
                    return Err(Error::data(message).hint("the adapter was made for a model with another projector"));
                }
            }
            let projector = names::projector_tensors(llava);
            let has = |name: &str| self.saved.contains_key(name);
            // Biases may have been trained alone.
            if projector.iter().any(|(name, _)| name.ends_with(".weight") && has(name))
                && let Some((name, _)) = projector.iter().find(|(name, _)| !has(name))
                && !self.parts.keys().any(|module| module.starts_with(names::PROJECTOR))
            {
                return Err(Error::data(format!("{shown} holds a part of the projector, but not {name}")));
            }
        }
        for module in &settings.modules_to_save {
            let within = |path: &String| path.contains(&format!("{module}."));
            if !self.saved.keys().any(within) && !self.saved_paths.iter().any(within) {
                return Err(Error::data(format!("{shown} holds nothing of {module}, which modules_to_save names")));
            }
        }
        if self.parts.is_empty() && self.saved.is_empty() {
            return Err(Error::data(format!("{shown} holds no tensors")));
        }
        Ok(())
    }

    fn into_adapter(self, weights: &Path, settings: &AdapterConfig, config: &ModelConfig) -> Result<Adapter> {
        let mut adapter = Adapter::new(settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora);
        for (name, parts) in self.parts {
            let shape = self.linears[&name];
            let read = parts.read(weights, &name, shape, settings)?;
            adapter.modules.insert(name, read);
        }
        adapter.saved = self.saved;
        if config.text().tie_word_embeddings {
            adapter.settle_tied(weights, settings)?;
        }
        Ok(adapter)
    }
}

/// Puts a tensor where none is yet, or one that is the same.
fn place<K: Ord>(file: &Path, stored: &str, slot: Entry<'_, K, HostTensor>, tensor: HostTensor) -> Result<()> {
    match slot {
        Entry::Vacant(slot) => _ = slot.insert(tensor),
        Entry::Occupied(slot) if *slot.get() == tensor => {}
        Entry::Occupied(_) => {
            let message =
                format!("{}: {stored} is there a second time under another name, with other values", file.display());
            return Err(Error::data(message));
        }
    }
    Ok(())
}

impl Parts {
    /// `[out, in]` is the shape of the linear adapted.
    fn read(
        mut self,
        weights: &Path,
        name: &str,
        [out, inputs]: [usize; 2],
        settings: &AdapterConfig,
    ) -> Result<LoraWeights> {
        let shown = weights.display();
        let rank = settings.rank_of(&self.path)?;
        let (a, b) = match name == embeddings() {
            true => (
                (Part::EmbeddingA, "lora_embedding_A", [rank, out]),
                (Part::EmbeddingB, "lora_embedding_B", [inputs, rank]),
            ),
            false => ((Part::A, "lora_A", [rank, inputs]), (Part::B, "lora_B", [out, rank])),
        };
        let mut take = |(part, which, shape): (Part, &str, [usize; 2])| {
            let tensor = self.tensors.remove(&part);
            let tensor = tensor.ok_or_else(|| Error::data(format!("{shown}: {name} has no {which}")))?;
            fits(weights, name, which, &tensor, &shape)
                .map_err(|error| error.hint(format!("adapter_config.json gives this module the rank {rank}")))?;
            Ok(tensor)
        };
        let (a, b) = (take(a)?, take(b)?);
        let (lora_a, lora_b) = if name == embeddings() { (transposed(&b), transposed(&a)) } else { (a, b) };
        let magnitude = self.tensors.remove(&Part::Magnitude);
        match (&magnitude, settings.use_dora) {
            (None, true) => {
                return Err(Error::data(format!("{shown}: {name} has no lora_magnitude_vector"))
                    .hint("adapter_config.json says use_dora: the file was not saved whole"));
            }
            (Some(_), false) => {
                return Err(Error::data(format!("{shown}: {name} has a lora_magnitude_vector, but use_dora is false"))
                    .hint("set use_dora in adapter_config.json if the adapter was trained so"));
            }
            (Some(_), true) if name == embeddings() => {
                return Err(Error::data(format!("{shown}: {name}: DoRA of embeddings is not built yet")));
            }
            _ => {}
        }
        let bias = self.tensors.remove(&Part::Bias);
        for (tensor, which) in [(&magnitude, "lora_magnitude_vector"), (&bias, "lora_B.bias")] {
            tensor.as_ref().map_or(Ok(()), |tensor| fits(weights, name, which, tensor, &[out]))?;
        }
        let scale = scale(settings.alpha_of(&self.path)?, rank, settings.use_rslora);
        Ok(LoraWeights { lora_a, lora_b, scale, magnitude, bias })
    }
}

fn fits(weights: &Path, name: &str, which: &str, tensor: &HostTensor, shape: &[usize]) -> Result<()> {
    if tensor.shape == shape {
        return Ok(());
    }
    let message = format!("{}: {which} of {name} is {:?}, {shape:?} is expected", weights.display(), tensor.shape);
    let error = Error::data(message);
    Err(match tensor.is_empty() {
        true => error.hint("it is empty: a sharded run (ZeRO-3, FSDP) saved it without gathering its parts"),
        false => error,
    })
}

impl Adapter {
    /// What an adapter does to a model whose head is its embeddings. PEFT replaces or adapts the module that is named,
    /// and the other keeps the old values.
    fn settle_tied(&mut self, weights: &Path, settings: &AdapterConfig) -> Result<()> {
        let adapted = [embeddings(), head()].into_iter().find(|module| self.modules.contains_key(*module));
        if let Some(module) = adapted.filter(|_| settings.ensure_weight_tying) {
            let message =
                format!("{}: {module}: adapters that are tied to each other are not built yet", weights.display());
            return Err(Error::data(message).hint("merge it into its model in PEFT"));
        }
        // The wrapped module's own weight is in the file too, and was the other's as well.
        if let Some(module) = adapted
            && let Some(base) = self.saved.get(&format!("{module}.weight")).cloned()
        {
            let other = if module == head() { names::EMBED_TOKENS } else { names::LM_HEAD };
            self.saved.entry(other.to_owned()).or_insert(base);
        }
        let own_head = self.saved.get(names::LM_HEAD);
        let same = own_head.is_some() && own_head == self.saved.get(names::EMBED_TOKENS) && adapted.is_none();
        let named = settings.modules_to_save.iter().any(|module| module.ends_with("embed_tokens"));
        let embeddings_alone = own_head.is_none()
            && self.saved.contains_key(names::EMBED_TOKENS)
            && named
            && !settings.ensure_weight_tying;
        if same {
            self.saved.remove(names::LM_HEAD);
        }
        self.unties_head = adapted.is_some() || embeddings_alone || self.saved.contains_key(names::LM_HEAD);
        Ok(())
    }
}
