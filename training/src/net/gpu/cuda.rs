//! CUDA as a machine to train on.

use super::{Args, Machine, Product, KERNELS, SOURCE};
use candle_core::{Error, Result};
use structvpr::model::cuda::{Cuda, DeviceRepr, Gemm, Kernels, Matrix, Number};

// SAFETY: plain numbers, laid out as the kernels' `Args` (both are C structs of the same fields).
unsafe impl DeviceRepr for Args {}

/// Opens the CUDA device of this number and compiles the kernels for it.
pub(super) fn open(number: usize) -> Result<impl Machine> {
    Cuda::new(number, &Kernels { source: SOURCE, names: &KERNELS, types: ["f32", "bf16"] }).map(Device).map_err(Error::wrap)
}

struct Device(Cuda);

impl Machine for Device {
    fn reserve(&mut self, bytes: usize) -> Result<u64> {
        self.0.reserve(bytes).map_err(Error::wrap)
    }

    fn free(&mut self, address: u64) {
        self.0.free(address);
    }

    fn clear(&mut self, at: u64) -> Result<()> {
        self.0.clear(at).map_err(Error::wrap)
    }

    fn upload(&mut self, to: u64, values: &[f32]) -> Result<()> {
        self.0.upload(to, bytemuck::cast_slice(values)).map_err(Error::wrap)
    }

    fn launch(&mut self, kernel: &'static str, half: bool, items: usize, args: &Args) -> Result<()> {
        // SAFETY: the kernels of `SOURCE` take a count and `Args`; `Run` took the memory that they name, in these sizes.
        unsafe { self.0.launch(kernel, half, items, args) }.map_err(Error::wrap)
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        let number = |half: bool| if half { Number::Bf16 } else { Number::F32 };
        // Row-major c = a b is, column after column, c^T = b^T a^T.
        let of = |m: &super::Matrix| Matrix { address: m.address, leading: m.row, transposed: m.transposed };
        let gemm = Gemm {
            sizes: (p.columns, p.rows, p.inner),
            a: of(&p.b),
            b: of(&p.a),
            c: p.c,
            of: number(p.half),
            into: number(p.half && !p.wide),
            add: p.add,
        };
        // SAFETY: as `launch`.
        unsafe { self.0.gemm(&gemm) }.map_err(Error::wrap)
    }

    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()> {
        self.0.download(from, values).map_err(Error::wrap)
    }
}
