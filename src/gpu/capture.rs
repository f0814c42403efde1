//! Keeps what kernels are given and what they make of it, so that another WebGPU can be asked the same (tools/dawn).

use std::{collections::HashSet, fs, path::PathBuf, sync::Mutex};

use serde_json::json;

use super::{
    context::{Binding, Gpu},
    kernel,
};

/// The first launch of every kernel, as files in one folder.
pub(super) struct Capture {
    folder: PathBuf,
    subgroups: bool,
    seen: Mutex<HashSet<String>>,
}

impl Capture {
    pub fn new(folder: PathBuf, subgroups: bool) -> Self {
        Self { folder, subgroups, seen: Mutex::default() }
    }

    /// Lets `launch` record the dispatch of `name`. When it is the first, three files tell of it: `NAME.wgsl`, with the
    /// parameters as a uniform; `NAME.bin`, all bindings' bytes before, then all after; `NAME.json`, how to launch it.
    pub fn launch(
        &self,
        gpu: &Gpu,
        (name, bindings, params, groups): (&str, &[Binding<'_>], &[u32], [u32; 3]),
        launch: impl FnOnce(),
    ) -> Result<(), String> {
        let first = self.seen.lock().map_err(|error| error.to_string())?.insert(name.to_owned());
        if !first {
            launch();
            return Ok(());
        }
        let content = || -> Result<Vec<u8>, String> {
            let read =
                |binding: &Binding<'_>| gpu.read(binding.buffer, binding.offset, binding.size.next_multiple_of(4));
            let parts: Result<Vec<_>, _> = bindings.iter().map(read).collect();
            Ok(parts.map_err(|error| error.to_string())?.concat())
        };
        let mut bytes = content()?;
        launch();
        bytes.extend(content()?);
        let variants = kernel::shader_variants();
        let variant = variants.iter().find(|variant| variant.name == name).ok_or("no such variant")?;
        let shape = |binding: &Binding<'_>| {
            // The first binding of the same memory: itself, or what it aliases.
            let touches = |other: &Binding<'_>| {
                let (end, other_end) = (binding.offset + binding.size, other.offset + other.size);
                other.buffer.id == binding.buffer.id && other.offset < end && binding.offset < other_end
            };
            let same = bindings.iter().position(touches);
            json!({ "size": binding.size.next_multiple_of(4), "uniform": binding.uniform, "same": same })
        };
        let shapes: Vec<_> = bindings.iter().map(shape).collect();
        let how = json!({ "entry": variant.kernel, "groups": groups, "params": params, "bindings": shapes });
        let modes: &[&str] = if self.subgroups { &["SUBGROUPS"] } else { &[] };
        let write = |extension: &str, bytes: &[u8]| {
            fs::write(self.folder.join(format!("{name}.{extension}")), bytes).map_err(|error| error.to_string())
        };
        write("wgsl", kernel::expand_shader(variant, modes).as_bytes())?;
        write("bin", &bytes)?;
        write("json", how.to_string().as_bytes())
    }
}
