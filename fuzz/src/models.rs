//! What of `models` describes checkpoints.

#[path = "../../src/models/config.rs"]
pub mod config;
#[path = "../../src/models/config_fields.rs"]
pub(crate) mod config_fields;
#[path = "../../src/models/config_json.rs"]
mod config_json;
#[path = "../../src/models/names.rs"]
pub mod names;
#[path = "../../src/models/rotary.rs"]
pub mod rotary;
