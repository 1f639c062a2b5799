//! What surfaces look like: colour, light of their own, holes.

use super::condition::Condition;
use super::noise::{fractal, unit, value};
use super::Material;
use nalgebra::Vector3;

type Rgb = Vector3<f32>;

/// Colour under white light and light of its own.
pub struct Surface {
    pub albedo: Rgb,
    pub emission: Rgb,
}

fn plain(albedo: Rgb) -> Surface {
    Surface { albedo, emission: Rgb::zeros() }
}

/// Wall colours: plaster, brick, concrete, sandstone, painted.
const PALETTE: [[f32; 3]; 12] = [
    [0.62, 0.56, 0.45],
    [0.45, 0.20, 0.14],
    [0.52, 0.51, 0.49],
    [0.70, 0.63, 0.50],
    [0.38, 0.42, 0.47],
    [0.74, 0.72, 0.68],
    [0.56, 0.36, 0.24],
    [0.33, 0.16, 0.12],
    [0.66, 0.50, 0.32],
    [0.44, 0.52, 0.46],
    [0.58, 0.40, 0.40],
    [0.28, 0.29, 0.31],
];

/// Paints of cars, awnings, signs and clothes.
const PAINT: [[f32; 3]; 10] = [
    [0.70, 0.05, 0.05],
    [0.05, 0.15, 0.50],
    [0.75, 0.75, 0.75],
    [0.04, 0.04, 0.05],
    [0.30, 0.31, 0.33],
    [0.05, 0.32, 0.14],
    [0.75, 0.55, 0.08],
    [0.55, 0.57, 0.60],
    [0.20, 0.08, 0.25],
    [0.80, 0.30, 0.06],
];

fn pick(table: &[[f32; 3]], k: i64, seed: u64) -> Rgb {
    let i = (unit(k, 0, seed) * table.len() as f32) as usize;
    let c = table[i.min(table.len() - 1)];
    let shade = 0.8 + 0.4 * unit(k, 1, seed);
    Rgb::new(c[0], c[1], c[2]) * shade
}

/// Whether (u, v) of a material is solid.
pub fn solid(material: &Material, u: f32, v: f32, condition: &Condition) -> bool {
    match material {
        Material::Crown { seed } => {
            let (x, y) = (2.0 * u - 1.0, 2.0 * v - 1.0);
            let edge = 0.62 + 0.38 * value(x * 3.0 + 9.0, y * 3.0 + 9.0, *seed);
            let inside = x * x + y * y < edge * edge;
            let gaps = value(u * 22.0, v * 22.0, seed ^ 5);
            // Bare branches stay where leaves are gone.
            let branch = value(u * 30.0, v * 7.0, seed ^ 6) > 0.78;
            inside && (gaps < 0.25 + 0.7 * condition.leaves || branch)
        }
        Material::Fence { .. } => v > 0.88 || (u * 60.0).fract() < 0.35 || (0.1..0.2).contains(&v),
        Material::Person { .. } => {
            let x = (2.0 * u - 1.0).abs();
            let head = x * x * 0.9 + ((v - 0.92) / 0.09).powi(2) * 0.16 < 0.16;
            let body = (0.45..0.84).contains(&v) && x < 0.72;
            let legs = v < 0.46 && (0.06..0.5).contains(&x);
            head || body || legs
        }
        Material::Sign { seed } => {
            let (x, y) = (2.0 * u - 1.0, 2.0 * v - 1.0);
            match (unit(3, 3, *seed) * 3.0) as u32 {
                0 => x * x + y * y < 1.0,
                1 => y < 1.0 - 2.0 * x.abs(),
                _ => true,
            }
        }
        Material::Body { face: 1, .. } => {
            // Wheel arches.
            let wheel = |c: f32| ((u - c) * 4.4).powi(2) + (v * 0.75).powi(2) < 0.1;
            !(wheel(0.2) || wheel(0.8)) || v < 0.3
        }
        _ => true,
    }
}

/// The look of (u, v) on a material. `footprint`: metres per pixel there.
pub fn surface(material: &Material, u: f32, v: f32, footprint: f32, condition: &Condition) -> Surface {
    match *material {
        Material::Facade { seed, width, height } => facade(seed, u * width, v * height, width, height, footprint, condition),
        Material::Wall { seed } => plain(pick(&PALETTE, 0, seed) * (0.7 + 0.4 * fractal(u * 6.0, v * 9.0, footprint, seed))),
        Material::Crown { seed } => {
            let green = Rgb::new(0.10, 0.20, 0.05) + Rgb::new(0.10, 0.06, 0.0) * unit(1, 1, seed);
            let bare = Rgb::new(0.16, 0.13, 0.10);
            let colour = green * condition.leaves + bare * (1.0 - condition.leaves);
            let white = if value(u * 14.0, v * 14.0, seed ^ 8) < condition.snow * (0.3 + 0.6 * v) { 0.6 } else { 0.0 };
            plain(colour * (0.4 + 1.1 * value(u * 16.0, v * 16.0, seed ^ 7) * (0.5 + 0.5 * v)) + Rgb::repeat(white))
        }
        Material::Trunk => plain(Rgb::new(0.16, 0.12, 0.09) * (0.6 + 0.6 * value(u * 5.0, v * 12.0, 17))),
        Material::Hedge { seed } => {
            let white = if v > 0.85 { condition.snow * 0.7 } else { 0.0 };
            plain(Rgb::new(0.09, 0.17, 0.05) * (0.5 + value(u * 90.0, v * 9.0, seed)) + Rgb::repeat(white))
        }
        Material::Fence { seed } => plain(pick(&PALETTE, 5, seed) * 0.6),
        Material::Pole => plain(Rgb::repeat(0.16)),
        Material::Lamp => {
            Surface { albedo: Rgb::repeat(0.5), emission: if condition.lights { Rgb::new(3.0, 2.3, 1.3) } else { Rgb::zeros() } }
        }
        Material::Sign { seed } => {
            let border = u.min(1.0 - u).min(v).min(1.0 - v) < 0.12;
            let glyph = unit((u * 5.0) as i64, (v * 5.0) as i64, seed) > 0.6;
            let paint = pick(&PAINT, 2, seed);
            plain(if border || glyph { paint } else { Rgb::repeat(0.75) })
        }
        Material::Body { seed, face } => {
            let paint = pick(&PAINT, 1, seed);
            if face == 1 && v < 0.45 && [0.2f32, 0.8].iter().any(|c| (u - c).abs() < 0.09) {
                return plain(Rgb::repeat(0.02));
            }
            let lamp = face == 0 && (0.4..0.75).contains(&v) && (u - 0.5).abs() > 0.3;
            let emission = if lamp && condition.lights { Rgb::new(1.2, 0.5, 0.3) } else { Rgb::zeros() };
            let white = if face == 2 { condition.snow * 0.7 } else { 0.0 };
            Surface { albedo: paint * (0.8 + 0.2 * v) * (1.0 - white) + Rgb::repeat(white * 0.9), emission }
        }
        Material::Cabin { seed, face } => {
            if face == 2 {
                let white = condition.snow * 0.8;
                return plain(pick(&PAINT, 1, seed) * (1.0 - white) + Rgb::repeat(white * 0.9));
            }
            let glass = (0.12..0.82).contains(&v) && (0.06..0.94).contains(&u) && !(0.48..0.52).contains(&u);
            plain(if glass { Rgb::new(0.05, 0.07, 0.08) } else { pick(&PAINT, 1, seed) })
        }
        Material::Person { seed } => plain(if v > 0.83 {
            Rgb::new(0.42, 0.28, 0.20)
        } else if v > 0.45 {
            pick(&PAINT, 3, seed)
        } else {
            pick(&PAINT, 4, seed) * 0.5
        }),
    }
}

/// `x`, `y` in metres from the lower left corner.
fn facade(seed: u64, x: f32, y: f32, width: f32, height: f32, footprint: f32, condition: &Condition) -> Surface {
    let r = |k: i64| unit(k, 11, seed);
    let wall = pick(&PALETTE, 0, seed);
    let trim = pick(&PALETTE, 4, seed);
    let stain = 0.75 + 0.5 * fractal(x * 0.5, y * 0.35, footprint, seed ^ 3);
    let mut base = wall * stain;
    if r(1) < 0.4 {
        // Courses of brick or stone, gone where a pixel is wider than they are.
        let course = 0.22 + 0.3 * r(2);
        let fade = (1.0 - footprint / course * 1.6).clamp(0.0, 1.0);
        let row = (y / course).floor();
        let shade = unit((x / (2.4 * course) + 0.5 * (row % 2.0)) as i64, row as i64, seed ^ 4);
        let joint = ((y / course).fract() < 0.14) as u32 as f32;
        base *= 1.0 + fade * (0.35 * (shade - 0.5) - 0.3 * joint);
    }
    if y > height - (0.3 + 0.5 * r(3)) {
        return plain(trim * 0.7);
    }
    let ground = 3.2 + 0.9 * r(4);
    let shop = r(5) < 0.55;
    if y < ground {
        if !shop {
            let door = r(6) * (width - 1.2);
            if (door..door + 1.1).contains(&x) && y < 2.3 {
                return plain(pick(&PAINT, 6, seed) * 0.7);
            }
        } else {
            if y > ground - 0.75 {
                // The shop's name: blocks in place of letters.
                let letter = (x / 0.42) as i64;
                let part = (((x / 0.42).fract() * 3.0) as i64, ((y - ground + 0.75) / 0.75 * 5.0) as i64);
                let inside = letter > 0 && (letter as f32) < 0.6 * width / 0.42 && (1..4).contains(&part.1);
                let ink = inside && unit(part.0 + 3 * letter, part.1, seed ^ 9) > 0.45;
                let (paint, paper) = (pick(&PAINT, 7, seed), pick(&PAINT, 8, seed));
                let glow = if condition.lights && r(7) < 0.6 { 0.55 } else { 0.0 };
                let colour = if ink { Rgb::repeat(0.85) } else { (paint + paper) * 0.5 };
                return Surface { albedo: colour, emission: colour * glow };
            }
            if r(8) < 0.5 && y > ground - 1.5 {
                let stripe = ((x / 0.35) as i64 % 2 == 0) as u32 as f32;
                return plain(pick(&PAINT, 9, seed) * (0.5 + 0.5 * stripe) + Rgb::repeat(0.3 * (1.0 - stripe)));
            }
            let pane = 1.2 + 1.6 * r(9);
            let (fx, frame) = ((x / pane).fract(), 0.07);
            if y > 0.5 && fx > frame && fx < 1.0 - frame {
                let goods = fractal(x * 1.3, y * 1.3, footprint, seed ^ 12);
                let lit = if condition.lights { 0.5 + 0.4 * r(10) } else { 0.0 };
                let colour = Rgb::new(0.16, 0.15, 0.13) + pick(&PAINT, 12 + (x / pane) as i64, seed) * 0.5 * goods;
                return Surface { albedo: colour, emission: colour.component_mul(&Rgb::new(2.2, 1.8, 1.2)) * lit };
            }
        }
        return plain(base * 0.8);
    }
    let (floor, column) = (2.7 + 0.9 * r(13), 1.5 + 2.2 * r(14));
    let (fy, fx) = ((y - ground) / floor, x / column);
    let (wx, wy) = (0.14 + 0.16 * r(15), 0.16 + 0.12 * r(16));
    let (iu, iv) = (fx.fract(), fy.fract());
    if iv < 0.05 + 0.06 * r(17) && r(18) < 0.6 {
        return plain(trim);
    }
    let inside = iu > wx && iu < 1.0 - wx && iv > wy && iv < 1.0 - wy * 0.7 && (fy.floor() + 1.0) * floor + ground < height;
    if inside {
        let cell = (fx as i64, fy as i64);
        let edge = (iu - wx).min(1.0 - wx - iu) * column;
        let mullion = (iu - 0.5).abs() * column < 0.045 || edge < 0.08;
        if mullion {
            return plain(trim * 1.1);
        }
        let curtain = unit(cell.0, cell.1, seed ^ 21) < 0.3;
        let glass = if curtain { Rgb::repeat(0.45) } else { Rgb::new(0.07, 0.09, 0.11) + condition.horizon * 0.18 * iv };
        let lit = condition.lights && unit(cell.0, cell.1, seed ^ 22) < 0.35;
        let warm = Rgb::new(0.9, 0.68, 0.36) * (0.25 + 0.5 * unit(cell.0, cell.1, seed ^ 23));
        return Surface { albedo: glass, emission: if lit { warm } else { Rgb::zeros() } };
    }
    let sill = iv > wy - 0.07 && iv <= wy && iu > wx - 0.04 && iu < 1.0 - wx + 0.04;
    if sill {
        return plain(trim * (1.0 - condition.snow) + Rgb::repeat(0.85 * condition.snow));
    }
    plain(base)
}
