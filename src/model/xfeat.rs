//! XFeat (Potje et al., CVPR 2024): accelerated features, 64 values per descriptor.

use super::kernels::Activation;
use super::layers::Layer;
use super::superpoint::{mean_over_image, unit_columns, Dense, Spec, CELL};
use crate::error::Result;
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Values of a descriptor.
pub const DESCRIPTOR: usize = 64;
/// Height and width must be multiples of this.
pub const MULTIPLE: usize = 32;

/// A convolution: name, I, O, kernel, stride, and what the file says of it.
struct Conv(&'static str, usize, usize, usize, usize, Kind);

/// Whether batch norm (without weights of its own) and ReLU follow, or a bias and nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Norm,
    Bias,
}

use Kind::{Bias, Norm};

const CONVS: [Conv; 27] = [
    Conv("skip1.1", 1, 24, 1, 1, Bias),
    Conv("block1.0", 1, 4, 3, 1, Norm),
    Conv("block1.1", 4, 8, 3, 2, Norm),
    Conv("block1.2", 8, 8, 3, 1, Norm),
    Conv("block1.3", 8, 24, 3, 2, Norm),
    Conv("block2.0", 24, 24, 3, 1, Norm),
    Conv("block2.1", 24, 24, 3, 1, Norm),
    Conv("block3.0", 24, 64, 3, 2, Norm),
    Conv("block3.1", 64, 64, 3, 1, Norm),
    Conv("block3.2", 64, 64, 1, 1, Norm),
    Conv("block4.0", 64, 64, 3, 2, Norm),
    Conv("block4.1", 64, 64, 3, 1, Norm),
    Conv("block4.2", 64, 64, 3, 1, Norm),
    Conv("block5.0", 64, 128, 3, 2, Norm),
    Conv("block5.1", 128, 128, 3, 1, Norm),
    Conv("block5.2", 128, 128, 3, 1, Norm),
    Conv("block5.3", 128, 64, 1, 1, Norm),
    Conv("block_fusion.0", 64, 64, 3, 1, Norm),
    Conv("block_fusion.1", 64, 64, 3, 1, Norm),
    Conv("block_fusion.2", 64, 64, 1, 1, Bias),
    Conv("heatmap_head.0", 64, 64, 1, 1, Norm),
    Conv("heatmap_head.1", 64, 64, 1, 1, Norm),
    Conv("heatmap_head.2", 64, 1, 1, 1, Bias),
    Conv("keypoint_head.0", 64, 64, 1, 1, Norm),
    Conv("keypoint_head.1", 64, 64, 1, 1, Norm),
    Conv("keypoint_head.2", 64, 64, 1, 1, Norm),
    Conv("keypoint_head.3", 64, 65, 1, 1, Bias),
];

/// Convolutions, and whether batch norm follows.
pub(super) fn specs() -> Vec<(Spec, bool)> {
    CONVS.iter().map(|Conv(name, i, o, k, _, kind)| ((name.to_string(), [*o, *i, *k, *k]), *kind == Norm)).collect()
}

/// The network.
#[derive(Debug)]
pub struct XFeat {
    layers: BTreeMap<&'static str, Layer>,
}

/// Of PyTorch's `InstanceNorm2d`.
const NORM_EPS: f64 = 1e-5;

impl XFeat {
    /// From folded tensors by the original names of the layers.
    pub fn new(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let layer = |Conv(name, _, _, _, stride, kind): &Conv| {
            let activation = if *kind == Norm { Activation::Relu } else { Activation::None };
            Ok((*name, Layer::new(tensors, name, activation, *stride, false)?))
        };
        Ok(Self { layers: CONVS.iter().map(layer).collect::<Result<_>>()? })
    }

    fn run(&self, block: &str, x: &Tensor) -> Result<Tensor> {
        let mut x = x.clone();
        let own = |name: &&&str| name.strip_prefix(block).is_some_and(|rest| rest.starts_with('.'));
        // Names within a block sort as they run.
        for name in self.layers.keys().filter(own) {
            x = self.layers[name].forward(&x)?;
        }
        Ok(x)
    }

    /// `x`: 1 x 1 x H x W, luma at any scale, H and W multiples of 32. Descriptors are not yet of unit length.
    pub fn raw(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let centred = x.broadcast_sub(&mean_over_image(x)?)?;
        let std = (mean_over_image(&centred.sqr()?)? + NORM_EPS)?.sqrt()?;
        let x = centred.broadcast_div(&std)?;
        let (_, _, h, w) = x.dims4()?;
        let x1 = (self.run("block1", &x)? + self.run("skip1", &x.avg_pool2d(4)?)?)?;
        let x3 = self.run("block3", &self.run("block2", &x1)?)?;
        let x4 = self.run("block4", &x3)?;
        let x5 = self.run("block5", &x4)?;
        let (_, _, h3, w3) = x3.dims4()?;
        let up = |x: &Tensor| x.upsample_bilinear2d(h3, w3, false);
        let features = self.run("block_fusion", &((&x3 + up(&x4)?)? + up(&x5)?)?)?;
        let heat = self.run("heatmap_head", &features)?;
        // sigmoid
        let reliability = (heat.neg()?.exp()? + 1.0)?.recip()?;
        let cells = x.reshape((h / CELL, CELL, w / CELL, CELL))?.permute((1, 3, 0, 2))?.reshape((1, CELL * CELL, h / CELL, w / CELL))?;
        let logits = self.run("keypoint_head", &cells.contiguous()?)?;
        Ok((features.squeeze(0)?, logits.squeeze(0)?, reliability.squeeze(0)?.squeeze(0)?))
    }

    /// As [`super::superpoint::SuperPoint::dense`].
    pub fn dense(&self, x: &Tensor) -> Result<Dense> {
        let (features, logits, reliability) = self.raw(x)?;
        Ok(Dense { logits, descriptors: unit_columns(&features)?, reliability: Some(reliability) })
    }
}
