//! Which adapters there are, and which one a run takes.

use std::path::PathBuf;

use serde::Serialize;

use super::choices::Choices;
use crate::error::{Error, Result};

/// What a user may ask for; everything unset means the best adapter, a real GPU before a CPU.
#[derive(Clone, Debug, Default)]
pub struct AdapterOptions {
    /// An index of [`list_adapters`], or a part of the adapter's name.
    pub device: Option<String>,
    /// `vulkan`, `metal`, `dx12` or `gl`.
    pub backend: Option<String>,
    /// Bind no more than this many bytes at once (tests use it to force large tensors to be cut).
    pub max_binding: Option<u64>,
    /// Leave subgroup operations unused even where the device has them.
    pub without_subgroups: bool,
    /// Leave cooperative matrices unused even where the device has them.
    pub without_cooperative: bool,
    /// Run a GPU's kernels even on a host processor (tests use it).
    pub treat_as_gpu: bool,
    /// As if the driver's `unpack2x16float` were known to keep subnormals.
    pub unpacks_f16: bool,
    /// What was measured to be better than the rules of ops; others may be set later.
    pub choices: Choices,
    /// Time every dispatch ([`Gpu::profile`](super::Gpu::profile)); slow.
    pub profile: bool,
    /// Keep the first launch of every kernel in this folder, with all it read and wrote (tests use it); slow.
    pub capture: Option<PathBuf>,
}

/// One adapter as `wgpu-llava devices` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterFacts {
    pub index: usize,
    pub name: String,
    pub backend: String,
    pub driver: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes of device memory, where the backend tells.
    pub memory: Option<u64>,
    pub features: Vec<String>,
    /// What kernels can use of its cooperative matrices: none where shapes or types are others than theirs.
    pub cooperative: Vec<Cooperative>,
    pub limits: AdapterLimits,
    /// Whether kernels run on the host's processor.
    pub is_cpu: bool,
    /// Lanes of a subgroup, where kernels may use subgroups and all have as many.
    #[serde(skip)]
    pub lanes: Option<u32>,
    /// Whether loads of storage are far slower than loads of uniforms there: in Mesa before 26.
    #[serde(skip)]
    pub slow_storage: bool,
    /// Whether `unpack2x16float` is known to keep subnormals: seen on NVIDIA's Vulkan driver.
    #[serde(skip)]
    pub unpacks_f16: bool,
    /// What was measured to be better than the rules of ops; nothing, unless somebody sets it.
    #[serde(skip)]
    pub choices: Choices,
}

/// Cooperative matrices of side x side, multiplied by the lanes of a subgroup together and summed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cooperative {
    /// 8 or 16.
    pub side: u32,
    /// `f16` or `f32`.
    pub operands: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub struct AdapterLimits {
    pub max_buffer_size: u64,
    pub max_storage_buffer_binding_size: u64,
    pub min_storage_buffer_offset_alignment: u32,
    pub max_compute_workgroup_storage_size: u32,
    pub max_compute_invocations_per_workgroup: u32,
    pub max_uniform_buffers_per_shader_stage: u32,
    pub subgroup_min_size: u32,
    pub subgroup_max_size: u32,
}

/// What a device that runs on the host's processor is called.
pub(super) const SOFTWARE: &str = "CPU (software)";

const NO_ADAPTER: &str = "no GPU adapter was found";
const NO_ADAPTER_HINTS: [&str; 3] = [
    "on Debian or Ubuntu: apt-get install libvulkan1 mesa-vulkan-drivers (software Vulkan included), or run tools/quickstart",
    "with a real GPU: install its vendor's Vulkan driver; on macOS and Windows the system brings one",
    "`wgpu-llava devices` lists what can be seen",
];

/// Every Windows has an adapter for Direct3D 12, if only its software one: where none is found, the compiler is missing.
const NO_DXC: &str = "Direct3D 12 cannot be used without the shader compiler DXC, and its predecessor FXC is refused";
const NO_DXC_HINTS: [&str; 3] = [
    "put dxcompiler.dll (1.8.2502 or newer, from the releases of Microsoft's DirectXShaderCompiler) beside wgpu-llava.exe or on the PATH",
    "or build with `cargo build --release --features static-dxc`, which needs no such file",
    "or use your GPU's Vulkan driver: --backend vulkan",
];

/// Kernels go to DXC alone: FXC knows neither subgroups nor 16-bit floats, and takes minutes over unrolled blocks or fails
/// at them. Without DXC the backend has no adapters.
fn dxc() -> wgpu::Dx12Compiler {
    if cfg!(all(feature = "static-dxc", windows, target_env = "msvc", not(target_arch = "aarch64"))) {
        wgpu::Dx12Compiler::StaticDxc
    } else {
        wgpu::Dx12Compiler::default_dynamic_dxc()
    }
}

/// Why there is no adapter at all, or none of `backend`; `other` is what can be had without asking for it.
fn no_adapter(backend: Option<&str>, other: Option<&AdapterFacts>, on_windows: bool) -> Error {
    let without_dxc = on_windows && backend.is_none_or(|backend| backend == "dx12");
    let error = match (backend, other) {
        _ if without_dxc && backend.is_some() => Error::device(NO_DXC),
        (Some(backend), Some(other)) => {
            return Error::device(format!("no adapter offers the backend `{backend}`"))
                .hint(format!("without --backend there is {} ({})", other.name, other.backend));
        }
        _ => NO_ADAPTER_HINTS.iter().fold(Error::device(NO_ADAPTER), |error, hint| error.hint(*hint)),
    };
    if !without_dxc {
        return error;
    }
    NO_DXC_HINTS.iter().fold(error, |error, hint| error.hint(*hint))
}

pub(super) fn instance(backend: Option<&str>) -> Result<wgpu::Instance> {
    let backends = match backend {
        None => wgpu::Backends::PRIMARY,
        Some("vulkan") => wgpu::Backends::VULKAN,
        Some("metal") => wgpu::Backends::METAL,
        Some("dx12") => wgpu::Backends::DX12,
        Some("gl") => wgpu::Backends::GL,
        Some(other) => {
            return Err(Error::usage(format!("unknown backend `{other}`")).hint("use vulkan, metal, dx12 or gl"));
        }
    };
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    // VALIDATION_INDIRECT_CALL lowers buffer limits, and nothing here dispatches indirectly.
    descriptor.flags = wgpu::InstanceFlags::empty();
    descriptor.backend_options.dx12.shader_compiler = dxc();
    Ok(wgpu::Instance::new(descriptor))
}

fn adapters(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    // Best first, so that index 0 is what a run takes by itself; the sort is stable.
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Every adapter of the backend (all primary ones when `None`), best first.
pub fn list_adapters(backend: Option<&str>) -> Result<Vec<AdapterFacts>> {
    let instance = instance(backend)?;
    Ok(adapters(&instance).iter().enumerate().map(|(index, adapter)| facts(index, adapter)).collect())
}

pub(super) fn facts(index: usize, adapter: &wgpu::Adapter) -> AdapterFacts {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let known = [
        (wgpu::Features::SHADER_F16, "f16"),
        (wgpu::Features::SUBGROUP, "subgroups"),
        (wgpu::Features::IMMEDIATES, "immediates"),
        (wgpu::Features::TIMESTAMP_QUERY, "timestamps"),
        (wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX, "cooperative-matrix"),
    ];
    AdapterFacts {
        index,
        name: info.name.clone(),
        backend: info.backend.to_str().to_string(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete GPU",
            wgpu::DeviceType::IntegratedGpu => "integrated GPU",
            wgpu::DeviceType::VirtualGpu => "virtual GPU",
            wgpu::DeviceType::Cpu => SOFTWARE,
            wgpu::DeviceType::Other => "other",
        }
        .to_string(),
        // What a software device calls its memory is a constant of its driver.
        memory: if info.device_type == wgpu::DeviceType::Cpu { host_memory() } else { memory(adapter) },
        features: known.iter().filter(|(bit, _)| features.contains(*bit)).map(|(_, name)| name.to_string()).collect(),
        cooperative: if features.contains(COOPERATIVE) { cooperative(adapter) } else { Vec::new() },
        limits: AdapterLimits {
            max_buffer_size: limits.max_buffer_size,
            max_storage_buffer_binding_size: limits.max_storage_buffer_binding_size,
            min_storage_buffer_offset_alignment: limits.min_storage_buffer_offset_alignment,
            max_compute_workgroup_storage_size: limits.max_compute_workgroup_storage_size,
            max_compute_invocations_per_workgroup: limits.max_compute_invocations_per_workgroup,
            max_uniform_buffers_per_shader_stage: limits.max_uniform_buffers_per_shader_stage,
            subgroup_min_size: info.subgroup_min_size,
            subgroup_max_size: info.subgroup_max_size,
        },
        is_cpu: info.device_type == wgpu::DeviceType::Cpu,
        lanes: (features.contains(wgpu::Features::SUBGROUP) && info.subgroup_min_size == info.subgroup_max_size)
            .then_some(info.subgroup_min_size),
        slow_storage: mesa_version(&info.driver_info).is_some_and(|version| version < 26),
        unpacks_f16: adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::SHADER_F16_IN_F32)
            && info.backend == wgpu::Backend::Vulkan
            && info.driver.starts_with("NVIDIA"),
        choices: Choices::default(),
    }
}

/// What a device needs for the kernels of cooperative matrices.
pub(super) const COOPERATIVE: wgpu::Features =
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(wgpu::Features::SHADER_F16).union(wgpu::Features::SUBGROUP);

/// The square shapes that are summed in f32. The feature alone says nothing: some drivers have other shapes only.
fn cooperative(adapter: &wgpu::Adapter) -> Vec<Cooperative> {
    let usable = |one: &wgpu::CooperativeMatrixProperties| {
        let operands = match (one.ab_type, one.cr_type) {
            (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32) => "f16",
            (wgpu::CooperativeScalarType::F32, wgpu::CooperativeScalarType::F32) => "f32",
            _ => return None,
        };
        let side = one.m_size;
        let square = [one.n_size, one.k_size] == [side; 2] && !one.saturating_accumulation;
        (square && [8, 16].contains(&side)).then_some(Cooperative { side, operands })
    };
    adapter.cooperative_matrix_properties().iter().filter_map(usable).collect()
}

/// The major version in a driver's description such as "Mesa 26.1.6-1 (LLVM 21.1.8)".
fn mesa_version(driver_info: &str) -> Option<u32> {
    let (_, version) = driver_info.split_once("Mesa ")?;
    version.split('.').next()?.parse().ok()
}

fn host() -> Option<sysinfo::System> {
    sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
    )
    .ok()
}

/// Bytes of the host's memory; none where the system does not tell.
fn host_memory() -> Option<u64> {
    host().map(|host| host.total_memory()).filter(|&bytes| bytes > 0)
}

/// Bytes that the host can still give.
pub(super) fn free_host_memory() -> Option<u64> {
    host().map(|host| host.available_memory()).filter(|&bytes| bytes > 0)
}

impl AdapterFacts {
    /// What most GPUs of today offer, for questions on a machine that has none.
    pub fn of_a_usual_gpu() -> Self {
        Self {
            index: 0,
            name: "a GPU".to_owned(),
            backend: "vulkan".to_owned(),
            driver: String::new(),
            kind: "discrete GPU".to_owned(),
            memory: None,
            features: Vec::new(),
            cooperative: vec![Cooperative { side: 16, operands: "f16" }],
            limits: AdapterLimits {
                max_buffer_size: 1 << 48,
                max_storage_buffer_binding_size: (1 << 31) - 1,
                min_storage_buffer_offset_alignment: 32,
                max_compute_workgroup_storage_size: 32 << 10,
                max_compute_invocations_per_workgroup: 1024,
                max_uniform_buffers_per_shader_stage: 12,
                subgroup_min_size: 32,
                subgroup_max_size: 32,
            },
            is_cpu: false,
            lanes: None,
            slow_storage: false,
            unpacks_f16: false,
            choices: Choices::default(),
        }
    }
}

/// The largest device-local heap, where Vulkan can be asked.
#[cfg(any(target_os = "linux", target_os = "windows"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: the handles are only used while the adapter lives, for a query without side effects.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        vulkan.shared_instance().raw_instance().get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
    // Others are the host's memory, and may be larger: VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
    let own = heaps.iter().filter(|heap| heap.flags.as_raw() & 1 != 0);
    own.map(|heap| heap.size).max()
}

#[cfg(not(any(target_os = "linux", target_os = "windows")))]
fn memory(_adapter: &wgpu::Adapter) -> Option<u64> {
    None
}

/// The adapter among these that is wanted: a number is an index, all else a part of a name.
///
/// # Errors
/// `Device`: there is none.
pub fn find_adapter(wanted: &str, adapters: &[AdapterFacts]) -> Result<usize> {
    find(wanted, &adapters.iter().map(|adapter| adapter.name.clone()).collect::<Vec<_>>())
}

/// By their names, as [`find_adapter`].
fn find(wanted: &str, names: &[String]) -> Result<usize> {
    let place = match wanted.parse::<usize>() {
        Ok(index) => Some(index).filter(|&index| index < names.len()),
        Err(_) => names.iter().position(|name| name.to_lowercase().contains(&wanted.to_lowercase())),
    };
    place.ok_or_else(|| {
        let list: Vec<String> = names.iter().enumerate().map(|(index, name)| format!("{index}: {name}")).collect();
        let what = if wanted.parse::<usize>().is_ok() { "has the index" } else { "is called" };
        Error::device(format!("no adapter {what} `{wanted}`")).hint(format!("there are {}", list.join(", ")))
    })
}

/// The adapter that `options` ask for.
pub(super) fn choose(options: &AdapterOptions) -> Result<(wgpu::Adapter, AdapterFacts)> {
    let instance = instance(options.backend.as_deref())?;
    let mut found = adapters(&instance);
    if found.is_empty() {
        let others = if options.backend.is_some() { list_adapters(None)? } else { Vec::new() };
        return Err(no_adapter(options.backend.as_deref(), others.first(), cfg!(windows)));
    }
    let index = match options.device.as_deref() {
        None => 0,
        Some(wanted) => {
            let names: Vec<String> = found.iter().map(|adapter| adapter.get_info().name).collect();
            find(wanted, &names)?
        }
    };
    let adapter = found.swap_remove(index);
    let mut facts = facts(index, &adapter);
    facts.is_cpu &= !options.treat_as_gpu;
    facts.unpacks_f16 |= options.unpacks_f16;
    facts.choices = options.choices.clone();
    if options.without_cooperative || options.without_subgroups {
        facts.cooperative.clear();
    }
    if options.without_subgroups {
        facts.lanes = None;
    }
    Ok((adapter, facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_no_part_of_a_name() {
        let names = ["NVIDIA GeForce RTX 3090".to_owned(), "llvmpipe (LLVM 15.0.6, 256 bits)".to_owned()];
        assert_eq!(
            (find("1", &names).unwrap(), find("rtx", &names).unwrap(), find("LLVM 15", &names).unwrap()),
            (1, 0, 1)
        );
        for (wanted, told) in [("3", "no adapter has the index `3`"), ("arc", "no adapter is called `arc`")] {
            let error = find(wanted, &names).unwrap_err();
            assert!(error.message == told && error.hints[0].contains("0: NVIDIA"), "{error:?}");
        }
    }

    #[test]
    fn a_missing_compiler_is_named_with_the_ways_out() {
        let gpu = AdapterFacts::of_a_usual_gpu();
        let hints = |error: Error| error.hints.join("\n");
        let refused = no_adapter(Some("dx12"), Some(&gpu), true);
        assert_eq!(refused.message, NO_DXC);
        let ways = hints(refused);
        assert!(ways.contains("dxcompiler.dll") && ways.contains("static-dxc") && ways.contains("--backend vulkan"));
        // Nothing was asked for and nothing found: the driver may be missing, or the compiler.
        let nothing = no_adapter(None, None, true);
        assert_eq!(nothing.message, NO_ADAPTER);
        assert!(hints(nothing).contains("dxcompiler.dll"));
        // Elsewhere there is no Direct3D.
        assert!(!hints(no_adapter(None, None, false)).contains("dxcompiler.dll"));
        let vulkan = no_adapter(Some("dx12"), Some(&gpu), false);
        assert!(vulkan.message.contains("`dx12`") && hints(vulkan).contains("a GPU (vulkan)"));
    }
}
