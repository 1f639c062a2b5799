use structvpr_training::world::{render::*, condition::*, World};
use nalgebra::Vector3;
fn main() {
    let w = World::new(7); let r = Renderer::new(Lens::new(640, 480));
    for (i, n) in NAMES.iter().enumerate() {
        let c = Condition::named(n).unwrap();
        let t = w.traffic(i as u64);
        let (p, yaw) = w.route.at(40.0, -1.6 + i as f64 * 0.5);
        let st = std::time::Instant::now();
        let f = r.render(&w, &t, &c, &CameraPose { position: Vector3::new(p.x, p.y, 1.6), yaw, pitch: 0.0 }, 3.0, 5);
        println!("{n} {:?}", st.elapsed());
        std::fs::write(format!("/tmp/r_{n}.png"), f.image.to_png().unwrap()).unwrap();
    }
    for (i, s) in [0.0, 100.0, 150.0, 200.0, 250.0].iter().enumerate() {
        let (p, yaw) = w.route.at(*s, -1.6);
        let f = r.render(&w, &w.traffic(9), &Condition::named("sun").unwrap(), &CameraPose { position: Vector3::new(p.x, p.y, 1.6), yaw, pitch: 0.0 }, 3.0, 5);
        std::fs::write(format!("/tmp/s_{i}.png"), f.image.to_png().unwrap()).unwrap();
    }
}
