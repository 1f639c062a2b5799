//! SuperPoint (DeTone, Malisiewicz and Rabinovich, CVPRW 2018): one encoder, a detector of 64 pixels and a dustbin
//! per 8x8 cell, and a descriptor per cell. The VGG encoder of the paper, and a squeeze-and-expand encoder (the fire
//! modules of SqueezeNet, Iandola et al., 2016) with the same interface.
//!
//! Magic Leap's own weights are for non-commercial use; we ship none.

use super::kernels::{Activation, FeatureMap};
use super::layers::{join_channels, max_pool2, Layer};
use crate::error::Result;
use crate::team::chunks;
use candle_core::{Tensor, D};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Channels of a descriptor.
pub const DESCRIPTOR: usize = 256;
/// Pixels along a cell's side.
pub const CELL: usize = 8;
/// Pixels of a cell and the dustbin.
const DETECTOR: usize = CELL * CELL + 1;

/// The VGG encoder, layer by layer: name, inputs, outputs, whether a 2x2 maximum follows.
const VGG: [(&str, usize, usize, bool); 8] = [
    ("conv1a", 1, 64, false),
    ("conv1b", 64, 64, true),
    ("conv2a", 64, 64, false),
    ("conv2b", 64, 64, true),
    ("conv3a", 64, 128, false),
    ("conv3b", 128, 128, true),
    ("conv4a", 128, 128, false),
    ("conv4b", 128, 128, false),
];

/// The fire modules: inputs, squeezed channels, channels of each half, whether a 2x2 maximum follows.
const FIRE: [(usize, usize, usize, bool); 6] =
    [(64, 16, 32, false), (64, 16, 32, true), (64, 32, 64, false), (128, 32, 64, true), (128, 48, 64, false), (128, 48, 64, false)];

/// A convolution's name and the shape of its weight, O x I x K x K.
pub(super) type Spec = (String, [usize; 4]);

fn heads() -> Vec<Spec> {
    let convs = [
        ("convPa", [256, 128, 3, 3]),
        ("convPb", [DETECTOR, 256, 1, 1]),
        ("convDa", [256, 128, 3, 3]),
        ("convDb", [DESCRIPTOR, 256, 1, 1]),
    ];
    convs.map(|(n, s)| (n.to_string(), s)).to_vec()
}

/// Convolutions of the VGG network in order: encoder, detector head, descriptor head.
pub(super) fn vgg_specs() -> Vec<Spec> {
    VGG.iter().map(|(name, i, o, _)| (name.to_string(), [*o, *i, 3, 3])).chain(heads()).collect()
}

/// Convolutions of the squeeze network, in the order in which they run.
pub(super) fn squeeze_specs() -> Vec<Spec> {
    let mut specs = vec![("conv1a".to_string(), [64, 1, 3, 3]), ("conv1b".to_string(), [64, 64, 3, 3])];
    for (at, (inputs, squeezed, half, _)) in FIRE.into_iter().enumerate() {
        specs.push((format!("fire{at}.squeeze"), [squeezed, inputs, 1, 1]));
        specs.push((format!("fire{at}.expand1"), [half, squeezed, 1, 1]));
        specs.push((format!("fire{at}.expand3"), [half, squeezed, 3, 3]));
    }
    specs.into_iter().chain(heads()).collect()
}

/// A fire module.
#[derive(Debug)]
struct Fire {
    squeeze: Layer,
    expand1: Layer,
    expand3: Layer,
    pool: bool,
}

#[derive(Debug)]
enum Encoder {
    Vgg(Vec<Layer>),
    Squeeze { stem: Vec<Layer>, fires: Vec<Fire> },
}

/// What the network says of every cell.
#[derive(Clone, Debug)]
pub struct Dense {
    /// 65 x H/8 x W/8, before the softmax.
    pub logits: Tensor,
    /// D x H/8 x W/8, unit length per cell.
    pub descriptors: Tensor,
    /// How reliable a cell is, 0 to 1, H/8 x W/8; `None`: the network does not say.
    pub reliability: Option<Tensor>,
}

/// The network.
#[derive(Debug)]
pub struct SuperPoint {
    encoder: Encoder,
    /// The encoder's first two layers in one pass.
    stem: Option<Layer>,
    detector: [Layer; 2],
    /// `None`: a detector alone (MagicPoint).
    descriptor: Option<[Layer; 2]>,
    /// What earlier images were worked on in.
    spaces: Mutex<Vec<Space>>,
}

/// Maps that layers read and write in turn.
#[derive(Debug, Default)]
struct Space {
    maps: [FeatureMap; 2],
}

/// Spaces kept: images of a robot are worked on one after the other, and each is tens of megabytes.
const SPACES: usize = 2;

impl SuperPoint {
    /// The VGG network from folded tensors by the original names; without the descriptor's, a detector.
    pub fn vgg(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let layers = VGG.iter().map(|(name, _, _, pool)| Layer::new(tensors, name, Activation::Relu, 1, *pool));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let stem = layers[1].after(tensors, VGG[0].0)?;
        let descriptor = tensors.contains_key("convDa.weight").then(|| head(tensors, "convDa", "convDb")).transpose()?;
        Ok(Self { encoder: Encoder::Vgg(layers), stem, detector: head(tensors, "convPa", "convPb")?, descriptor, spaces: Mutex::default() })
    }

    /// The squeeze network.
    pub fn squeeze(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let layer = |name: &str, pool| Layer::new(tensors, name, Activation::Relu, 1, pool);
        let stem = vec![layer("conv1a", false)?, layer("conv1b", true)?];
        let both = stem[1].after(tensors, "conv1a")?;
        let fire = |(at, (_, _, _, pool)): (usize, &(usize, usize, usize, bool))| {
            Ok(Fire {
                squeeze: layer(&format!("fire{at}.squeeze"), false)?,
                expand1: layer(&format!("fire{at}.expand1"), false)?,
                expand3: layer(&format!("fire{at}.expand3"), false)?,
                pool: *pool,
            })
        };
        let fires = FIRE.iter().enumerate().map(fire).collect::<Result<_>>()?;
        Ok(Self {
            encoder: Encoder::Squeeze { stem, fires },
            stem: both,
            detector: head(tensors, "convPa", "convPb")?,
            descriptor: Some(head(tensors, "convDa", "convDb")?),
            spaces: Mutex::default(),
        })
    }

    /// The encoder's outputs in order, the last is what both heads read. `x`: 1 x 1 x H x W, luma 0 to 1, H and W
    /// multiples of 8.
    pub fn encode(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.encode_from(x.clone(), 0)
    }

    /// What both heads read.
    fn encode_last(&self, x: &Tensor) -> Result<Tensor> {
        let (start, from) = match &self.stem {
            Some(stem) => (stem.forward(x)?, 2),
            None => (x.clone(), 0),
        };
        Ok(self.encode_from(start, from)?.pop().unwrap_or_else(|| x.clone()))
    }

    /// From layer `from` on, whose input `x` is.
    fn encode_from(&self, mut x: Tensor, from: usize) -> Result<Vec<Tensor>> {
        let mut all = Vec::new();
        match &self.encoder {
            Encoder::Vgg(layers) => {
                for layer in &layers[from..] {
                    x = layer.forward(&x)?;
                    all.push(x.clone());
                }
            }
            Encoder::Squeeze { stem, fires } => {
                for layer in &stem[from..] {
                    x = layer.forward(&x)?;
                }
                for fire in fires {
                    let squeezed = fire.squeeze.forward(&x)?;
                    x = join_channels(&fire.expand1.forward(&squeezed)?, &fire.expand3.forward(&squeezed)?)?;
                    if fire.pool {
                        x = max_pool2(&x)?;
                    }
                }
                all.push(x);
            }
        }
        Ok(all)
    }

    /// Whether the network describes what it detects.
    pub fn describes(&self) -> bool {
        self.descriptor.is_some()
    }

    /// Detector's logits, 65 x H/8 x W/8.
    pub fn detect(&self, encoded: &Tensor) -> Result<Tensor> {
        Ok(self.detector[1].forward(&self.detector[0].forward(encoded)?)?.squeeze(0)?)
    }

    /// Logits and unit descriptors of every cell; zero descriptors where the network has none.
    pub fn dense(&self, x: &Tensor) -> Result<Dense> {
        if let Encoder::Vgg(layers) = &self.encoder {
            let mut space = self.spaces.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
            let dense = self.dense_in(layers, x, &mut space);
            let mut spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
            if spaces.len() < SPACES {
                spaces.push(space);
            }
            return dense;
        }
        let encoded = self.encode_last(x)?;
        let logits = self.detect(&encoded)?;
        let descriptors = match &self.descriptor {
            Some([a, b]) => unit_columns(&b.forward(&a.forward(&encoded)?)?.squeeze(0)?)?,
            None => logits.narrow(0, 0, 1)?.zeros_like()?,
        };
        Ok(Dense { logits, descriptors, reliability: None })
    }
}

impl SuperPoint {
    fn dense_in(&self, layers: &[Layer], x: &Tensor, space: &mut Space) -> Result<Dense> {
        let (_, channels, height, width) = x.dims4()?;
        let image = FeatureMap::new(x.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1()?, height, width, channels)?;
        let [a, b] = &mut space.maps;
        let from = match &self.stem {
            Some(stem) => stem.run(&image, a).map(|()| 2)?,
            None => layers[0].run(&image, a).map(|()| 1)?,
        };
        for layer in &layers[from..] {
            layer.run(a, b)?;
            std::mem::swap(a, b);
        }
        let tensor = |map: FeatureMap| -> Result<Tensor> {
            let shape = (map.height, map.width, map.channels);
            Ok(Tensor::from_vec(map.into_values(), shape, x.device())?.permute((2, 0, 1))?)
        };
        let mut head = |[first, last]: &[Layer; 2]| -> Result<FeatureMap> {
            let mut out = FeatureMap::default();
            first.run(a, b)?;
            last.run(b, &mut out)?;
            Ok(out)
        };
        let logits = head(&self.detector)?;
        let descriptors = match &self.descriptor {
            Some(layers) => {
                let mut map = head(layers)?;
                let channels = map.channels;
                unit_cells(map.values_mut(), channels);
                tensor(map)?
            }
            None => Tensor::zeros((1, logits.height, logits.width), x.dtype(), x.device())?,
        };
        Ok(Dense { logits: tensor(logits)?, descriptors, reliability: None })
    }
}

fn head(tensors: &BTreeMap<String, Tensor>, first: &str, last: &str) -> Result<[Layer; 2]> {
    Ok([Layer::new(tensors, first, Activation::Relu, 1, false)?, Layer::new(tensors, last, Activation::None, 1, false)?])
}

/// C x H x W with the C values of each cell at unit length, channels last in memory.
pub(super) fn unit_columns(x: &Tensor) -> Result<Tensor> {
    let (c, h, w) = x.dims3()?;
    let mut cells = x.permute((1, 2, 0))?.flatten_all()?.to_vec1::<f32>()?;
    unit_cells(&mut cells, c);
    Ok(Tensor::from_vec(cells, (h, w, c), x.device())?.permute((2, 0, 1))?)
}

/// Every `channels` values at unit length.
fn unit_cells(values: &mut [f32], channels: usize) {
    const LANES: usize = 16;
    let together = 256 * channels.max(1);
    let scale = |_: usize, cells: &mut [f32]| {
        for cell in cells.chunks_exact_mut(channels.max(1)) {
            // Sums side by side, which the compiler makes a vector of.
            let mut sums = [0f32; LANES];
            for part in cell.chunks(LANES) {
                sums.iter_mut().zip(part).for_each(|(s, v)| *s += v * v);
            }
            let norm = sums.iter().sum::<f32>().sqrt().max(1e-12);
            cell.iter_mut().for_each(|v| *v /= norm);
        }
    };
    chunks(values, together, scale);
}

/// Mean over the last two axes.
pub(super) fn mean_over_image(x: &Tensor) -> Result<Tensor> {
    Ok(x.mean_keepdim(D::Minus1)?.mean_keepdim(D::Minus2)?)
}
