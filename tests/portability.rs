//! Every text that `wgpu-llava shaders` writes, as every backend would get it: translated by naga to SPIR-V, MSL and HLSL
//! as wgpu asks for it, the SPIR-V checked by `spirv-val`, the WGSL by `tint`, the other WGSL compiler, and the kernel
//! held to the limits that WebGPU promises on any device.
//!
//! One test a variant. All modes are tested: the tools take a few milliseconds a text. A machine without a tool skips
//! its part and says so; `tools/test` installs spirv-val where there is apt.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use libtest_mimic::{Arguments, Trial};
use naga::{
    AddressSpace, Expression, ResourceBinding, ShaderStage, StorageAccess, TypeInner,
    back::{hlsl, msl, pipeline_constants::process_overrides, spv},
    proc::{BoundsCheckPolicies, BoundsCheckPolicy},
    valid::{Capabilities, ModuleInfo, ValidationFlags, Validator},
};
use wgpu_llava::gpu::{expand_shader, shader_variants, wgsl::Variant};

/// What a device may have, and what naga calls it.
const MODES: [(&str, Capabilities); 2] =
    [("IMMEDIATES", Capabilities::IMMEDIATES), ("SUBGROUPS", Capabilities::SUBGROUP)];

/// Extensions that a text may enable.
const EXTENSIONS: [(&str, Capabilities); 2] =
    [("f16", Capabilities::SHADER_FLOAT16), (COOPERATIVE, Capabilities::COOPERATIVE_MATRIX)];

/// Launched only where the device has it.
const UNPACK: &str = "unpack2x16float(";

/// Only naga's WGSL has it, and its HLSL has not.
const COOPERATIVE: &str = "wgpu_cooperative_matrix";

/// Parts of the names of kernels that are launched only where there is as much workgroup memory.
const LARGE: [(&[&str], u32); 3] = [
    (&["_large"], 32 << 10),
    (&["cooperative_attention.", "_8"], 32 << 10),
    (&["cooperative_attention.", "_16"], 48 << 10),
];

/// The same of those that are launched only where there are as many uniform buffers, parameters among them.
const BY_LANE: (&str, u32) = ("matmul.by_lane.", 15);

/// The kernels with matrices that Metal gets: those whose names end so.
const SCALAR: &str = "_scalar";

const NO_CHECKS: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Unchecked,
    buffer: BoundsCheckPolicy::Unchecked,
    image_load: BoundsCheckPolicy::Unchecked,
    binding_array: BoundsCheckPolicy::Unchecked,
};

fn main() {
    let arguments = Arguments::from_args();
    let spirv_val = find("spirv-val");
    let tools = Tools { spirv_val, cooperative: spirv_val && knows_cooperative(), tint: find("tint") };
    let mut trials: Vec<Trial> = shader_variants()
        .into_iter()
        .map(|variant| Trial::test(variant.name.clone(), move || Ok(check(&variant, tools)?)))
        .collect();
    for (tool, found, part) in [
        ("spirv-val", tools.spirv_val, "SPIR-V is written, not validated (Debian has it in spirv-tools)"),
        (
            "newer spirv-val",
            tools.cooperative,
            "it does not know cooperative matrices, whose SPIR-V is written, not validated",
        ),
        ("tint", tools.tint, "no second WGSL compiler reads the texts"),
    ] {
        if !found {
            eprintln!("no {tool} is on the path: {part}");
        }
        // A skipped part is a test that is ignored, so that the sum of a run tells it too.
        trials.push(Trial::test(format!("with_{}", tool.replace(' ', "_")), || Ok(())).with_ignored_flag(!found));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

#[derive(Clone, Copy)]
struct Tools {
    spirv_val: bool,
    /// Whether spirv-val knows cooperative matrices, as those of 2023.5 and later do.
    cooperative: bool,
    tint: bool,
}

fn find(tool: &str) -> bool {
    Command::new(tool).arg("--help").output().is_ok()
}

/// Whether a module that says no more than that it uses such matrices is refused for another reason than their name.
fn knows_cooperative() -> bool {
    let capability = spv::Capability::CooperativeMatrixKHR as u32;
    let words: [u32; 12] =
        [0x0723_0203, 0x0001_0600, 0, 1, 0, 0x0002_0011, 1, 0x0002_0011, capability, 0x0003_000e, 0, 1];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let Ok(folder) = tempfile::tempdir() else { return false };
    let file = folder.path().join("capability.spv");
    fs::write(&file, bytes).is_ok()
        && accepts("spirv-val", &[], &file).err().is_none_or(|error| !error.contains("Invalid capability"))
}

/// All that is wrong with a variant.
fn check(variant: &Variant, tools: Tools) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut seen: Vec<String> = Vec::new();
    let mut problems = Vec::new();
    for bits in 0..1 << MODES.len() {
        let modes: Vec<_> = MODES.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, m)| *m).collect();
        let names: Vec<&str> = modes.iter().map(|(name, _)| *name).collect();
        let wgsl = expand_shader(variant, &names);
        if seen.contains(&wgsl) {
            continue;
        }
        let capabilities = modes.iter().map(|(_, capability)| *capability).collect();
        let mut tell = |tool: &str, result: Result<(), String>| {
            problems.extend(result.err().map(|error| format!("{} {names:?}: {tool}: {error}", variant.name)));
        };
        match Kernel::new(&wgsl, &variant.kernel, capabilities) {
            Ok(kernel) => {
                tell("limits", kernel.keeps_limits(&variant.name));
                tell("MSL", kernel.msl());
                if variant.name.ends_with(SCALAR) {
                    tell("Metal", kernel.matrices_are_of_scalars());
                }
                if !kernel.enables(COOPERATIVE) {
                    tell("HLSL", kernel.hlsl());
                }
                // A device with cooperative matrices gets every kernel under Vulkan's memory model.
                for (version, environment, cooperative) in
                    [((1, 3), "vulkan1.1", false), ((1, 6), "vulkan1.3", false), ((1, 6), "vulkan1.3", true)]
                {
                    let found = if kernel.enables(COOPERATIVE) { tools.cooperative } else { tools.spirv_val };
                    let validate = found.then_some(folder.path());
                    tell(environment, kernel.spirv(version, cooperative, environment, validate));
                }
                if tools.tint && !kernel.enables(COOPERATIVE) {
                    tell("tint", tint(&wgsl, folder.path()));
                }
            }
            Err(error) => tell("naga", Err(error)),
        }
        seen.push(wgsl);
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// One text, parsed and validated for a device with these capabilities and no others.
struct Kernel<'t> {
    wgsl: &'t str,
    entry: &'t str,
    /// With all that it declares.
    whole: naga::Module,
    /// With what the entry point uses, as wgpu hands it to the writers.
    module: naga::Module,
    info: ModuleInfo,
    capabilities: Capabilities,
}

/// A binding, and whether it is storage.
type Bindings = Vec<(ResourceBinding, bool)>;

impl<'t> Kernel<'t> {
    fn new(wgsl: &'t str, entry: &'t str, mut capabilities: Capabilities) -> Result<Self, String> {
        for (extension, capability) in EXTENSIONS {
            capabilities.set(capability, capabilities.contains(capability) || enables(wgsl, extension));
        }
        capabilities.set(Capabilities::SHADER_FLOAT16_IN_FLOAT32, wgsl.contains(UNPACK));
        // Such matrices are a subgroup's: no device has them without. Nor is one given what lanes hand each other.
        let needs_subgroups = enables(wgsl, COOPERATIVE) || wgsl.contains("subgroupBroadcast");
        capabilities.set(Capabilities::SUBGROUP, capabilities.contains(Capabilities::SUBGROUP) || needs_subgroups);
        let whole = naga::front::wgsl::parse_str(wgsl).map_err(|error| error.emit_to_string(wgsl))?;
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .validate(&whole)
            .map_err(|error| error.emit_to_string(wgsl))?;
        let (module, info) = process_overrides(&whole, &info, Some((ShaderStage::Compute, entry)), &Default::default())
            .map(|(module, info)| (module.into_owned(), info.into_owned()))
            .map_err(|error| error.to_string())?;
        Ok(Self { wgsl, entry, whole, module, info, capabilities })
    }

    fn enables(&self, extension: &str) -> bool {
        enables(self.wgsl, extension)
    }

    /// In the order of groups and numbers, as layouts list them.
    fn bindings(&self) -> Bindings {
        let mut bindings: Bindings = (self.whole.global_variables.iter())
            .filter_map(|(_, global)| Some((global.binding?, matches!(global.space, AddressSpace::Storage { .. }))))
            .collect();
        bindings.sort();
        bindings
    }

    /// What WebGPU's defaults promise; the engine's parameters are at most 128 bytes.
    fn keeps_limits(&self, name: &str) -> Result<(), String> {
        let globals = || self.whole.global_variables.iter().map(|(_, global)| global);
        let size = |global: &naga::GlobalVariable| self.whole.types[global.ty].inner.size(self.whole.to_ctx());
        let entry = self.whole.entry_points.iter().find(|entry| entry.name == self.entry);
        let [x, y, z] = entry.ok_or_else(|| format!("there is no entry point `{}`", self.entry))?.workgroup_size;
        let bindings = self.bindings();
        let storage = bindings.iter().filter(|(_, storage)| *storage).count() as u32;
        let in_groups = globals().filter(|global| matches!(global.space, AddressSpace::WorkGroup));
        let uniforms = globals().filter(|global| matches!(global.space, AddressSpace::Uniform));
        let params = globals().filter(|global| global.name.as_deref() == Some("params"));
        let large = LARGE.iter().find(|(parts, _)| parts.iter().all(|part| name.contains(part)));
        let memory = large.map_or(16 << 10, |(_, bytes)| *bytes);
        let uniform_buffers = if name.starts_with(BY_LANE.0) { BY_LANE.1 } else { 12 };
        let mut over = Vec::new();
        for (what, found, most) in [
            ("storage buffers", storage, 8),
            ("uniform buffers", bindings.len() as u32 - storage, uniform_buffers),
            ("bytes of the largest uniform", uniforms.map(size).max().unwrap_or(0), 1 << 16),
            ("bytes of workgroup memory", in_groups.map(|global| size(global).next_multiple_of(16)).sum(), memory),
            ("invocations", x * y * z, 256),
            ("invocations along z", z, 64),
            ("bytes of parameters", params.map(size).sum(), 128),
        ] {
            if found > most {
                over.push(format!("{found} {what}, {most} allowed"));
            }
        }
        // Layouts bind all storage for reading and writing, and in HLSL the two kinds have registers of their own.
        let written = AddressSpace::Storage { access: StorageAccess::LOAD | StorageAccess::STORE };
        for global in globals().filter(|global| matches!(global.space, AddressSpace::Storage { .. })) {
            if global.space != written {
                over.push(format!("`{}` is not bound read_write", global.name.as_deref().unwrap_or_default()));
            }
        }
        if over.is_empty() { Ok(()) } else { Err(over.join("; ")) }
    }

    /// Validated in `folder`, if there is one.
    fn spirv(
        &self,
        version: (u8, u8),
        cooperative: bool,
        environment: &str,
        folder: Option<&Path>,
    ) -> Result<(), String> {
        use spv::Capability;
        if self.enables(COOPERATIVE) && !cooperative {
            return Ok(());
        }
        // What wgpu lets such a device use; anything more is refused.
        let mut capabilities = vec![Capability::Shader, Capability::Matrix, Capability::DerivativeControl];
        if self.capabilities.contains(Capabilities::SUBGROUP) {
            capabilities.extend([
                Capability::GroupNonUniform,
                Capability::GroupNonUniformVote,
                Capability::GroupNonUniformArithmetic,
                Capability::GroupNonUniformBallot,
                Capability::GroupNonUniformShuffle,
                Capability::GroupNonUniformShuffleRelative,
                Capability::GroupNonUniformQuad,
            ]);
        }
        if self.enables("f16") {
            capabilities.push(Capability::Float16);
        }
        if cooperative {
            capabilities.extend([Capability::CooperativeMatrixKHR, Capability::VulkanMemoryModel]);
        }
        let binding_map = self.bindings().into_iter().map(|(binding, _)| {
            let ResourceBinding { group, binding: number } = binding;
            (binding, spv::BindingInfo { descriptor_set: group, binding: number, binding_array_size: None })
        });
        let options = spv::Options {
            lang_version: version,
            flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
            fake_missing_bindings: false,
            binding_map: binding_map.collect(),
            capabilities: Some(capabilities.into_iter().collect()),
            bounds_check_policies: NO_CHECKS,
            zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
            force_loop_bounding: false,
            emit_int_div_checks: false,
            ..Default::default()
        };
        let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: self.entry.into() };
        let words = spv::write_vec(&self.module, &self.info, &options, Some(&pipeline)).map_err(|e| e.to_string())?;
        let Some(folder) = folder else { return Ok(()) };
        let file = folder.join("kernel.spv");
        let bytes: Vec<u8> = without_strides(&words).iter().flat_map(|word| word.to_le_bytes()).collect();
        fs::write(&file, bytes).map_err(|error| error.to_string())?;
        accepts("spirv-val", &["--target-env", environment], &file)
    }

    /// For Metal 2.3, which is what macOS 11 has.
    fn msl(&self) -> Result<(), String> {
        let mut slots = 0..;
        let mut slot = || slots.next();
        let immediates_buffer = self.capabilities.contains(Capabilities::IMMEDIATES).then(&mut slot).flatten();
        let targets = self.bindings().into_iter().map(|(binding, storage)| {
            (binding, msl::BindTarget { buffer: slot(), mutable: storage, ..Default::default() })
        });
        let resources = targets.collect();
        let resources = msl::EntryPointResources { resources, immediates_buffer, sizes_buffer: slot() };
        let options = msl::Options {
            lang_version: (2, 3),
            per_entry_point_map: [(self.entry.to_owned(), resources)].into(),
            fake_missing_bindings: false,
            bounds_check_policies: NO_CHECKS,
            zero_initialize_workgroup_memory: false,
            force_loop_bounding: false,
            emit_int_div_checks: false,
            ..Default::default()
        };
        let pipeline = msl::PipelineOptions {
            entry_point: Some((ShaderStage::Compute, self.entry.to_owned())),
            ..Default::default()
        };
        let (_, info) =
            msl::write_string(&self.module, &self.info, &options, &pipeline).map_err(|error| format!("{error:?}"))?;
        info.entry_point_names.into_iter().try_for_each(|name| name.map(|_| ()).map_err(|error| error.to_string()))
    }

    /// Metal loads matrices from arrays of scalars alone. naga writes any, so that its text does not tell.
    fn matrices_are_of_scalars(&self) -> Result<(), String> {
        let Some((entry, info)) = self.module.entry_points.first().map(|entry| (entry, self.info.get_entry_point(0)))
        else {
            return Err("it has no entry".to_owned());
        };
        let mut loads = 0;
        for (_, expression) in entry.function.expressions.iter() {
            let Expression::CooperativeLoad { data, .. } = expression else { continue };
            let base = match info[data.pointer].ty.inner_with(&self.module.types) {
                TypeInner::Pointer { base, .. } => &self.module.types[*base].inner,
                other => other,
            };
            if !matches!(base, TypeInner::Scalar(_) | TypeInner::ValuePointer { size: None, .. }) {
                return Err(format!("it loads a matrix from {base:?}"));
            }
            loads += 1;
        }
        if loads > 0 { Ok(()) } else { Err("it loads no matrix".to_owned()) }
    }

    /// For DXC: shader model 6.0, with f16 6.2.
    fn hlsl(&self) -> Result<(), String> {
        let immediates = self.capabilities.contains(Capabilities::IMMEDIATES);
        let mut next = [0, 0];
        let target = |space, register| hlsl::BindTarget { space, register, ..Default::default() };
        let targets = self.bindings().into_iter().map(|(binding, storage)| {
            let register = next[usize::from(storage)];
            next[usize::from(storage)] += 1;
            (binding, target(if storage { 0 } else { u8::from(immediates) }, register))
        });
        let options = hlsl::Options {
            shader_model: if self.enables("f16") { hlsl::ShaderModel::V6_2 } else { hlsl::ShaderModel::V6_0 },
            binding_map: targets.collect(),
            fake_missing_bindings: false,
            special_constants_binding: Some(target(8, 0)),
            immediates_target: immediates.then(|| target(0, 0)),
            zero_initialize_workgroup_memory: false,
            restrict_indexing: false,
            force_loop_bounding: false,
            ..Default::default()
        };
        let pipeline = hlsl::PipelineOptions { entry_point: Some((ShaderStage::Compute, self.entry.to_owned())) };
        let mut text = String::new();
        let reflection = hlsl::Writer::new(&mut text, &options, &pipeline)
            .write(&self.module, &self.info, None)
            .map_err(|error| format!("{error:?}"))?;
        reflection.entry_point_names.into_iter().try_for_each(|name| name.map(|_| ()).map_err(|e| e.to_string()))
    }
}

/// The same module, its arrays in workgroup memory without a layout: naga gives them one, which spirv-val of 2025 refuses
/// there and then looks no further. Drivers do not mind.
fn without_strides(words: &[u32]) -> Vec<u32> {
    const HEAD: usize = 5;
    const DECORATE: u32 = 71;
    const POINTER: u32 = 32;
    const WORKGROUP: u32 = 4;
    const ARRAY_STRIDE: u32 = 6;
    let mut instructions = Vec::new();
    let mut rest = words.get(HEAD..).unwrap_or_default();
    while let Some((instruction, after)) = rest.first().and_then(|word| rest.split_at_checked(*word as usize >> 16)) {
        instructions.push(instruction);
        rest = after;
    }
    let in_groups: Vec<u32> = (instructions.iter())
        .filter_map(|one| match one[..] {
            [code, _, WORKGROUP, pointee] if code & 0xffff == POINTER => Some(pointee),
            _ => None,
        })
        .collect();
    let stays = |one: &&[u32]| match one[..] {
        [code, target, ARRAY_STRIDE, _] => code & 0xffff != DECORATE || !in_groups.contains(&target),
        _ => true,
    };
    words[..HEAD].iter().chain(instructions.iter().filter(|one| stays(one)).copied().flatten()).copied().collect()
}

fn enables(wgsl: &str, extension: &str) -> bool {
    wgsl.lines().any(|line| line.trim() == format!("enable {extension};"))
}

/// Tint, unlike naga 30, wants subgroups enabled, which naga refuses; it knows immediate data without a word.
fn tint(wgsl: &str, folder: &Path) -> Result<(), String> {
    let enable = if wgsl.contains("subgroup") { "enable subgroups;\n" } else { "" };
    let file: PathBuf = folder.join("kernel.wgsl");
    fs::write(&file, format!("{enable}{wgsl}")).map_err(|error| error.to_string())?;
    accepts("tint", &["--format", "wgsl"], &file)
}

fn accepts(tool: &str, arguments: &[&str], file: &Path) -> Result<(), String> {
    let output = Command::new(tool).args(arguments).arg(file).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(format!("{tool} {}: {}", output.status, String::from_utf8_lossy(&said).trim()))
}
