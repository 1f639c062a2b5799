//! AdamW over flat variables, with a state that a checkpoint can hold.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use rayon::prelude::*;

/// Settings of [`AdamW`] (<https://arxiv.org/abs/1711.05101>); the defaults are PyTorch's but for the decay [paper: 1e-4].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-4 }
    }
}

/// One variable: its two moments, and which of its values decay.
struct Slot {
    var: Var,
    decays: Vec<std::ops::Range<usize>>,
    first: Vec<f32>,
    second: Vec<f32>,
}

/// AdamW.
pub struct AdamW {
    settings: Settings,
    slots: Vec<Slot>,
    steps: u64,
}

/// First and second moments of a variable.
pub type Moments<'a> = (&'a [f32], &'a [f32]);

/// Values per task.
const CHUNK: usize = 1 << 14;

impl AdamW {
    /// Over variables of one dimension (or any, contiguous), each with the ranges of its values that decay.
    pub fn new(settings: Settings, vars: Vec<(Var, Vec<std::ops::Range<usize>>)>) -> Self {
        let slot = |(var, decays): (Var, Vec<_>)| {
            let n = var.elem_count();
            Slot { var, decays, first: vec![0.0; n], second: vec![0.0; n] }
        };
        Self { settings, slots: vars.into_iter().map(slot).collect(), steps: 0 }
    }

    /// One step at learning rate `lr`. A variable without a gradient stays as it is.
    pub fn step(&mut self, grads: &GradStore, lr: f64) -> Result<()> {
        let each = self.slots.iter().map(|s| grads.get(&s.var).map(|g| g.contiguous()?.flatten_all()?.to_vec1::<f32>()).transpose());
        let grads = each.collect::<Result<Vec<_>>>()?;
        self.apply(&grads, lr)
    }

    /// One step from gradients in the variables' order.
    pub fn apply(&mut self, grads: &[Option<Vec<f32>>], lr: f64) -> Result<()> {
        self.steps += 1;
        let Settings { beta1, beta2, eps, weight_decay } = self.settings;
        let scale1 = 1.0 - beta1.powf(self.steps as f64);
        let scale2 = 1.0 - beta2.powf(self.steps as f64);
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            let Some(grad) = grad else { continue };
            let mut values = slot.var.flatten_all()?.to_vec1::<f32>()?;
            for range in &slot.decays {
                let keep = (1.0 - lr * weight_decay) as f32;
                values[range.clone()].iter_mut().for_each(|v| *v *= keep);
            }
            let (b1, b2, size, eps) = (beta1 as f32, beta2 as f32, (lr / scale1) as f32, eps as f32);
            let root = (1.0 / scale2.sqrt()) as f32;
            values
                .par_chunks_mut(CHUNK)
                .zip(slot.first.par_chunks_mut(CHUNK))
                .zip(slot.second.par_chunks_mut(CHUNK))
                .zip(grad.par_chunks(CHUNK))
                .for_each(|(((v, m), s), g)| {
                    for (((v, m), s), g) in v.iter_mut().zip(m).zip(s).zip(g) {
                        *m = b1 * *m + (1.0 - b1) * g;
                        *s = b2 * *s + (1.0 - b2) * g * g;
                        *v -= size * *m / (s.sqrt() * root + eps);
                    }
                });
            slot.var.set(&Tensor::from_vec(values, slot.var.shape(), slot.var.device())?)?;
        }
        Ok(())
    }

    /// The variables, in order.
    pub fn vars(&self) -> impl Iterator<Item = &Var> {
        self.slots.iter().map(|s| &s.var)
    }

    /// Steps taken, and each variable's two moments.
    pub fn state(&self) -> (u64, Vec<Moments<'_>>) {
        (self.steps, self.slots.iter().map(|s| (&s.first[..], &s.second[..])).collect())
    }

    /// Puts a state back.
    ///
    /// Errors: another number of variables or values.
    pub fn restore(&mut self, steps: u64, moments: Vec<(Vec<f32>, Vec<f32>)>) -> Result<()> {
        if moments.len() != self.slots.len() {
            candle_core::bail!("optimiser: {} variables, the state has {}", self.slots.len(), moments.len());
        }
        for (slot, (first, second)) in self.slots.iter_mut().zip(moments) {
            if (first.len(), second.len()) != (slot.first.len(), slot.second.len()) {
                candle_core::bail!("optimiser: a variable of {} values, the state has {}", slot.first.len(), first.len());
            }
            (slot.first, slot.second) = (first, second);
        }
        self.steps = steps;
        Ok(())
    }
}

/// `from` falling to zero along a cosine, at step `step` of `steps` [paper].
pub fn cosine(from: f64, step: usize, steps: usize) -> f64 {
    from * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps.max(1) as f64).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_nn::optim::{AdamW as Candles, Optimizer, ParamsAdamW};

    #[test]
    fn equals_candles_step_by_step_and_a_restored_state_goes_on_alike() {
        let start: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let var = |v: &[f32]| Var::from_vec(v.to_vec(), v.len(), &Device::Cpu).unwrap();
        let (ours, theirs) = (var(&start), var(&start));
        let mut a = AdamW::new(Settings { weight_decay: 0.01, ..Settings::default() }, vec![(ours.clone(), vec![0..50])]);
        let params = ParamsAdamW { lr: 0.05, weight_decay: 0.01, ..ParamsAdamW::default() };
        let mut b = Candles::new(vec![theirs.clone()], params).unwrap();
        let loss = |v: &Var| (v.as_tensor() - 0.3).unwrap().sqr().unwrap().sqr().unwrap().sum_all().unwrap();
        for _ in 0..20 {
            a.step(&loss(&ours).backward().unwrap(), 0.05).unwrap();
            b.backward_step(&loss(&theirs)).unwrap();
        }
        let (x, y) = (ours.to_vec1::<f32>().unwrap(), theirs.to_vec1::<f32>().unwrap());
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5), "{x:?} {y:?}");
        let again = var(&x);
        let mut c = AdamW::new(Settings { weight_decay: 0.01, ..Settings::default() }, vec![(again.clone(), vec![0..50])]);
        let (steps, moments) = a.state();
        c.restore(steps, moments.into_iter().map(|(m, v)| (m.to_vec(), v.to_vec())).collect()).unwrap();
        for (opt, v) in [(&mut a, &ours), (&mut c, &again)] {
            opt.step(&loss(v).backward().unwrap(), 0.05).unwrap();
        }
        assert_eq!(ours.to_vec1::<f32>().unwrap(), again.to_vec1::<f32>().unwrap());
        assert!(c.restore(1, Vec::new()).unwrap_err().to_string().contains("1 variables"));
    }

    #[test]
    fn the_cosine_begins_at_its_height_and_ends_at_zero() {
        assert_eq!(cosine(2.0, 0, 10), 2.0);
        assert!((cosine(2.0, 5, 10) - 1.0).abs() < 1e-12 && cosine(2.0, 10, 10).abs() < 1e-12);
    }
}
