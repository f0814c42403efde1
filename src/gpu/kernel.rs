//! Kernels: variants of the packed shaders, compiled on first use and kept.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError},
};

use super::wgsl::{self, Variant};

mod packed {
    include!(concat!(env!("OUT_DIR"), "/shaders.rs"));
}

static VARIANTS: LazyLock<HashMap<String, Variant>> =
    LazyLock::new(|| shader_variants().into_iter().map(|variant| (variant.name.clone(), variant)).collect());

/// Every variant of `shaders/variants`, in its order. (`build.rs` has validated the list.)
pub fn shader_variants() -> Vec<Variant> {
    wgsl::parse_variants(packed::VARIANTS).expect("build.rs has read the same list")
}

/// The plain WGSL of a variant; `modes` are `IMMEDIATES` and `SUBGROUPS` as far as the device has them.
pub fn expand_shader(variant: &Variant, modes: &[&str]) -> String {
    let file = |name: &str| packed::FILES.iter().find(|(file, _)| *file == name).map(|(_, text)| *text);
    wgsl::expand(variant, modes, &file).expect("build.rs has expanded the same variant")
}

/// Immediate data or uniform bytes a kernel may take.
pub(super) const MAX_PARAMS: usize = 128;

/// Compiled pipelines, and one pipeline layout per list of binding kinds, shared by all of them.
pub(super) struct Kernels {
    modes: Vec<&'static str>,
    pub immediates: bool,
    layouts: Mutex<HashMap<Vec<bool>, Arc<Layout>>>,
    /// By variant; a cell is filled outside of the lock, so that threads compile at once, and each kernel once.
    pipelines: Mutex<HashMap<String, Arc<OnceLock<wgpu::ComputePipeline>>>>,
    params_layout: Option<wgpu::BindGroupLayout>,
}

pub(super) struct Layout {
    pub bind_group: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

impl Kernels {
    pub fn new(device: &wgpu::Device, immediates: bool, subgroups: bool) -> Self {
        let mut modes = Vec::new();
        modes.extend(immediates.then_some("IMMEDIATES"));
        modes.extend(subgroups.then_some("SUBGROUPS"));
        let params_layout = (!immediates).then(|| {
            let entry = wgpu::BindGroupLayoutEntry {
                binding: 0,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Uniform,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            };
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &[entry] })
        });
        Self { modes, immediates, layouts: Mutex::default(), pipelines: Mutex::default(), params_layout }
    }

    pub fn params_layout(&self) -> Option<&wgpu::BindGroupLayout> {
        self.params_layout.as_ref()
    }

    /// The layout of a list of buffers, uniform or storage. Storage is always read-write: wgpu tracks whole buffers,
    /// and one buffer bound both read-only and read-write in a dispatch would be refused.
    pub fn layout(&self, device: &wgpu::Device, uniforms: &[bool]) -> Arc<Layout> {
        let mut layouts = self.layouts.lock().unwrap_or_else(PoisonError::into_inner);
        layouts.entry(uniforms.to_vec()).or_insert_with(|| Arc::new(self.new_layout(device, uniforms))).clone()
    }

    fn new_layout(&self, device: &wgpu::Device, uniforms: &[bool]) -> Layout {
        let entries: Vec<_> = (0u32..)
            .zip(uniforms)
            .map(|(binding, &uniform)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: if uniform {
                        wgpu::BufferBindingType::Uniform
                    } else {
                        wgpu::BufferBindingType::Storage { read_only: false }
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let bind_group =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let mut groups = vec![Some(&bind_group)];
        groups.extend(self.params_layout.as_ref().map(Some));
        let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &groups,
            immediate_size: if self.immediates { MAX_PARAMS as u32 } else { 0 },
        });
        Layout { bind_group, pipeline }
    }

    /// The pipeline of the variant called `name`; another thread that compiles it is waited for.
    ///
    /// # Panics
    /// When no variant has that name: a mistake in the program, which every op's test would meet.
    pub fn pipeline(&self, device: &wgpu::Device, name: &str, layout: &Layout) -> wgpu::ComputePipeline {
        let cell = {
            let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
            match pipelines.get(name) {
                Some(cell) => cell.clone(),
                None => pipelines.entry(name.to_owned()).or_default().clone(),
            }
        };
        cell.get_or_init(|| self.compile(device, name, layout)).clone()
    }

    fn compile(&self, device: &wgpu::Device, name: &str, layout: &Layout) -> wgpu::ComputePipeline {
        let variant = VARIANTS.get(name).unwrap_or_else(|| panic!("shaders/variants has no `{name}`"));
        let text = expand_shader(variant, &self.modes);
        // SAFETY: unchecked code must not index out of bounds nor loop for ever: every launch passes the extents
        // that its kernel tests against, and `tests/ops.rs` runs each kernel at awkward sizes.
        let module = unsafe {
            device.create_shader_module_trusted(
                wgpu::ShaderModuleDescriptor { label: Some(name), source: wgpu::ShaderSource::Wgsl(text.into()) },
                wgpu::ShaderRuntimeChecks::unchecked(),
            )
        };
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&layout.pipeline),
            module: &module,
            entry_point: Some(&variant.kernel),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        })
    }
}
