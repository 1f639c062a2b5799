//! Where the network runs.

use super::kernels::Plan;
use super::mobilenet_v2::{MobileNetV2, RoundedNetwork};
use crate::error::{Error, Result};

/// Where the network runs: `cpu`, or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeDevice {
    /// The processor.
    #[default]
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

impl std::str::FromStr for ComputeDevice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let number = |n: &str| n.parse().ok().filter(|_| n.bytes().all(|b| b.is_ascii_digit()));
        match name {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => name.strip_prefix("cuda:").and_then(number).map(Self::Cuda).ok_or_else(|| "cpu, or cuda:N such as cuda:0".into()),
        }
    }
}

impl std::fmt::Display for ComputeDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// What the 1x1 convolutions compute in, which are nine tenths of the arithmetic, or what a weight file keeps them in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floating point.
    #[default]
    F32,
    /// 16-bit floating point, sums in f32; computed in on CUDA only.
    F16,
    /// bfloat16, sums in f32; the first block in f32. Computed in on processors with AMX or AVX-512 BF16; elsewhere it is f32.
    Bf16,
    /// 8-bit weights and values, exact sums: for processors with VNNI, and for AVX2.
    Int8,
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            _ => Err("f32, f16, bf16 or int8".into()),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

/// What one image costs: for the share of a device's limits that a time is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Multiplications with additions in matrix products.
    pub products: f64,
    /// Those of the other convolutions, always in f32.
    pub others: f64,
    /// Bytes that kernels read and write, each tensor once per kernel.
    pub bytes: f64,
}

/// What a device can do at most, from its clock, units and bus.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Multiplications with additions in f32, a second.
    pub f32: f64,
    /// The same in f16 on tensor cores.
    pub f16: f64,
    /// Bytes of memory a second.
    pub memory: f64,
}

/// The network, ready to run.
#[derive(Debug)]
pub(super) enum Network {
    Cpu(Plan),
    #[cfg(feature = "cuda")]
    Cuda(Box<super::kernels::gpu::GpuPlan<super::kernels::gpu::Cuda>>),
}

impl Network {
    /// `int8`: its 1x1 convolutions in 8 bits, where it is to compute so.
    ///
    /// Errors: a device that is not there, or does not compute in `precision`.
    pub fn new(network: &MobileNetV2, device: ComputeDevice, precision: Precision, int8: Option<&RoundedNetwork>) -> Result<Self> {
        let refused = |reason: String| Err(Error::Device { reason });
        match (device, precision) {
            (ComputeDevice::Cpu, Precision::F16) => {
                refused("the cpu computes in f32, bf16 or int8; f16 wants --device cuda:0 (model.device)".into())
            }
            (ComputeDevice::Cuda(n), Precision::Bf16 | Precision::Int8) => {
                refused(format!("cuda:{n} computes in f32 or f16; {precision} is for the cpu"))
            }
            (ComputeDevice::Cpu, Precision::Bf16) => Ok(Self::Cpu(network.plan16()?)),
            (ComputeDevice::Cpu, _) => Ok(Self::Cpu(network.plan(int8.filter(|_| precision == Precision::Int8))?)),
            #[cfg(feature = "cuda")]
            (ComputeDevice::Cuda(n), _) => {
                use super::kernels::gpu::{Cuda, KERNELS};
                Ok(Self::Cuda(Box::new(network.gpu_plan(Cuda::new(n, &KERNELS)?, precision == Precision::F16)?)))
            }
            #[cfg(not(feature = "cuda"))]
            (ComputeDevice::Cuda(n), _) => {
                refused(format!("cuda:{n}: this program was built without CUDA (cargo build --release --features cuda; see README, CUDA)"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_to_and_fro_and_others_are_refused() {
        for (name, device) in [("cpu", ComputeDevice::Cpu), ("cuda:0", ComputeDevice::Cuda(0)), ("cuda:12", ComputeDevice::Cuda(12))] {
            assert_eq!(name.parse(), Ok(device));
            assert_eq!(device.to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(ComputeDevice::Cuda(0)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "CPU", "cuda:99999999999999999999"] {
            assert!(wrong.parse::<ComputeDevice>().is_err(), "{wrong}");
        }
    }
}
