//! A device and its stream of recorded work.

mod failures;
mod transfer;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    account::{Account, Holdings},
    adapter::{self, AdapterFacts, AdapterOptions},
    ahead::{Ahead, Launches},
    buffer::{Buffer, Pool, UNIT, USAGE},
    capture::Capture,
    choices::Question,
    download::Downloads,
    in_place::{self, Arriving},
    kernel::{Kernels, MAX_PARAMS},
    pace::{self, Pace},
    profile::{KernelTime, Profile},
    staging::Staging,
    timing::Marks,
    waiting,
};
use failures::Failures;

use crate::error::{Error, Result};

/// Bind groups kept before the cache starts afresh.
const MAX_BIND_GROUPS: usize = 8192;
/// Bytes of one uniform slot, where immediate data is missing: the largest offset alignment WebGPU allows.
const UNIFORM_SLOT: u64 = 256;
/// Writes of at least this many bytes go through staging memory that is kept, and are submitted at once.
const LARGE_WRITE: usize = 1 << 20;

/// A part of a buffer, bound to a kernel: byte offset (a multiple of [`Gpu::binding_alignment`]) and size.
#[derive(Clone, Copy)]
pub struct Binding<'a> {
    pub buffer: &'a Buffer,
    pub offset: u64,
    pub size: u64,
    /// Bound as a uniform of [`UNIFORM_BYTES`] (read only) instead of as storage.
    pub uniform: bool,
}

/// What a uniform binding covers, on devices where kernels take operands as uniforms.
pub const UNIFORM_BYTES: u64 = 65_536;

/// A handle of one device. Clones share it.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
}

struct Inner {
    /// None: memory is counted, and nothing is computed.
    device: Option<Device>,
    facts: AdapterFacts,
    pool: Arc<Pool>,
    max_binding: u64,
    /// Locked before `stream`, where both are.
    staging: Mutex<Staging>,
    /// As `staging`.
    downloads: Mutex<Downloads>,
    stream: Mutex<Stream>,
    failures: Failures,
    flops: AtomicU64,
    /// What a device that only counts was asked to launch.
    launches: Mutex<Launches>,
}

struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    kernels: Arc<Kernels>,
    ahead: Mutex<Ahead>,
    capture: Option<Capture>,
}

/// What has been recorded and not yet submitted.
#[derive(Default)]
struct Stream {
    encoder: Option<wgpu::CommandEncoder>,
    /// Kept open across dispatches; `'static` by [`wgpu::ComputePass::forget_lifetime`].
    pass: Option<wgpu::ComputePass<'static>>,
    recorded: usize,
    pace: Pace,
    bind_groups: HashMap<Vec<(u64, u64, u64, bool)>, wgpu::BindGroup>,
    /// When kernels are timed one by one.
    profile: Option<Profile>,
    /// Where the device writes down when passes begin and end, while it shall.
    marks: Option<Marks>,
}

impl Gpu {
    /// Opens the adapter that `options` ask for.
    ///
    /// # Errors
    /// `Device` when there is none, or it refuses the device; `Usage` for an unknown backend.
    pub fn open(options: &AdapterOptions) -> Result<Self> {
        let (adapter, facts) = adapter::choose(options)?;
        let wanted = wgpu::Features::IMMEDIATES
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::TIMESTAMP_QUERY;
        let cooperates = !facts.cooperative.is_empty();
        let features = adapter.features() & if cooperates { wanted | adapter::COOPERATIVE } else { wanted };
        // SAFETY: experimental features may be unsound; of them one alone is asked for, and its kernels read and write
        // nothing but their own workgroup's memory by it.
        let experimental_features = if cooperates {
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let limits = adapter.limits();
        let descriptor = wgpu::DeviceDescriptor {
            label: None,
            required_features: features,
            required_limits: limits.clone(),
            experimental_features,
            // Buffers are pooled here, so the allocator below need not keep spare blocks.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let (device, queue) = match pollster::block_on(adapter.request_device(&descriptor)) {
            Ok(opened) => opened,
            // An experimental feature must not cost a user the device.
            Err(_) if cooperates => {
                return Self::open(&AdapterOptions { without_cooperative: true, ..options.clone() });
            }
            Err(error) => return Err(Error::device(format!("{} refuses to open", facts.name)).caused_by(error)),
        };

        let failures = Failures::default();
        failures.listen(&device);

        let subgroups = features.contains(wgpu::Features::SUBGROUP) && !options.without_subgroups;
        let kernels = Arc::new(Kernels::new(&device, features.contains(wgpu::Features::IMMEDIATES), subgroups));
        let capture = options.capture.clone().map(|folder| Capture::new(folder, subgroups));
        let marks = || if facts.is_cpu { None } else { Marks::new(&device, &queue) };
        let stream = Stream { profile: options.profile.then(|| Profile::new(marks())), ..Default::default() };
        let device = Device { device, queue, kernels, ahead: Mutex::default(), capture };
        Ok(Self::with(Some(device), facts, options.max_binding, stream, failures))
    }

    /// A device like that of `facts` that only counts: buffers hold nothing, writes and dispatches are forgotten, and
    /// what is read back is zeros. What a run would need can be known before there is anything to run it on.
    pub fn counting(facts: AdapterFacts) -> Self {
        Self::with(None, facts, None, Stream::default(), Failures::default())
    }

    fn with(
        device: Option<Device>,
        facts: AdapterFacts,
        max_binding: Option<u64>,
        stream: Stream,
        failures: Failures,
    ) -> Self {
        let largest = facts.limits.max_storage_buffer_binding_size.min(facts.limits.max_buffer_size);
        let inner = Inner {
            device,
            pool: Arc::new(Pool::new(if facts.is_cpu { UNIFORM_BYTES } else { 0 })),
            facts,
            max_binding: max_binding.unwrap_or(largest).min(largest),
            staging: Mutex::default(),
            downloads: Mutex::default(),
            stream: Mutex::new(stream),
            failures,
            flops: AtomicU64::new(0),
            launches: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Bytes that may be allocated, as far as that is known: the device's memory, or what the host has left where the
    /// device is the host's processor.
    pub fn available_memory(&self) -> Option<u64> {
        if self.is_software() { adapter::free_host_memory() } else { self.inner.facts.memory }
    }

    /// Whether this device only counts ([`Gpu::counting`]).
    pub fn only_counts(&self) -> bool {
        self.inner.device.is_none()
    }

    /// The kernels launched so far on a device that only counts.
    pub fn launches(&self) -> Launches {
        self.inner.launches.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The way that was measured to be the best for a question, if any was; `sizes` are those that it stands for here.
    pub fn chosen(&self, question: Question, sizes: [usize; 3]) -> Option<&'static str> {
        if self.only_counts() {
            self.inner.launches.lock().unwrap_or_else(PoisonError::into_inner).ask(question, sizes);
        }
        self.inner.facts.choices.get(&question)
    }

    /// Begins to compile these kernels, in threads of their own; one that is launched before it is ready is waited for.
    pub fn compile_ahead(&self, launches: Launches) {
        if let Some(Device { device, kernels, ahead, .. }) = &self.inner.device {
            ahead.lock().unwrap_or_else(PoisonError::into_inner).start(device, kernels, launches);
        }
    }

    /// What is allocated from now on is for `account`, until the result is dropped.
    pub fn account(&self, account: Account) -> Accounting {
        let before = std::mem::replace(&mut self.inner.pool.ledger().current, account);
        Accounting { gpu: self.clone(), before }
    }

    /// What was held when most was, since the device was opened or [`Gpu::start_peak`] called.
    pub fn peak(&self) -> Holdings {
        self.inner.pool.ledger().peak()
    }

    /// Floating-point operations of the products and of attention so far.
    pub fn flops(&self) -> u64 {
        self.inner.flops.load(Ordering::Relaxed)
    }

    /// Ops tell what they launch.
    pub fn add_flops(&self, flops: u64) {
        self.inner.flops.fetch_add(flops, Ordering::Relaxed);
    }

    /// Forgets what was held before.
    pub fn start_peak(&self) {
        let held = self.inner.pool.held();
        self.inner.pool.ledger().start_again(held);
    }

    /// Whether both are handles of one device.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub fn facts(&self) -> &AdapterFacts {
        &self.inner.facts
    }

    /// Whether kernels run on the host's processor: such a device wants uniform loads and no barriers.
    pub fn is_cpu(&self) -> bool {
        self.inner.facts.is_cpu
    }

    /// Whether the device is software, even where it shall be treated as a GPU.
    pub fn is_software(&self) -> bool {
        self.inner.facts.kind == adapter::SOFTWARE
    }

    /// Whether kernels run on the host's processor and load from storage far more slowly than from uniforms.
    pub fn has_slow_storage(&self) -> bool {
        self.is_cpu() && self.inner.facts.slow_storage
    }

    /// The side of cooperative matrices with operands in f16, the larger where there are two; none where the device has
    /// none, or shall not use them.
    pub fn cooperative_side(&self) -> Option<u32> {
        self.inner.facts.cooperative.iter().filter(|one| one.operands == "f16").map(|one| one.side).max()
    }

    /// The most bytes one binding may cover.
    pub fn max_binding(&self) -> u64 {
        self.inner.max_binding
    }

    /// Binding offsets are multiples of this many bytes.
    pub fn binding_alignment(&self) -> u64 {
        self.inner.facts.limits.min_storage_buffer_offset_alignment.into()
    }

    /// Bytes of device memory held now, the pool's free buffers included.
    pub fn device_bytes(&self) -> u64 {
        self.inner.pool.held()
    }

    /// The most bytes that tensors took at once since [`Gpu::begin_peak`], each in whole units of 256: what a step
    /// needs. The pool holds about as much.
    pub fn peak_bytes(&self) -> u64 {
        self.inner.pool.peak()
    }

    /// Counts [`Gpu::peak_bytes`] afresh.
    pub fn begin_peak(&self) {
        self.inner.pool.begin_peak();
    }

    /// Gives the pool's free buffers and the staging memory of large writes back to the driver.
    pub fn trim(&self) {
        self.staging().clear();
        self.downloads().clear();
        self.stream().bind_groups.clear();
        self.inner.pool.trim();
    }

    /// A buffer of at least `size` bytes with unspecified content. A request that the device cannot fulfil
    /// is told at the next [`Gpu::read`] or [`Gpu::sync`].
    pub fn buffer(&self, size: u64) -> Buffer {
        self.take(size, create)
    }

    /// A buffer of at least `size` bytes, whose content follows. As [`Gpu::buffer`].
    pub fn arriving(&self, size: u64) -> Arriving {
        let mut place = None;
        let in_place = self.is_software() && size >= in_place::LEAST_BYTES;
        let buffer =
            self.take(size, |device, size| match in_place.then(|| in_place::make(device, size, USAGE)).flatten() {
                Some((buffer, found)) => {
                    place = Some(found);
                    buffer
                }
                None => create(device, size),
            });
        // A refused size has a buffer that is smaller.
        Arriving::new(self, buffer, place.filter(|place| place.bytes() as u64 >= size))
    }

    fn take(&self, size: u64, make: impl FnOnce(&wgpu::Device, u64) -> wgpu::Buffer) -> Buffer {
        let device = self.inner.device.as_ref().map(|device| &device.device);
        let limit = self.inner.facts.limits.max_buffer_size;
        let make = |size| device.map(|device| make(device, size));
        if size > limit {
            let text = format!("a buffer of {size} bytes is over this device's limit of {limit}");
            self.failure().get_or_insert(text);
            return self.inner.pool.take(if device.is_some() { UNIT } else { size }, make, |_| ());
        }
        self.inner.pool.take(size, make, |gone| {
            // Their memory is free once nothing names them and the device has done what it was told.
            let Some(device) = device else { return };
            let gone: HashSet<u64> = gone.iter().copied().collect();
            let stream = &mut *self.stream();
            stream.bind_groups.retain(|key, _| !key.iter().any(|(id, ..)| gone.contains(id)));
            self.submit(stream);
            // Whether the device lives is told elsewhere.
            let _ = waiting::until_done(device, None, &|| self.is_lost());
        })
    }

    /// Submits what is recorded, and replaces the marks of what follows.
    pub(super) fn swap_marks(&self, make: impl FnOnce(&wgpu::Device, &wgpu::Queue) -> Option<Marks>) -> Option<Marks> {
        let Device { device, queue, .. } = self.inner.device.as_ref()?;
        let stream = &mut *self.stream();
        self.submit(stream);
        std::mem::replace(&mut stream.marks, make(device, queue))
    }

    /// What `ask` gives of the device, where there is one.
    pub(super) fn with_device<T>(&self, ask: impl FnOnce(&wgpu::Device, &wgpu::Queue) -> Option<T>) -> Option<T> {
        self.inner.device.as_ref().and_then(|device| ask(&device.device, &device.queue))
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.inner.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn downloads(&self) -> MutexGuard<'_, Downloads> {
        self.inner.downloads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records one dispatch of the kernel variant `name` over `groups` workgroups; `params` are its `Params`,
    /// word by word. Nothing is recorded when a dimension of `groups` is 0.
    pub fn dispatch(&self, name: &str, bindings: &[Binding<'_>], params: &[u32], groups: [u32; 3]) {
        debug_assert!(params.len() * 4 <= MAX_PARAMS, "{name}: {} words of parameters", params.len());
        if groups.contains(&0) {
            return;
        }
        let Some(device) = &self.inner.device else {
            let mut launches = self.inner.launches.lock().unwrap_or_else(PoisonError::into_inner);
            return launches.note(name, bindings.iter().map(|binding| binding.uniform));
        };
        if let Some(capture) = &device.capture {
            let launched = capture
                .launch(self, (name, bindings, params, groups), || self.record(device, name, bindings, params, groups));
            if let Err(error) = launched {
                self.failure().get_or_insert(format!("{name} is not captured: {error}"));
            }
        } else {
            self.record(device, name, bindings, params, groups);
        }
    }

    fn record(
        &self,
        Device { device, kernels, .. }: &Device,
        name: &str,
        bindings: &[Binding<'_>],
        params: &[u32],
        groups: [u32; 3],
    ) {
        self.count_down();
        let uniforms: Vec<bool> = bindings.iter().map(|binding| binding.uniform).collect();
        let layout = kernels.layout(device, &uniforms);
        let pipeline = kernels.pipeline(device, name, &layout);
        let stream = &mut *self.stream();

        let key: Vec<_> =
            bindings.iter().map(|binding| (binding.buffer.id, binding.offset, binding.size, binding.uniform)).collect();
        if stream.bind_groups.len() >= MAX_BIND_GROUPS {
            stream.bind_groups.clear();
        }
        let bind_group = stream.bind_groups.entry(key).or_insert_with(|| {
            let entries: Vec<_> = bindings
                .iter()
                .enumerate()
                .map(|(index, binding)| wgpu::BindGroupEntry {
                    binding: index as u32,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: binding.buffer.raw(),
                        offset: binding.offset,
                        size: wgpu::BufferSize::new(binding.size.next_multiple_of(4)),
                    }),
                })
                .collect();
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &layout.bind_group,
                entries: &entries,
            })
        });

        let encoder = stream.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()));
        let pass = stream.pass.get_or_insert_with(|| {
            let timestamp_writes = match &mut stream.profile {
                Some(profile) => profile.of_a_pass(name),
                None => stream.marks.as_mut().and_then(Marks::of_a_pass),
            };
            encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes }).forget_lifetime()
        });
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &*bind_group, &[]);
        if kernels.immediates {
            pass.set_immediates(0, bytemuck::cast_slice(params));
        } else if let Some(layout) = kernels.params_layout() {
            pass.set_bind_group(1, &self.uniform(device, layout, params), &[]);
        }
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        stream.recorded += 1;
        if stream.profile.is_some() {
            self.profile_dispatch(stream, name);
        } else if self.is_due(stream) {
            self.submit(stream);
        }
    }

    /// Times the dispatch that was recorded last.
    fn profile_dispatch(&self, stream: &mut Stream, name: &str) {
        stream.pass = None;
        let Some((waits, full)) = stream.profile.as_ref().map(|profile| (profile.waits(), profile.is_full())) else {
            return;
        };
        if waits {
            let begun = Instant::now();
            self.submit(stream);
            self.with_device(|device, _| waiting::until_done(device, None, &|| self.is_lost()).ok());
            stream.profile.iter_mut().for_each(|profile| profile.waited(name, begun));
        } else if full {
            self.read_profile(stream);
        } else if self.is_due(stream) {
            self.submit(stream);
        }
    }

    /// Whether enough is recorded.
    fn is_due(&self, stream: &Stream) -> bool {
        stream.recorded >= pace::DISPATCHES || (!self.is_cpu() && stream.pace.is_due(self.flops()))
    }

    fn read_profile(&self, stream: &mut Stream) {
        self.submit(stream);
        if let (Some(profile), Some(Device { device, queue, .. })) = (&mut stream.profile, &self.inner.device) {
            profile.read(device, queue, &|| self.is_lost());
        }
    }

    /// Kernels with their dispatches and seconds, slowest first; empty unless the device was opened to profile.
    pub fn profile(&self) -> Vec<KernelTime> {
        let stream = &mut *self.stream();
        self.read_profile(stream);
        stream.profile.as_ref().map_or_else(Vec::new, Profile::rows)
    }

    /// Forgets what [`Gpu::profile`] has gathered.
    pub fn start_profile(&self) {
        let stream = &mut *self.stream();
        self.read_profile(stream);
        stream.profile.iter_mut().for_each(Profile::clear);
    }

    /// A uniform of its own for one dispatch, on devices without immediate data.
    fn uniform(&self, device: &wgpu::Device, layout: &wgpu::BindGroupLayout, params: &[u32]) -> wgpu::BindGroup {
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: UNIFORM_SLOT,
            usage: wgpu::BufferUsages::UNIFORM,
            mapped_at_creation: true,
        });
        self.fill(&buffer, bytemuck::cast_slice(params));
        buffer.unmap();
        let entry = wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() };
        device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &[entry] })
    }

    fn fill(&self, buffer: &wgpu::Buffer, bytes: &[u8]) {
        match buffer.slice(..bytes.len() as u64).get_mapped_range_mut() {
            Ok(mut range) => range.copy_from_slice(bytes),
            Err(error) => {
                self.failure().get_or_insert(format!("staging memory cannot be mapped: {error}"));
            }
        }
    }

    /// Lets the device do what is recorded, for whoever waits for something else before it records more.
    pub fn flush(&self) {
        self.submit(&mut self.stream());
    }

    fn submit(&self, stream: &mut Stream) -> Option<wgpu::SubmissionIndex> {
        stream.pass = None;
        stream.recorded = 0;
        let encoder = stream.encoder.take()?;
        let Device { device, queue, .. } = self.inner.device.as_ref()?;
        let submission = queue.submit([encoder.finish()]);
        let done = stream.pace.submitted(self.flops());
        if !self.is_cpu() {
            queue.on_submitted_work_done(done);
        }
        if !self.is_lost() {
            let _ = waiting::look(device);
        }
        Some(submission)
    }
}

/// Ends an account when it is dropped ([`Gpu::account`]).
pub struct Accounting {
    gpu: Gpu,
    before: Account,
}

impl Drop for Accounting {
    fn drop(&mut self) {
        self.gpu.inner.pool.ledger().current = self.before;
    }
}

fn create(device: &wgpu::Device, size: u64) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage: USAGE, mapped_at_creation: false })
}
