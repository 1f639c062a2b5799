//! ESPNetv2 (<https://arxiv.org/abs/1811.11431>) with its segmentation decoder: a small segmenter that a CPU runs, in the
//! layout of the authors' Cityscapes checkpoints.

use super::layers::{Conv, Map, Norm, Reader};
use super::Segmenter;
use anyhow::Result;

/// Branches of an EESP unit.
const K: usize = 4;
/// Scales of the pyramid pools.
const SCALES: [f64; 5] = [2.0, 1.5, 1.0, 0.5, 0.1];
/// Smallest side of a pyramid's map.
const LEAST: usize = 5;
/// Units of the third and the fourth level.
const UNITS: [usize; 2] = [3, 7];

struct Unit {
    project: Conv,
    project_act: Vec<f32>,
    branches: Vec<Conv>,
    norm: Norm,
    norm_act: Vec<f32>,
    expand: Conv,
    act: Vec<f32>,
}

impl Unit {
    fn new(r: &mut Reader, name: &str, inputs: usize, stride: usize, dilations: [usize; K]) -> Result<Self> {
        let part = |p: &str| format!("{name}.{p}");
        let project = r.conv(&part("proj_1x1.conv"), Some(&part("proj_1x1.bn")), inputs, 1, 1)?;
        let n = project.outputs();
        let project_act = r.take(&part("proj_1x1.act.weight"), &[n])?.1;
        let mut branches = Vec::new();
        for (i, d) in dilations.iter().enumerate() {
            branches.push(r.conv(&part(&format!("spp_dw.{i}.conv")), None, n, stride, *d)?);
        }
        let norm = r.norm(&part("br_after_cat.bn"), K * n)?;
        let norm_act = r.take(&part("br_after_cat.act.weight"), &[K * n])?.1;
        let expand = r.conv(&part("conv_1x1_exp.conv"), Some(&part("conv_1x1_exp.bn")), K * n, 1, 1)?;
        let act = r.take(&part("module_act.weight"), &[expand.outputs()])?.1;
        Ok(Self { project, project_act, branches, norm, norm_act, expand, act })
    }

    fn forward(&self, x: &Map, down: bool) -> Result<Map> {
        let reduced = self.project.forward(x)?.prelu(&self.project_act);
        let mut all: Vec<Map> = Vec::new();
        for branch in &self.branches {
            let y = branch.forward(&reduced)?;
            all.push(match all.last() {
                Some(before) => y.plus(before),
                None => y,
            });
        }
        let joined = Map::cat(&all.iter().collect::<Vec<_>>()).affine(&self.norm).prelu(&self.norm_act);
        let y = self.expand.forward(&joined)?;
        if down {
            return Ok(y);
        }
        let y = if (y.channels, y.plane()) == (x.channels, x.plane()) { y.plus(x) } else { y };
        Ok(y.prelu(&self.act))
    }
}

/// A convolution, its norm folded, and a PReLU.
struct Cbr(Conv, Vec<f32>);

impl Cbr {
    fn new(r: &mut Reader, [conv, norm, act]: [String; 3], inputs: usize, stride: usize) -> Result<Self> {
        let conv = r.conv(&conv, Some(&norm), inputs, stride, 1)?;
        let act = r.take(&format!("{act}.weight"), &[conv.outputs()])?.1;
        Ok(Self(conv, act))
    }

    fn forward(&self, x: &Map) -> Result<Map> {
        Ok(self.0.forward(x)?.prelu(&self.1))
    }
}

struct Down {
    unit: Unit,
    image: Cbr,
    image_expand: Conv,
    act: Vec<f32>,
}

impl Down {
    fn new(r: &mut Reader, name: &str, inputs: usize) -> Result<Self> {
        let part = |p: &str| format!("{name}.{p}");
        let unit = Unit::new(r, &part("eesp"), inputs, 2, [1, 2, 3, 4])?;
        let image = Cbr::new(r, ["conv", "bn", "act"].map(|p| part(&format!("inp_reinf.0.{p}"))), 3, 1)?;
        let image_expand = r.conv(&part("inp_reinf.1.conv"), Some(&part("inp_reinf.1.bn")), 3, 1, 1)?;
        let act = r.take(&part("act.weight"), &[image_expand.outputs()])?.1;
        Ok(Self { unit, image, image_expand, act })
    }

    fn forward(&self, x: &Map, image: &Map) -> Result<Map> {
        let mean = x.pool3(false);
        let joined = Map::cat(&[&mean, &self.unit.forward(x, true)?]);
        let mut small = image.pool3(false);
        while small.height > mean.height {
            small = small.pool3(false);
        }
        let reinforced = self.image_expand.forward(&self.image.forward(&small)?)?;
        Ok(joined.plus(&reinforced).prelu(&self.act))
    }
}

struct Pyramid {
    project: Cbr,
    stages: Vec<Conv>,
    norm: Norm,
    norm_act: Vec<f32>,
    merge: Cbr,
    out: Conv,
    last: Option<(Norm, Vec<f32>)>,
}

impl Pyramid {
    fn new(r: &mut Reader, name: &str, inputs: usize, last: bool) -> Result<Self> {
        let part = |p: &str| format!("{name}.{p}");
        let project = Cbr::new(r, [0, 1, 2].map(|i| part(&format!("projection_layer.cbr.{i}"))), inputs, 1)?;
        let n = project.0.outputs();
        let mut stages = Vec::new();
        for i in 0..SCALES.len() {
            stages.push(r.conv(&part(&format!("stages.{i}")), None, n, 1, 1)?);
        }
        let norm = r.norm(&part("merge_layer.0.br.0"), SCALES.len() * n)?;
        let norm_act = r.take(&part("merge_layer.0.br.1.weight"), &[SCALES.len() * n])?.1;
        let merge = Cbr::new(r, [0, 1, 2].map(|i| part(&format!("merge_layer.2.cbr.{i}"))), SCALES.len() * n, 1)?;
        let out = r.conv(&part("merge_layer.3"), None, n, 1, 1)?;
        let last = match last {
            true => None,
            false => Some((r.norm(&part("br.br.0"), out.outputs())?, r.take(&part("br.br.1.weight"), &[out.outputs()])?.1)),
        };
        Ok(Self { project, stages, norm, norm_act, merge, out, last })
    }

    fn forward(&self, x: &Map) -> Result<Map> {
        let x = self.project.forward(x)?;
        let mut all = Vec::new();
        for (scale, stage) in SCALES.iter().zip(&self.stages) {
            let side = |n: usize| ((n as f64 * scale).ceil() as usize).max(LEAST);
            let (h, w) = (side(x.height), side(x.width));
            all.push(if *scale < 1.0 {
                stage.forward(&x.adaptive_mean(h, w))?.resize(x.height, x.width, true)
            } else if *scale > 1.0 {
                stage.forward(&x.resize(h, w, true))?.adaptive_mean(x.height, x.width)
            } else {
                stage.forward(&x)?
            });
        }
        let joined = Map::cat(&all.iter().collect::<Vec<_>>()).affine(&self.norm).prelu(&self.norm_act);
        // A shuffle over the pyramid's maps: channel c of every map side by side.
        let (groups, n, plane) = (SCALES.len(), x.channels, joined.plane());
        let mut shuffled = Map::zeros(joined.channels, joined.height, joined.width);
        for (at, out) in shuffled.data.chunks_exact_mut(plane).enumerate() {
            out.copy_from_slice(&joined.data[(at % groups * n + at / groups) * plane..][..plane]);
        }
        let y = self.out.forward(&self.merge.forward(&shuffled)?)?;
        Ok(match &self.last {
            Some((norm, act)) => y.affine(norm).prelu(act),
            None => y,
        })
    }
}

struct Merge {
    weigh: Conv,
    expand: Cbr,
    norm: Norm,
    act: Vec<f32>,
}

impl Merge {
    fn new(r: &mut Reader, level: usize, inputs: usize) -> Result<Self> {
        let part = |p: &str| format!("merge_enc_dec_l{level}.{p}");
        let weigh = r.conv(&part("wt_layer.1"), None, inputs, 1, 1)?;
        let expand = Cbr::new(r, [0, 1, 2].map(|i| part(&format!("expansion_layer.cbr.{i}"))), inputs, 1)?;
        let n = weigh.outputs();
        Ok(Self {
            weigh,
            expand,
            norm: r.norm(&format!("bu_br_l{level}.0"), n)?,
            act: r.take(&format!("bu_br_l{level}.1.weight"), &[n])?.1,
        })
    }

    fn forward(&self, encoded: &Map, decoded: &Map) -> Result<Map> {
        let weights = self.weigh.forward(&encoded.adaptive_mean(1, 1))?;
        let gates: Vec<f32> = weights.data.iter().map(|v| 1.0 / (1.0 + (-v).exp())).collect();
        let own = self.expand.forward(encoded)?.each(|c, p| p.iter_mut().for_each(|v| *v *= gates[c]));
        let up = decoded.resize(2 * decoded.height, 2 * decoded.width, true);
        Ok(own.plus(&up).affine(&self.norm).prelu(&self.act))
    }
}

/// The network.
pub struct EspNetV2 {
    first: Cbr,
    downs: Vec<Down>,
    thirds: Vec<Unit>,
    fourths: Vec<Unit>,
    pyramids: Vec<Pyramid>,
    merges: Vec<Merge>,
}

impl EspNetV2 {
    /// From a file's bytes.
    ///
    /// Errors: a tensor is missing, superfluous or of another shape, by name.
    pub fn new(bytes: &[u8]) -> Result<Self> {
        let mut r = Reader::new(bytes, "ESPNetv2 segmentation")?;
        let first = Cbr::new(&mut r, ["conv", "bn", "act"].map(|p| format!("base_net.level1.{p}")), 3, 2)?;
        let mut channels = vec![first.0.outputs()];
        let mut downs = Vec::new();
        for level in 2..=4 {
            downs.push(Down::new(&mut r, &format!("base_net.level{level}_0"), channels[level - 2])?);
            channels.push(downs[level - 2].image_expand.outputs());
        }
        let mut units = |level: usize, dilations| -> Result<Vec<Unit>> {
            (0..UNITS[level - 3])
                .map(|i| Unit::new(&mut r, &format!("base_net.level{level}.{i}"), channels[level - 1], 1, dilations))
                .collect()
        };
        let (thirds, fourths) = (units(3, [1, 2, 3, 4])?, units(4, [1, 1, 2, 3])?);
        let mut pyramids = Vec::new();
        let mut merges = Vec::new();
        let mut inputs = channels[3];
        for level in 1..=4 {
            pyramids.push(Pyramid::new(&mut r, &format!("bu_dec_l{level}"), inputs, level == 4)?);
            inputs = pyramids[level - 1].out.outputs();
            if level < 4 {
                merges.push(Merge::new(&mut r, level + 1, channels[3 - level])?);
            }
        }
        r.finish(|n| n.contains("level5") || n.contains("classifier"))?;
        Ok(Self { first, downs, thirds, fourths, pyramids, merges })
    }
}

impl Segmenter for EspNetV2 {
    fn classes(&self) -> usize {
        self.pyramids[3].out.outputs()
    }

    fn logits(&self, image: &Map) -> Result<Map> {
        let first = self.first.forward(image)?;
        let second = self.downs[0].forward(&first, image)?;
        let mut third = self.downs[1].forward(&second, image)?;
        for unit in &self.thirds {
            third = unit.forward(&third, false)?;
        }
        let mut fourth = self.downs[2].forward(&third, image)?;
        for unit in &self.fourths {
            fourth = unit.forward(&fourth, false)?;
        }
        let mut x = self.pyramids[0].forward(&fourth)?;
        for ((merge, pyramid), encoded) in self.merges.iter().zip(&self.pyramids[1..]).zip([&third, &second, &first]) {
            x = pyramid.forward(&merge.forward(encoded, &x)?)?;
        }
        Ok(x)
    }

    fn aligned(&self) -> bool {
        true
    }
}
