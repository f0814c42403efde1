// Launches captured kernels (src/gpu/capture.rs) in Dawn and compares every byte that they leave.
//
//   node replay.mjs MODULES CAPTURES    MODULES is a folder with node_modules/webgpu, CAPTURES one with NAME.{json,wgsl,bin}
//
// Without CAPTURES it only sees whether Dawn has an adapter. Numbers of type f32 may differ by TOLERANCE of the largest one in their binding, because two compilers need not fuse
// and order alike; everything else must be the same. Exits with 0 when all agree, 1 when not, 77 when Dawn has no adapter.

import { readFileSync, readdirSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const TOLERANCE = 1e-6;

const [modules, captures] = process.argv.slice(2);
const { create, globals } = await import(pathToFileURL(resolve(modules, 'node_modules/webgpu/index.js')).href);
Object.assign(globalThis, globals);
const gpu = create([]); // Dawn lives as long as this is reachable.
const adapter = await gpu.requestAdapter();
if (!adapter) {
  console.log('Dawn has no adapter here (Mesa 22.3, for one, has too old a software Vulkan for it)');
  process.exit(77);
}
if (!captures) process.exit(0);
const wanted = [
  'maxStorageBufferBindingSize',
  'maxBufferSize',
  'maxUniformBufferBindingSize',
  'maxUniformBuffersPerShaderStage',
];
const device = await adapter.requestDevice({
  requiredFeatures: adapter.features.has('subgroups') ? ['subgroups'] : [],
  requiredLimits: Object.fromEntries(wanted.map((limit) => [limit, adapter.limits[limit]])),
});
device.lost.then(({ message }) => console.log(`Dawn lost its device: ${message}`));

/// Which bindings hold f32, by their declarations.
function floats(wgsl) {
  const found = new Set();
  for (const [, number, type] of wgsl.matchAll(/@binding\((\d+)\)\s*var<storage[^>]*>\s*\w+\s*:\s*([^;]+);/g)) {
    if (type.includes('f32')) found.add(Number(number));
  }
  return found;
}

function buffer(bytes, usage) {
  const made = device.createBuffer({ size: Math.max(16, bytes.length + (-bytes.length & 3)), usage, mappedAtCreation: true });
  new Uint8Array(made.getMappedRange()).set(bytes);
  made.unmap();
  return made;
}

async function launch(how, wgsl, before) {
  device.pushErrorScope('validation');
  const code = (/\bsubgroup/.test(wgsl) ? 'enable subgroups;\n' : '') + wgsl;
  const module = device.createShaderModule({ code });
  const visibility = GPUShaderStage.COMPUTE;
  const entries = how.bindings.map(({ uniform }, binding) => {
    return { binding, visibility, buffer: { type: uniform ? 'uniform' : 'storage' } };
  });
  const layouts = [
    device.createBindGroupLayout({ entries }),
    device.createBindGroupLayout({ entries: [{ binding: 0, visibility, buffer: { type: 'uniform' } }] }),
  ];
  const layout = device.createPipelineLayout({ bindGroupLayouts: layouts });
  const pipeline = device.createComputePipeline({ layout, compute: { module, entryPoint: how.entry } });
  const buffers = before.map((bytes, index) => {
    const { uniform } = how.bindings[index];
    return buffer(bytes, (uniform ? GPUBufferUsage.UNIFORM : GPUBufferUsage.STORAGE) | GPUBufferUsage.COPY_SRC);
  });
  const params = new Uint8Array(256);
  params.set(new Uint8Array(new Uint32Array(how.params).buffer));
  const groups = [buffers, [buffer(params, GPUBufferUsage.UNIFORM)]].map((list, index) => {
    const entries = list.map((buffer, binding) => ({ binding, resource: { buffer } }));
    return device.createBindGroup({ layout: layouts[index], entries });
  });
  const encoder = device.createCommandEncoder();
  const pass = encoder.beginComputePass();
  pass.setPipeline(pipeline);
  groups.forEach((group, index) => pass.setBindGroup(index, group));
  pass.dispatchWorkgroups(...how.groups);
  pass.end();
  const results = buffers.map((from) => {
    const to = device.createBuffer({ size: from.size, usage: GPUBufferUsage.COPY_DST | GPUBufferUsage.MAP_READ });
    encoder.copyBufferToBuffer(from, 0, to, 0, from.size);
    return to;
  });
  device.queue.submit([encoder.finish()]);
  const error = await device.popErrorScope();
  if (error) throw new Error(error.message);
  const after = [];
  for (const [index, result] of results.entries()) {
    await result.mapAsync(GPUMapMode.READ);
    after.push(new Uint8Array(result.getMappedRange()).slice(0, how.bindings[index].size));
    result.destroy();
  }
  buffers.forEach((made) => made.destroy());
  return after;
}

/// How far two bindings are apart, relative to the largest number; infinitely where equality is asked and not there.
function difference(expected, found, areFloats) {
  if (Buffer.compare(expected, found) === 0) return 0;
  if (!areFloats) return Infinity;
  const words = (bytes) => new Uint32Array(bytes.slice().buffer);
  const [a, b] = [expected, found].map((bytes) => new Float32Array(words(bytes).buffer));
  const [bitsA, bitsB] = [words(expected), words(found)];
  let largest = 0;
  let apart = 0;
  for (let i = 0; i < a.length; i++) {
    if (bitsA[i] === bitsB[i]) {
      if (Number.isFinite(a[i])) largest = Math.max(largest, Math.abs(a[i]));
    } else if (Number.isFinite(a[i]) && Number.isFinite(b[i])) {
      largest = Math.max(largest, Math.abs(a[i]));
      apart = Math.max(apart, Math.abs(a[i] - b[i]));
    } else {
      return Infinity;
    }
  }
  return apart === 0 ? 0 : apart / largest;
}

const { vendor, architecture, description } = adapter.info;
console.log(`Dawn on ${description || `${vendor} ${architecture}`}`);
const names = readdirSync(captures).filter((file) => file.endsWith('.json')).map((file) => file.slice(0, -5)).sort();
let equal = 0;
let failed = 0;
const fail = (text) => {
  failed += 1;
  console.log(text);
};
let worst = { kernel: '', by: 0 };
for (const kernel of names) {
  const file = (extension) => readFileSync(join(captures, `${kernel}.${extension}`));
  const how = JSON.parse(file('json'));
  const wgsl = file('wgsl').toString();
  const bytes = file('bin');
  let at = 0;
  const part = ({ size }) => new Uint8Array(bytes.subarray(at, (at += size)));
  const before = how.bindings.map(part);
  const expected = how.bindings.map(part);
  try {
    const found = await launch(how, wgsl, before);
    const isFloat = floats(wgsl);
    const apart = expected.map((bytes, index) => difference(bytes, found[index], isFloat.has(index)));
    // Memory that was bound twice is two buffers here, and what was written is in one of them.
    const aliases = ({ same }) => apart.filter((_, index) => how.bindings[index].same === same);
    const least = how.bindings.map((binding) => Math.min(...aliases(binding)));
    const by = Math.max(0, ...least);
    if (by > worst.by) worst = { kernel, by };
    if (by === 0) equal += 1;
    if (!(by <= TOLERANCE)) fail(`${kernel}: binding ${least.indexOf(by)} differs by ${by} of its largest number`);
  } catch (error) {
    fail(`${kernel}: ${error.message}`);
  }
}
const others = worst.by > 0 ? `, the others by at most ${worst.by.toExponential(1)} of the largest number (${worst.kernel})` : '';
console.log(`${names.length} kernels, ${equal} of them equal to the byte${others}; ${failed} failed`);
process.exit(failed > 0 || names.length === 0 ? 1 : 0);
