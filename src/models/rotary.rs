//! Rotary frequencies of a model: the plain ones, and those that are stretched for longer texts, as transformers'
//! `modeling_rope_utils` computes them.

use serde_json::{Map, Value, json};

use super::{config::LlamaConfig, config_fields::Fields};
use crate::error::Result;

/// `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// A larger theta for sequences longer than `max_position_embeddings`, following their length.
    Dynamic {
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, those between blended (LLaMA 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

impl RopeScaling {
    /// theta and the scaling of a decoder's fields.
    ///
    /// # Errors
    /// `Data`: a kind of scaling that is not built, a value that is missing or out of range.
    pub(super) fn from_fields(fields: &Fields, max_position_embeddings: usize) -> Result<(f64, Self)> {
        let mut theta = fields.positive("rope_theta", 10000.0)?;
        let mut scaling = Self::None;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(map) = fields.object(key)? else { continue };
            let path = fields.path_of(key) + ".";
            let rope = Fields { file: fields.file, path: &path, map };
            if rope.positive("partial_rotary_factor", 1.0)? != 1.0 {
                return Err(rope.not_built("partial_rotary_factor", "rotary positions on a part of each head are"));
            }
            theta = rope.positive("rope_theta", theta)?;
            let kind_key = if map.contains_key("rope_type") { "rope_type" } else { "type" };
            scaling = match rope.text(kind_key)?.unwrap_or("default") {
                "default" => Self::None,
                "linear" => Self::Linear { factor: rope.number_at_least_one("factor")? },
                "dynamic" => Self::Dynamic { factor: rope.number_at_least_one("factor")? },
                "llama3" => {
                    let (low, high) = (rope.positive("low_freq_factor", 1.0)?, rope.positive("high_freq_factor", 4.0)?);
                    if high <= low {
                        return Err(
                            rope.bad("high_freq_factor", &format!("is {high}, not above low_freq_factor {low}"))
                        );
                    }
                    Self::Llama3 {
                        factor: rope.number_at_least_one("factor")?,
                        low_freq_factor: low,
                        high_freq_factor: high,
                        original_max_position_embeddings: rope
                            .positive("original_max_position_embeddings", max_position_embeddings as f64)?,
                    }
                }
                other => return Err(rope.not_built(kind_key, &format!("rotary scaling of type `{other}` is"))),
            };
        }
        Ok((theta, scaling))
    }

    /// Writes it as both generations of transformers read it: `rope_theta` and `rope_scaling`, and into
    /// `rope_parameters` where that stands.
    pub(super) fn write(self, theta: f64, map: &mut Map<String, Value>) {
        let mut scaling = Map::new();
        let mut put = |key: &str, value: f64| scaling.insert(key.to_owned(), json!(value));
        let kind = match self {
            Self::None => None,
            Self::Linear { factor } => {
                put("factor", factor);
                Some("linear")
            }
            Self::Dynamic { factor } => {
                put("factor", factor);
                Some("dynamic")
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                put("factor", factor);
                put("low_freq_factor", low_freq_factor);
                put("high_freq_factor", high_freq_factor);
                let original = original_max_position_embeddings as u64;
                scaling.insert("original_max_position_embeddings".into(), json!(original));
                Some("llama3")
            }
        };
        map.insert("rope_theta".into(), json!(theta));
        if let Some(kind) = kind {
            scaling.insert("rope_type".into(), json!(kind));
        }
        if let Some(Value::Object(rope)) = map.get_mut("rope_parameters") {
            rope.insert("rope_theta".into(), json!(theta));
            rope.extend(scaling.clone());
        }
        if kind.is_some() {
            map.insert("rope_scaling".into(), Value::Object(scaling));
        }
    }

    /// How many positions a text may have.
    pub fn positions(self, max_position_embeddings: usize) -> usize {
        match self {
            Self::Linear { factor } | Self::Dynamic { factor } => (max_position_embeddings as f64 * factor) as usize,
            Self::None | Self::Llama3 { .. } => max_position_embeddings,
        }
    }
}

/// Radians per position [E / 2] for the tokens of a sequence of `length` tokens.
pub fn frequencies(config: &LlamaConfig, length: usize) -> Vec<f32> {
    let dim = config.head_dim as f64;
    let most = config.max_position_embeddings as f64;
    let theta = match config.rope_scaling {
        RopeScaling::Dynamic { factor } => {
            let stretch = factor * (length as f64).max(most) / most - (factor - 1.0);
            config.rope_theta * stretch.powf(dim / (dim - 2.0))
        }
        _ => config.rope_theta,
    };
    let plain = (0..config.head_dim / 2).map(|j| 1.0 / theta.powf(2.0 * j as f64 / dim));
    let scaled = plain.map(|frequency| match config.rope_scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            let share = original_max_position_embeddings / wavelength;
            // 0 below the low factor, 1 above the high one.
            let kept = ((share - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            (1.0 - kept) * frequency / factor + kept * frequency
        }
    });
    scaled.map(|frequency| frequency as f32).collect()
}

/// Whether the frequencies of a sequence of `length` tokens differ from those of short ones.
pub fn depends_on_length(config: &LlamaConfig, length: usize) -> bool {
    matches!(config.rope_scaling, RopeScaling::Dynamic { .. }) && length > config.max_position_embeddings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::config::ModelConfig;

    fn config(rope: &str) -> LlamaConfig {
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64, {rope}}}"#
        );
        ModelConfig::parse("config.json", text.as_bytes()).unwrap().text().clone()
    }

    /// `ROPE_INIT_FUNCTIONS` of transformers 5.23, head_dim 16.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let cases = [
            (r#""rope_scaling": {"type": "linear", "factor": 4.0}"#, 10, FREQUENCIES[0]),
            (r#""rope_scaling": {"rope_type": "dynamic", "factor": 2.0}"#, 64, FREQUENCIES[1]),
            (r#""rope_scaling": {"rope_type": "dynamic", "factor": 2.0}"#, 100, FREQUENCIES[2]),
            (
                r#""rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#,
                10,
                FREQUENCIES[3],
            ),
        ];
        for (rope, length, expected) in cases {
            for (found, expected) in frequencies(&config(rope), length).iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() <= 2e-7 * expected, "{rope}: {found} and {expected}");
            }
        }
    }

    #[rustfmt::skip]
    const FREQUENCIES: [[f64; 8]; 4] = [
        [2.5e-1, 7.905694097e-2, 2.500000037e-2, 7.905694656e-3, 2.499999944e-3, 7.905694656e-4, 2.500000119e-4, 7.905694656e-5],
        [1.0, 3.162277639e-1, 1.000000015e-1, 3.162277862e-2, 9.999999776e-3, 3.162277862e-3, 1.000000047e-3, 3.162277862e-4],
        [1.0, 2.839451432e-1, 8.062484115e-2, 2.289303020e-2, 6.500365213e-3, 1.845747000e-3, 5.240908940e-4, 1.488130656e-4],
        [1.0, 2.424034476e-2, 4.700753838e-3, 9.115831344e-4, 1.767766807e-4, 3.428102355e-5, 6.647869668e-6, 1.289173156e-6],
    ];

    #[test]
    fn what_is_read_is_written_and_read_again() {
        for rope in [
            r#""rope_theta": 5000.0"#,
            r#""rope_scaling": {"type": "linear", "factor": 4.0}"#,
            r#""rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0}"#,
            r#""rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#,
        ] {
            let first = ModelConfig::Llama(config(rope));
            let again = ModelConfig::parse("config.json", first.to_json("float32").to_string().as_bytes()).unwrap();
            assert_eq!(again.text().rope_scaling, first.text().rope_scaling);
            assert_eq!(again.text().rope_theta, first.text().rope_theta);
        }
    }
}
