//! The one constant that a config is checked against.

pub mod attention {
    /// As in the library's `ops::attention`.
    pub const MAX_HEAD_SIZE: usize = 256;
}
