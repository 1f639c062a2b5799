//! `structvpr map`: what is in a map file, is it sound, and how to make one of several, a smaller one, or another format.

use crate::common::write_json;
use anyhow::{bail, ensure, Context, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use structvpr::error::write_file;
use structvpr::eval::{write_npy, write_npy_i64, zip_npy, Matrix};
use structvpr::map::{g2o, json, salvage, tum, Account, Edges, Map};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Say what a map holds: model, sessions, keyframes, closures. Works while a node is writing it.
    Info {
        /// The map.
        map: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Look at every page, row and checksum. Exit code 1 if anything is damaged.
    Verify {
        /// The maps.
        #[arg(required = true)]
        maps: Vec<PathBuf>,
        /// As JSON, one object per map.
        #[arg(long)]
        json: bool,
    },
    /// Write one map of several; sessions are numbered on, closures stay.
    Merge {
        /// The maps, in the order of their sessions; all of one model.
        #[arg(required = true, num_args = 2..)]
        maps: Vec<PathBuf>,
        /// The new map.
        #[arg(long)]
        out: PathBuf,
    },
    /// Write a smaller map: fewer keyframes that cover the same places, some sessions only, or what is sound of a damaged map.
    Prune {
        /// The map.
        map: PathBuf,
        /// The new map; may be the old one, which is then replaced.
        #[arg(long)]
        out: PathBuf,
        /// Keep at most so many keyframes: those go that are most alike to their neighbours along the drive.
        #[arg(long)]
        max_keyframes: Option<usize>,
        /// Keep these sessions only.
        #[arg(long, value_delimiter = ',')]
        sessions: Option<Vec<u32>>,
        /// Leave thumbnails out.
        #[arg(long)]
        no_thumbnails: bool,
        /// Leave local features out.
        #[arg(long)]
        no_features: bool,
        /// Read a damaged map, and keep what is sound.
        #[arg(long)]
        damaged: bool,
    },
    /// Write a map for other tools.
    Export {
        /// The map.
        map: PathBuf,
        /// tum: poses of one session; g2o: pose graph with odometry and closures; npz: descriptors, ids, sessions, stamps, closures;
        /// json: all but descriptors, pictures and features.
        #[arg(long, value_parser = ["tum", "g2o", "npz", "json"])]
        format: String,
        /// The file to write.
        #[arg(long)]
        out: PathBuf,
        /// The session, for tum; may be left out where there is but one.
        #[arg(long)]
        session: Option<u32>,
        /// For g2o: how near a closure's places are, standard deviation, metres.
        #[arg(long, default_value_t = Edges::default().place_m)]
        place_sigma_m: f64,
        /// For g2o: and how alike turned, degrees.
        #[arg(long, default_value_t = Edges::default().place_deg)]
        place_sigma_deg: f64,
    },
}

pub fn run(args: Args) -> Result<ExitCode> {
    match args.action {
        Action::Info { map, json } => {
            let account = Map::account(&map)?;
            match json {
                true => println!("{}", serde_json::to_string_pretty(&account)?),
                false => print(&map, &account),
            }
        }
        Action::Verify { maps, json } => return verify(&maps, json),
        Action::Merge { maps, out } => {
            let mut all = Map::load_any(&maps[0])?;
            for path in &maps[1..] {
                all.merge(&Map::load_any(path)?, 0).map_err(|e| e.at(path))?;
            }
            all.save(&out)?;
            println!("{}: {} keyframes, {} closures of {} maps", out.display(), all.keyframes().len(), all.links().len(), maps.len());
        }
        Action::Prune { map, out, max_keyframes, sessions, no_thumbnails, no_features, damaged } => {
            ensure!(
                damaged || no_thumbnails || no_features || max_keyframes.is_some() || sessions.is_some(),
                "nothing to prune: say --max-keyframes, --sessions, --no-thumbnails, --no-features or --damaged"
            );
            let (mut read, words) = if damaged { salvage(&map)? } else { (Map::load_any(&map)?, Vec::new()) };
            words.iter().for_each(|w| eprintln!("structvpr: {}: {w}", map.display()));
            let before = read.keyframes().len();
            if let Some(sessions) = &sessions {
                let there = |s: &u32| read.keyframes().iter().any(|k| k.session == *s);
                if let Some(missing) = sessions.iter().find(|s| !there(s)) {
                    bail!("{}: no session {missing}; `structvpr map info` lists them", map.display());
                }
                read.keep_sessions(sessions);
            }
            if let Some(most) = max_keyframes {
                ensure!(most > 0, "--max-keyframes must be at least 1");
                read.thin(most);
            }
            if no_thumbnails {
                read.drop_thumbnails();
            }
            if no_features {
                read.drop_features();
            }
            read.save(&out)?;
            println!("{}: {} of {before} keyframes, {} closures", out.display(), read.keyframes().len(), read.links().len());
        }
        Action::Export { map, format, out, session, place_sigma_m, place_sigma_deg } => {
            let read = Map::load_any(&map)?;
            export(&read, &format, &out, session, &Edges { place_m: place_sigma_m, place_deg: place_sigma_deg, ..Edges::default() })
                .with_context(|| map.display().to_string())?;
            println!("{}", out.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn export(map: &Map, format: &str, out: &Path, session: Option<u32>, edges: &Edges) -> Result<()> {
    match format {
        "tum" => {
            let mut all: Vec<u32> = map.keyframes().iter().map(|k| k.session).collect();
            all.dedup();
            let session = match (session, all.as_slice()) {
                (Some(s), _) => s,
                (None, [one]) => *one,
                (None, []) => bail!("the map is empty"),
                (None, many) => bail!("choose one with --session: {}", many.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
            };
            write_file(out, tum(map, session)?.as_bytes())?;
        }
        "g2o" => {
            ensure!(edges.place_m > 0.0 && edges.place_deg > 0.0, "--place-sigma-m and --place-sigma-deg must be above 0");
            write_file(out, g2o(map, edges)?.as_bytes())?;
        }
        "json" => write_json(out, &json(map))?,
        _ => {
            let (rows, index) = (map.keyframes().len(), map.index());
            let cols = if rows == 0 { 0 } else { index.row(0).len() };
            let data = (0..rows).flat_map(|i| index.row(i).iter().map(|v| f64::from(*v))).collect();
            let of = |f: &dyn Fn(usize) -> i64| write_npy_i64(&(0..rows).map(f).collect::<Vec<_>>());
            let ends = |f: &dyn Fn(&structvpr::map::Link) -> usize| {
                write_npy_i64(&map.links().iter().map(|l| map.id_of(f(l)) as i64).collect::<Vec<_>>())
            };
            let arrays = [
                ("descriptors", write_npy(&Matrix { rows, cols, data })),
                ("ids", of(&|i| map.id_of(i) as i64)),
                ("sessions", of(&|i| map.keyframes()[i].session.into())),
                ("robots", of(&|i| map.keyframes()[i].robot.into())),
                ("stamps_ns", of(&|i| map.keyframes()[i].stamp_ns)),
                ("closure_query", ends(&|l| l.query)),
                ("closure_match", ends(&|l| l.matched)),
            ];
            write_file(out, &zip_npy(&arrays)?)?;
        }
    }
    Ok(())
}

fn verify(maps: &[PathBuf], json: bool) -> Result<ExitCode> {
    let mut sound = true;
    for path in maps {
        let verdict = match Map::verify(path) {
            Ok(verdict) => verdict,
            Err(e) => {
                sound = false;
                eprintln!("structvpr: {e}");
                continue;
            }
        };
        sound &= verdict.damage.is_empty();
        if json {
            println!("{}", serde_json::json!({"map": path, "verdict": verdict}));
            continue;
        }
        let n = format!("{} keyframes and {} closures", verdict.keyframes, verdict.closures);
        match verdict.damage.as_slice() {
            [] if verdict.version < structvpr::map::VERSION => {
                println!("{}: {n} can be read (version {} has no checksums)", path.display(), verdict.version);
            }
            [] => println!("{}: sound, {n}", path.display()),
            damage => {
                println!("{}: DAMAGED, {n} are sound (`structvpr map prune --damaged` keeps them)", path.display());
                damage.iter().for_each(|d| println!("  {d}"));
            }
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(path: &Path, a: &Account) {
    println!(
        "{}: map {} (version {}, {:.1} MB{})",
        path.display(),
        a.id,
        a.version,
        a.bytes as f64 / 1e6,
        if a.open { ", being written or not closed in order" } else { "" }
    );
    println!("model       {}", a.model);
    if !a.preprocessing.is_empty() {
        println!("images      {}", a.preprocessing);
    }
    println!("keyframes   {} of {} values; {} with a thumbnail", a.keyframes, a.dimensions, a.thumbnails);
    if a.features > 0 {
        println!("features    {} keyframes, {}", a.features, a.features_of);
    }
    println!("closures    {}, {} of them between sessions", a.closures, a.closures_between_sessions);
    println!("calibration {} cameras", a.calibrations);
    for s in &a.sessions {
        let cameras: Vec<&str> = s.cameras.iter().map(String::as_str).filter(|c| !c.is_empty()).collect();
        let cameras = if cameras.is_empty() { String::new() } else { format!(", cameras {}", cameras.join(", ")) };
        let way = if s.with_pose == 0 { "no odometry".into() } else { format!("{:.0} m by odometry", s.path_m) };
        let lasted = s.last_stamp_ns.saturating_sub(s.first_stamp_ns) as f64 * 1e-9;
        println!(
            "session {:3}  robot {}, {} keyframes in {lasted:.0} s from {:.3}, {way}{cameras}",
            s.session,
            s.robot,
            s.keyframes,
            s.first_stamp_ns as f64 * 1e-9
        );
    }
}
