//! A CUDA device: one stream, memory by address, kernels by NVRTC, matrix products by cuBLAS.

use super::{Args, Machine, Product, SOURCE};
use crate::error::{Error, Result};
use crate::model::device::Limits;
use candle_core::cuda_backend::cudarc;
use cudarc::cublas::{result::gemm_ex, sys as blas, CudaBlas};
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUgraphInstantiate_flags, CUstreamCaptureMode};
pub use cudarc::driver::DeviceRepr;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PinnedHostSlice, PushKernelArg,
};
use cudarc::nvrtc::{compile_ptx_with_opts, CompileOptions};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;

/// Threads of a block.
const BLOCK: u32 = 128;
/// Bytes that cuBLAS has to itself [cuBLAS's own recommendation for the largest of these GPUs]; given, not left to it, because what
/// it would take during a recording would become part of that.
const WORKSPACE: usize = 32 << 20;

// SAFETY: plain numbers, laid out as the kernels' `Args` (both are C structs of the same fields).
unsafe impl DeviceRepr for Args {}

/// Kernels as text: `NAME_TYPE(long long items, Args)` for each name and both types.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    pub source: &'static str,
    pub names: &'static [&'static str],
    /// The wide type and the narrow one.
    pub types: [&'static str; 2],
}

/// Numbers of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    F32,
    F16,
    Bf16,
}

impl Number {
    fn kind(self) -> blas::cudaDataType_t {
        match self {
            Self::F32 => blas::cudaDataType_t::CUDA_R_32F,
            Self::F16 => blas::cudaDataType_t::CUDA_R_16F,
            Self::Bf16 => blas::cudaDataType_t::CUDA_R_16BF,
        }
    }
}

/// A matrix on the device, as cuBLAS counts: column after column.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub address: u64,
    /// From one column to the next.
    pub leading: usize,
    /// Taken with rows for columns.
    pub transposed: bool,
}

/// `c = a b`, or `c + a b` with `add`: `m` x `k` by `k` x `n`, summed in f32.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    pub sizes: (usize, usize, usize),
    pub a: Matrix,
    pub b: Matrix,
    /// `m` rows, column after column.
    pub c: u64,
    pub of: Number,
    pub into: Number,
    pub add: bool,
}

/// Calls that were kept, to be made again in one.
enum Kept {
    /// None: of calls that were made once it is not known that they come again.
    Nothing,
    Graph(Graph),
    /// This device, or its cuBLAS, does not record.
    Refused,
}

struct Graph(CudaGraph);

// SAFETY: a graph is bound to no thread; CUDA asks that calls to it do not overlap, and it is only called through `&mut Cuda`.
unsafe impl Send for Graph {}

/// One device with its stream.
pub struct Cuda {
    // Before the stream and the memory that it names, so that it goes first.
    kept: Kept,
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    /// cuBLAS's.
    _workspace: CudaSlice<u8>,
    /// By name; in the wide type and the narrow one.
    kernels: BTreeMap<&'static str, [CudaFunction; 2]>,
    /// By address.
    memory: BTreeMap<u64, CudaSlice<u8>>,
    /// Page-locked, so that an upload is one transfer.
    staging: Option<PinnedHostSlice<u8>>,
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Cuda({})", self.stream.context().ordinal())
    }
}

fn said(what: &str) -> impl Fn(cudarc::driver::DriverError) -> Error + '_ {
    move |e| Error::Device { reason: format!("{what}: {e}") }
}

fn unknown() -> Error {
    Error::Device { reason: "an address that was not reserved".into() }
}

impl Cuda {
    fn context(number: usize) -> Result<Arc<CudaContext>> {
        CudaContext::new(number).map_err(|e| Error::Device {
            reason: format!("cuda:{number} cannot be used: {e} (nvidia-smi lists what there is; --device cpu works everywhere)"),
        })
    }

    /// Opens a device and compiles the kernels for it.
    ///
    /// Errors: no driver, no such device, NVRTC's own.
    pub fn new(number: usize, kernels: &Kernels) -> Result<Self> {
        let context = Self::context(number)?;
        // One stream for all: nothing to track between streams.
        // SAFETY: all memory of this context that we allocate is used on this one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(said("no stream"))?;
        let (major, minor) = context.compute_capability().map_err(said("its compute capability"))?;
        let options = CompileOptions { options: vec![format!("--gpu-architecture=compute_{major}{minor}")], ..CompileOptions::default() };
        let ptx = compile_ptx_with_opts(kernels.source, options).map_err(|e| Error::Device { reason: format!("NVRTC: {e}") })?;
        let module = context.load_module(ptx).map_err(said("the kernels cannot be loaded"))?;
        let load = |name: &str, kind: &str| module.load_function(&format!("{name}_{kind}")).map_err(said("a kernel is missing"));
        let [wide, narrow] = kernels.types;
        let kernels = kernels.names.iter().map(|name| Ok((*name, [load(name, wide)?, load(name, narrow)?])));
        let blas = CudaBlas::new(stream.clone()).map_err(|e| Error::Device { reason: format!("cuBLAS: {e}") })?;
        // SAFETY: memory that is not set; cuBLAS writes it before it reads it.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE) }.map_err(said("cuBLAS's memory"))?;
        let at = workspace.device_ptr(&stream).0 as *mut c_void;
        // SAFETY: memory of this size, which lives as long as the handle.
        unsafe { blas::cublasSetWorkspace_v2(*blas.handle(), at, WORKSPACE) }
            .result()
            .map_err(|e| Error::Device { reason: format!("cuBLAS: {e}") })?;
        let kernels = kernels.collect::<Result<_>>()?;
        Ok(Self { kept: Kept::Nothing, blas, _workspace: workspace, kernels, memory: BTreeMap::new(), staging: None, stream })
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.stream.context().name().unwrap_or_else(|e| e.to_string())
    }

    /// What it can do at most; `None` where it does not say.
    pub fn limits(&self) -> Option<Limits> {
        let context = self.stream.context();
        let of = |a| context.attribute(a).ok().map(f64::from).filter(|v| *v > 0.0);
        let units = of(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let clock = 1e3 * of(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        let memory_clock = 1e3 * of(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bus = of(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)? / 8.0;
        // Per unit and clock, from the CUDA programming guide's table of throughputs and the architectures' papers.
        let (single, half) = match context.compute_capability().ok()? {
            (7, _) => (64.0, 512.0),
            (8, 0) => (64.0, 1024.0),
            (8, 7) => (128.0, 1024.0),
            (8, _) => (128.0, 512.0),
            (9, 0) => (128.0, 2048.0),
            _ => return None,
        };
        // Two transfers a clock.
        Some(Limits { f32: units * clock * single, f16: units * clock * half, memory: 2.0 * memory_clock * bus })
    }

    /// Address of `bytes` of memory of its own, 256-aligned; freed with the device, or by [`Self::free`].
    ///
    /// Errors: no room.
    pub fn reserve(&mut self, bytes: usize) -> Result<u64> {
        // SAFETY: memory that is not set; every kernel writes all of what a later one reads.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) }.map_err(|e| Error::Device { reason: format!("{bytes} bytes: {e}") })?;
        let address = slice.device_ptr(&self.stream).0;
        self.memory.insert(address, slice);
        Ok(address)
    }

    /// Gives back what [`Self::reserve`] gave, on the stream: after all that uses it.
    pub fn free(&mut self, address: u64) {
        self.memory.remove(&address);
    }

    /// Sets all bytes of what [`Self::reserve`] gave to 0.
    pub fn clear(&mut self, at: u64) -> Result<()> {
        let slice = self.memory.get_mut(&at).ok_or_else(unknown)?;
        self.stream.memset_zeros(slice).map_err(said("clearing"))
    }

    /// Copies to the device.
    pub fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        let slice = self.memory.get_mut(&to).ok_or_else(unknown)?;
        self.stream.memcpy_htod(bytes, slice).map_err(said("upload"))
    }

    /// The same through page-locked memory, which `fill` writes; for what comes in one size again and again.
    pub fn upload_again(&mut self, to: u64, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let failed = said("upload");
        // SAFETY: memory that is not set; it is written before it is read.
        let made = |context: &Arc<CudaContext>| unsafe { context.alloc_pinned(bytes) }.map_err(said("page-locked memory"));
        let staging = match self.staging.take() {
            Some(s) if s.len() == bytes => s,
            _ => made(self.stream.context())?,
        };
        let staging = self.staging.insert(staging);
        // Waits for the upload before this one, which may still read it.
        fill(staging.as_mut_slice().map_err(&failed)?);
        self.stream.memcpy_htod(staging, self.memory.get_mut(&to).ok_or_else(unknown)?).map_err(&failed)
    }

    /// Runs a kernel over `items`, in its narrow type or in the wide one.
    ///
    /// # Safety
    ///
    /// The kernel takes a 64-bit count and `A`, and touches no memory but what was reserved here.
    pub unsafe fn launch<A: DeviceRepr>(&mut self, kernel: &'static str, narrow: bool, items: usize, args: &A) -> Result<()> {
        let Some(functions) = self.kernels.get(kernel) else { return Err(Error::Device { reason: format!("no kernel {kernel}") }) };
        let (items, blocks) = (items as i64, items.div_ceil(BLOCK as usize) as u32);
        let config = LaunchConfig { grid_dim: (blocks.max(1), 1, 1), block_dim: (BLOCK, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.stream.launch_builder(&functions[usize::from(narrow)]);
        launch.arg(&items).arg(args);
        // SAFETY: the caller's.
        unsafe { launch.launch(config) }.map(drop).map_err(said(kernel))
    }

    /// A matrix product.
    ///
    /// # Safety
    ///
    /// The three matrices lie in memory that was reserved here, in these sizes.
    pub unsafe fn gemm(&mut self, g: &Gemm) -> Result<()> {
        // cuBLAS takes the device from the thread, which may be another than the last time.
        self.stream.context().bind_to_thread().map_err(said("cuBLAS"))?;
        let (one, before) = (1f32, if g.add { 1f32 } else { 0f32 });
        let scalar = |v: &f32| std::ptr::from_ref(v).cast::<c_void>();
        let op = |m: &Matrix| if m.transposed { blas::cublasOperation_t::CUBLAS_OP_T } else { blas::cublasOperation_t::CUBLAS_OP_N };
        let (m, n, k) = g.sizes;
        // SAFETY: the caller's.
        unsafe {
            gemm_ex(
                *self.blas.handle(),
                op(&g.a),
                op(&g.b),
                m as i32,
                n as i32,
                k as i32,
                scalar(&one),
                g.a.address as *const c_void,
                g.of.kind(),
                g.a.leading as i32,
                g.b.address as *const c_void,
                g.of.kind(),
                g.b.leading as i32,
                scalar(&before),
                g.c as *mut c_void,
                g.into.kind(),
                m as i32,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(|e| Error::Device { reason: format!("cuBLAS: {e}") })
    }

    /// Does `work`, which launches and multiplies and no more. `same`: its calls are, one by one, those of the last time. The second
    /// time they are recorded as a CUDA graph, and from then on all are made in one: at one image a call takes longer to make than
    /// to be done.
    pub fn repeat(&mut self, same: bool, work: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        match &self.kept {
            Kept::Graph(graph) if same => return graph.0.launch().map_err(said("the recorded kernels")),
            Kept::Nothing if same => {
                let failed = said("recording");
                self.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(&failed)?;
                let done = work(self);
                // Also of work that failed: until it is ended, nothing is done on this stream.
                let ended = self.stream.end_capture(CUgraphInstantiate_flags(0));
                if let (Ok(()), Ok(Some(graph))) = (done, ended) {
                    graph.launch().map_err(&failed)?;
                    self.kept = Kept::Graph(Graph(graph));
                    return Ok(());
                }
                self.kept = Kept::Refused;
            }
            Kept::Graph(_) => self.kept = Kept::Nothing,
            Kept::Nothing | Kept::Refused => {}
        }
        work(self)
    }

    /// Whether the last [`Self::repeat`] was one call.
    pub fn recorded(&self) -> bool {
        matches!(self.kept, Kept::Graph(_))
    }

    /// Waits for all that was asked for and copies back.
    pub fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()> {
        let slice = self.memory.get(&from).ok_or_else(unknown)?;
        let mut bytes = vec![0u8; std::mem::size_of_val(values)];
        self.stream.memcpy_dtoh(&slice.slice(..bytes.len()), &mut bytes).map_err(said("download"))?;
        self.stream.synchronize().map_err(said("download"))?;
        for (v, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
            *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
        Ok(())
    }
}

impl Machine for Cuda {
    fn reserve(&mut self, bytes: usize) -> Result<u64> {
        self.reserve(bytes)
    }

    fn free(&mut self, address: u64) -> Result<()> {
        self.free(address);
        Ok(())
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        self.upload(to, bytes)
    }

    fn upload_again(&mut self, to: u64, parts: &[&[u8]]) -> Result<()> {
        let each = parts.first().map_or(0, |p| p.len());
        self.upload_again(to, parts.len() * each, |staging| {
            // In parallel: one core copies more slowly than the bus does.
            staging.par_chunks_mut(each.max(1)).zip(parts).for_each(|(to, part)| to.copy_from_slice(part));
        })
    }

    fn launch(&mut self, kernel: &'static str, half: bool, items: usize, args: &Args) -> Result<()> {
        // SAFETY: the kernels of `SOURCE` take a count and `Args`; the plan laid out the memory that they name.
        unsafe { self.launch(kernel, half, items, args) }
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        let of = if p.half { Number::F16 } else { Number::F32 };
        // Column after column, what is asked for as y = x w^T is y^T = w x^T.
        let gemm = Gemm {
            sizes: (p.outputs, p.pixels, p.inputs),
            a: Matrix { address: p.w, leading: p.inputs, transposed: true },
            b: Matrix { address: p.x, leading: p.inputs, transposed: false },
            c: p.y,
            of,
            into: Number::F32,
            add: false,
        };
        // SAFETY: the three matrices lie in memory that the plan laid out for them, in these sizes.
        unsafe { self.gemm(&gemm) }
    }

    fn repeat(&mut self, same: bool, work: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.repeat(same, work)
    }

    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()> {
        self.download(from, values)
    }
}

/// The descriptor's kernels.
pub(crate) const KERNELS: Kernels =
    Kernels { source: SOURCE, names: &["stem", "depthwise", "finish", "pool_strip", "pool"], types: ["f32", "f16"] };
