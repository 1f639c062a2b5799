//! PSPNet (<https://arxiv.org/abs/1612.01105>) on a dilated ResNet-50: the paper's segmenter, in the checkpoint layout of
//! `ade20k-resnet50dilated-ppm_deepsup` (two files, encoder and decoder).

use super::layers::{Conv, Map, Reader};
use super::Segmenter;
use anyhow::{ensure, Result};

/// Blocks and inner channels of the four stages.
const STAGES: [(usize, usize); 4] = [(3, 64), (4, 128), (6, 256), (3, 512)];
/// Sizes of the pyramid's pools.
const POOLS: [usize; 4] = [1, 2, 3, 6];

struct Bottleneck {
    convs: [Conv; 3],
    shortcut: Option<Conv>,
}

/// The network.
pub struct PspNet {
    stem: Vec<Conv>,
    stages: Vec<Bottleneck>,
    pyramid: Vec<Conv>,
    last: Conv,
    classifier: Conv,
}

impl PspNet {
    /// From the two files' bytes.
    ///
    /// Errors: a tensor is missing, superfluous or of another shape, by name.
    pub fn new(encoder: &[u8], decoder: &[u8]) -> Result<Self> {
        let mut r = Reader::new(encoder, "resnet50dilated encoder")?;
        let mut stem = Vec::new();
        let mut inputs = 3;
        for i in 1..=3 {
            stem.push(r.conv(&format!("conv{i}"), Some(&format!("bn{i}")), inputs, if i == 1 { 2 } else { 1 }, 1)?);
            inputs = stem[i - 1].outputs();
        }
        let mut stages = Vec::new();
        for (s, (blocks, _)) in STAGES.iter().enumerate() {
            for b in 0..*blocks {
                let name = |part: &str| format!("layer{}.{b}.{part}", s + 1);
                // At /8 strides become dilations: 2 in the third stage, 4 in the fourth, each beginning with half of it.
                let (stride, dilation) = match (s, b) {
                    (1, 0) => (2, 1),
                    (2, 0) => (1, 1),
                    (2, _) | (3, 0) => (1, 2),
                    (3, _) => (1, 4),
                    _ => (1, 1),
                };
                let first = r.conv(&name("conv1"), Some(&name("bn1")), inputs, 1, 1)?;
                let second = r.conv(&name("conv2"), Some(&name("bn2")), first.outputs(), stride, dilation)?;
                let third = r.conv(&name("conv3"), Some(&name("bn3")), second.outputs(), 1, 1)?;
                let shortcut = match b {
                    0 => Some(r.conv(&name("downsample.0"), Some(&name("downsample.1")), inputs, stride, 1)?),
                    _ => None,
                };
                inputs = third.outputs();
                ensure!(shortcut.as_ref().is_none_or(|s| s.outputs() == inputs), "weights: {} does not fit", name("downsample"));
                stages.push(Bottleneck { convs: [first, second, third], shortcut });
            }
        }
        r.finish(|n| n.starts_with("fc."))?;
        let mut r = Reader::new(decoder, "ppm_deepsup decoder")?;
        let mut pyramid = Vec::new();
        for i in 0..POOLS.len() {
            pyramid.push(r.conv(&format!("ppm.{i}.1"), Some(&format!("ppm.{i}.2")), inputs, 1, 1)?);
        }
        let joined = inputs + pyramid.iter().map(Conv::outputs).sum::<usize>();
        let last = r.conv("conv_last.0", Some("conv_last.1"), joined, 1, 1)?;
        let classifier = r.conv("conv_last.4", None, last.outputs(), 1, 1)?;
        // The auxiliary head of training.
        r.finish(|n| n.starts_with("cbr_deepsup.") || n.starts_with("conv_last_deepsup."))?;
        Ok(Self { stem, stages, pyramid, last, classifier })
    }
}

impl Segmenter for PspNet {
    fn classes(&self) -> usize {
        self.classifier.outputs()
    }

    fn logits(&self, x: &Map) -> Result<Map> {
        let mut x = x.clone();
        for conv in &self.stem {
            x = conv.forward(&x)?.relu();
        }
        x = x.pool3(true);
        for block in &self.stages {
            let mut y = block.convs[0].forward(&x)?.relu();
            y = block.convs[1].forward(&y)?.relu();
            y = block.convs[2].forward(&y)?;
            x = match &block.shortcut {
                Some(s) => y.plus(&s.forward(&x)?),
                None => y.plus(&x),
            }
            .relu();
        }
        let mut all = vec![x.clone()];
        for (pool, conv) in POOLS.iter().zip(&self.pyramid) {
            all.push(conv.forward(&x.adaptive_mean(*pool, *pool))?.relu().resize(x.height, x.width, false));
        }
        let joined = Map::cat(&all.iter().collect::<Vec<_>>());
        self.classifier.forward(&self.last.forward(&joined)?.relu())
    }

    fn aligned(&self) -> bool {
        false
    }
}
