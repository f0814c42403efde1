//! The typed values of a resolved config.

use crate::{
    autograd::Checkpointing,
    error::{Error, Result},
    formats::peft::Pattern,
    hub::HubId,
    tensor::Dtype,
};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// An enum whose variants have the names that the config uses.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            pub fn parse(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$variant),)+ _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

named! {
    /// What is trained.
    Method {
        /// The projector alone.
        Projector = "projector",
        /// Language model and projector.
        Full = "full",
        /// Low-rank adapters on the language model, and the projector.
        Lora = "lora",
        /// The same on weights of four bits.
        Qlora = "qlora",
    }
}

impl Method {
    /// Whether an adapter trains, and is what the stage writes.
    pub fn trains_adapter(self) -> bool {
        matches!(self, Self::Lora | Self::Qlora)
    }
}

named! { ProjectorType { Linear = "linear", Mlp2xGelu = "mlp2x_gelu", } }
named! {
    /// Which of the vision tower's positions go to the projector.
    SelectFeature { Patch = "patch", ClsPatch = "cls_patch", }
}
named! {
    ImageAspectRatio {
        /// As preprocessor_config.json says.
        Square = "square",
        /// Squared with the mean colour first.
        Pad = "pad",
    }
}
named! {
    LrSchedulerType {
        Cosine = "cosine",
        Linear = "linear",
        Constant = "constant",
        ConstantWithWarmup = "constant_with_warmup",
    }
}
named! {
    LossNorm {
        /// Sum of the token losses of the whole step over its supervised tokens.
        GlobalTokens = "global_tokens",
        /// The mean of the means of the micro-batches, as trainers before transformers 4.46 did.
        MicroMean = "micro_mean",
    }
}
named! {
    Optim {
        AdamW = "adamw",
        /// Moments in eight bits, as bitsandbytes' `AdamW8bit`.
        AdamW8bit = "adamw_8bit",
    }
}
named! {
    /// How weights are kept on the device.
    Precision { Float32 = "float32", Float16 = "float16", Bfloat16 = "bfloat16", }
}

impl Precision {
    /// What a weight is on the device.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Float32 => Dtype::F32,
            Self::Float16 => Dtype::F16,
            Self::Bfloat16 => Dtype::Bf16,
        }
    }
}

named! {
    /// What layers keep for their backward.
    GradientCheckpointing { None = "none", Selective = "selective", Full = "full", Offload = "offload", }
}

impl GradientCheckpointing {
    /// The tape's name of it.
    pub fn mode(self) -> Checkpointing {
        match self {
            Self::None => Checkpointing::None,
            Self::Selective => Checkpointing::Selective,
            Self::Full => Checkpointing::Full,
            Self::Offload => Checkpointing::Offload,
        }
    }
}

/// Where weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the program itself; the name with its `embedded:`.
    Embedded(String),
    /// A folder or a file; it need not exist.
    Local(PathBuf),
    /// A repository of the Hugging Face Hub, `owner/name` or `owner/name@revision`.
    Hub(String),
}

pub(super) const EMBEDDED: &str = "embedded:";

impl Source {
    /// Reads `text` as written by a person in `folder`: `embedded:NAME`, a path, or, where nothing of that name is in
    /// `folder`, an `owner/name` of the Hub.
    pub fn parse(text: &str, folder: &Path) -> Self {
        let path = join(folder, text);
        if text.starts_with(EMBEDDED) {
            Self::Embedded(text.to_string())
        } else if !path.exists() && HubId::parse(text).is_some() {
            Self::Hub(text.to_string())
        } else {
            Self::Local(path)
        }
    }

    /// Back from the text that `Display` gave: a relative name can only be of the Hub.
    pub(super) fn from_resolved(text: &str) -> Self {
        if text.starts_with(EMBEDDED) {
            Self::Embedded(text.to_string())
        } else if Path::new(text).is_absolute() {
            Self::Local(text.into())
        } else {
            Self::Hub(text.to_string())
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(name) | Self::Hub(name) => f.write_str(name),
            Self::Local(path) => write!(f, "{}", path.display()),
        }
    }
}

/// `path` below `folder` without `.` parts; an absolute path stays.
pub(super) fn join(folder: &Path, path: impl AsRef<Path>) -> PathBuf {
    folder.join(path).components().collect()
}

/// Where records come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataSource {
    /// In the program itself; the name with its `embedded:`.
    Embedded(String),
    File(PathBuf),
}

impl DataSource {
    /// Whether there is something by that name.
    pub fn is_here(&self) -> bool {
        match self {
            Self::Embedded(_) => true,
            Self::File(path) => path.exists(),
        }
    }
}

impl fmt::Display for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// One data set of the mixture in `data_path`.
#[derive(Clone, Debug, PartialEq)]
pub struct DataEntry {
    pub path: DataSource,
    /// Given, or the data file's folder; none for embedded data.
    pub image_folder: Option<PathBuf>,
    /// How often its records are taken, relative to the other entries.
    pub weight: f64,
    /// Only so many records from the front.
    pub limit: Option<usize>,
}

/// Which linear layers of the decoder get an adapter, by PEFT's rules.
#[derive(Clone, Debug)]
pub enum TargetModules {
    AllLinear,
    /// A module whose path is one of these, or ends in `.` and one of these.
    Names(Vec<String>),
    /// A module whose whole path matches.
    Pattern(Pattern),
}

impl TargetModules {
    /// # Errors
    /// Not a regular expression.
    pub fn parse(text: &str) -> Result<Self> {
        if text.eq_ignore_ascii_case("all-linear") {
            return Ok(Self::AllLinear);
        }
        let pattern =
            Pattern::whole(text).map_err(|error| Error::usage("not a regular expression").caused_by(error))?;
        Ok(Self::Pattern(pattern))
    }

    /// Whether the linear layer at `path` (`model.layers.0.self_attn.q_proj`) gets an adapter.
    ///
    /// # Errors
    /// `Usage`: a pattern that takes too long to match.
    pub fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::AllLinear => Ok(true),
            Self::Names(names) => Ok(names.iter().any(|name| {
                path.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })),
            Self::Pattern(pattern) => pattern.matches(path).map_err(|error| {
                Error::usage(format!("target_modules: `{}` takes too long to match {path}", pattern.text()))
                    .caused_by(error)
                    .hint("use a simpler pattern, or a list of names")
            }),
        }
    }
}

impl PartialEq for TargetModules {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::AllLinear, Self::AllLinear) => true,
            (Self::Names(a), Self::Names(b)) => a == b,
            (Self::Pattern(a), Self::Pattern(b)) => a == b,
            _ => false,
        }
    }
}

/// Which adapter to run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// As `devices` lists them.
    Index(usize),
    /// A part of the adapter's name.
    Name(String),
}

/// As `--device` takes it.
impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_by_suffix_and_patterns_match_whole_paths() {
        let q = "model.layers.0.self_attn.q_proj";
        let names = |names: &[&str]| TargetModules::Names(names.iter().map(|&name| name.to_owned()).collect());
        let pattern = |text| TargetModules::parse(text).unwrap();
        for (targets, expected) in [
            (names(&["v_proj", "q_proj"]), true),
            (names(&["self_attn.q_proj"]), true),
            (names(&["proj"]), false),
            (pattern(r"model\.layers\.\d+\.self_attn\.(q|v)_proj"), true),
            // Alternatives must not escape the anchors.
            (pattern("model|q_proj"), false),
            (pattern("all-linear"), true),
            (pattern("All-Linear"), true),
        ] {
            assert_eq!(targets.matches(q).unwrap(), expected, "{targets:?}");
        }
        assert!(TargetModules::parse("(").is_err());
    }

    #[test]
    fn a_hub_id_is_not_taken_for_a_path_unless_the_folder_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let parse = |text: &str| Source::parse(text, dir.path());
        assert_eq!(parse("embedded:tiny"), Source::Embedded("embedded:tiny".into()));
        assert_eq!(parse("lmsys/vicuna-7b-v1.5"), Source::Hub("lmsys/vicuna-7b-v1.5".into()));
        assert_eq!(parse("a/b@v1.0"), Source::Hub("a/b@v1.0".into()));
        assert_eq!(parse("./vicuna"), Source::Local(dir.path().join("vicuna")));
        assert_eq!(parse("../a/b"), Source::Local(dir.path().join("../a/b")));
        assert_eq!(parse("models/a/b"), Source::Local(dir.path().join("models/a/b")));
        std::fs::create_dir_all(dir.path().join("lmsys/vicuna-7b-v1.5")).unwrap();
        let local = parse("lmsys/vicuna-7b-v1.5");
        assert_eq!(local, Source::Local(dir.path().join("lmsys/vicuna-7b-v1.5")));
        assert_eq!(Source::from_resolved(&local.to_string()), local);
    }
}
