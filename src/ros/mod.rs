//! The ROS 2 node: convert, call once, publish. The only place that knows r2r; what it does not do
//! itself is in [`crate::live`].
//!
//! Threads: this one spins, hands messages on, and once a second publishes diagnostics; tokio's carry the
//! services; one works on images; one saves the map.

mod convert;
mod diagnostics;
mod names;
mod parameters;
mod publish;
mod services;

use crate::bag::messages::{CameraInfo, CompressedImage, Image, Message, Odometry};
use crate::config::Settings;
use crate::live::Engine;
use diagnostics::{Diagnostics, Input};
use futures::{FutureExt, Stream, StreamExt};
use names::Names;
use publish::Publishers;
use r2r::{Context, Node};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

const USAGE: &str = "\
structvpr_node: visual place recognition and loop closure for ROS 2

usage: structvpr_node [--help | --version] [--ros-args [-r FROM:=TO] [-p NAME:=VALUE] [--params-file FILE] ...]

Subscribes image (sensor_msgs/Image, or image/compressed), camera_info, odom; publishes ~/candidates and more. All parameters
with their meaning are in config/structvpr.yaml; `ros2 param describe` says the same of a running node.";

/// The spinning thread looks up at least this often.
const SPIN: Duration = Duration::from_millis(20);

/// Runs the node until SIGINT or SIGTERM. Exit code 0: ended as asked, with the map saved; 1: it could
/// not start or save; 2: wrong arguments.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let mut of_ros = false;
    for arg in args.iter().skip(1) {
        match arg.as_str() {
            "--ros-args" => of_ros = true,
            "--" => of_ros = false,
            _ if of_ros => {}
            "-h" | "--help" => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            "--version" => {
                println!("structvpr_node {} (ROS 2 {})", env!("CARGO_PKG_VERSION"), r2r::ROS_DISTRO);
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("structvpr_node: unknown argument `{other}`\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    match start(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            e.tell();
            ExitCode::FAILURE
        }
    }
}

/// Why the node ends, and where that can be told.
enum Fatal {
    /// Before there is a log.
    Early(String),
    /// To the node's log, which goes to stderr too.
    Logged(String, String),
}

impl Fatal {
    fn tell(&self) {
        match self {
            Self::Early(words) => eprintln!("structvpr_node: {words}"),
            Self::Logged(logger, words) => r2r::log_fatal!(logger, "{words}"),
        }
    }
}

fn start(args: &[String]) -> Result<(), Fatal> {
    // r2r panics where rcl refuses the command line or a parameter file; its words are rcl's.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let context = std::panic::catch_unwind(Context::create);
    std::panic::set_hook(hook);
    let context = match context {
        Ok(context) => context.map_err(|e| Fatal::Early(format!("ROS does not start: {e}")))?,
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map_or("rcl_init failed", String::as_str);
            return Err(Fatal::Early(format!("the arguments or a parameter file cannot be read: {words}")));
        }
    };
    let mut node = Node::create(context, "structvpr", "").map_err(|e| Fatal::Early(format!("the node cannot be made: {e}")))?;
    let logger = node.logger().to_string();
    run(&mut node, &logger, args).map_err(|words| Fatal::Logged(logger, words))
}

fn run(node: &mut Node, logger: &str, args: &[String]) -> Result<(), String> {
    let ros = |what: &'static str| move |e: r2r::Error| format!("{what}: {e}");
    let (settings, sim_time, warnings) = parameters::at_start(node)?;
    for warning in warnings {
        r2r::log_warn!(logger, "{warning}");
    }
    if settings.model.threads > 0 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(settings.model.threads);
        pool.build_global().map_err(|e| format!("model.threads: {e}"))?;
    }
    let engine = Arc::new(Engine::new(settings.clone()).map_err(|e| e.to_string())?);
    let map = engine.map_report();
    let file = map.file.map_or("in memory only (set map.file to keep it)".into(), |f| format!("in {}", f.display()));
    r2r::log_info!(logger, "model {}; map of {} keyframes, {file}", engine.model().identity(), map.keyframes);
    for note in engine.notes() {
        r2r::log_warn!(logger, "map: {note}");
    }

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| format!("no threads for tasks: {e}"))?;
    let stop = Arc::new(AtomicBool::new(false));
    end_on_signals(&runtime, &stop)?;
    let sim_time = Arc::new(AtomicBool::new(sim_time));
    let namespace = node.namespace().map_err(ros("namespace"))?;
    let names = Names::new(&namespace, &node.name().map_err(ros("name"))?, args);
    let publishers = Publishers::new(node, &settings.qos).map_err(ros("a publisher cannot be made"))?;
    let (inputs, mut drains) = subscribe(node, &engine, &settings).map_err(ros("a subscription cannot be made"))?;
    parameters::offer(node, runtime.handle(), &engine, &sim_time).map_err(ros("the parameter services cannot be made"))?;
    services::offer(node, runtime.handle(), &engine).map_err(ros("a service cannot be made"))?;
    let mut diagnostics = Diagnostics::new(node, &engine, &names, inputs).map_err(ros("a publisher cannot be made"))?;
    r2r::log_info!(logger, "listening to {}", diagnostics.topics().join(", "));

    let worker = {
        let engine = engine.clone();
        let work = move || engine.work(&mut |keyed| publishers.publish(&engine, keyed));
        std::thread::Builder::new().name("images".into()).spawn(work).map_err(|e| format!("no thread for images: {e}"))?
    };
    let (end_saver, ended) = channel::<()>();
    let saver = {
        let (engine, logger) = (engine.clone(), logger.to_string());
        let save = move || save_now_and_then(&engine, &logger, |wait| ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout));
        std::thread::Builder::new().name("map".into()).spawn(save).map_err(|e| format!("no thread for the map: {e}"))?
    };

    let period = Duration::from_secs_f64(settings.publish.diagnostics_period_s);
    let mut due = Instant::now() + period;
    let mut simulated = false;
    while !stop.load(Ordering::Relaxed) && !worker.is_finished() {
        if sim_time.load(Ordering::Relaxed) != simulated {
            simulated = !simulated;
            let source = node.get_time_source();
            if !simulated {
                source.disable_sim_time();
            } else if let Err(e) = source.enable_sim_time(node) {
                r2r::log_error!(logger, "use_sim_time: {e}");
            }
        }
        node.spin_once(SPIN);
        drains.iter_mut().for_each(|take| take());
        if Instant::now() >= due {
            due = Instant::now() + period;
            diagnostics.tick(node);
        }
    }

    engine.stop();
    let died = worker.join().is_err();
    drop(end_saver);
    // It may be in the middle of a save, which counts.
    let _ = saver.join();
    let saved = engine.close().map_err(|e| format!("the map could not be saved: {e}"))?;
    match saved {
        Some((path, n)) => r2r::log_info!(logger, "{n} keyframes saved to {}", path.display()),
        None => r2r::log_info!(logger, "nothing left to save"),
    }
    runtime.shutdown_timeout(Duration::from_millis(200));
    if died {
        return Err("the thread for images died; this is a bug, its message stands above".into());
    }
    Ok(())
}

/// A second signal so soon after the first is the same wish: a terminal and a launch file both pass it on.
const SAME_SIGNAL: Duration = Duration::from_secs(2);

/// The first SIGINT or SIGTERM ends the node in order; one that comes when that should be over, at once.
fn end_on_signals(runtime: &tokio::runtime::Runtime, stop: &Arc<AtomicBool>) -> Result<(), String> {
    use tokio::signal::unix::{signal, SignalKind};
    let _context = runtime.enter();
    let bad = |e: std::io::Error| format!("signals: {e}");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(bad)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(bad)?;
    let stop = stop.clone();
    runtime.spawn(async move {
        let mut first: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            stop.store(true, Ordering::Relaxed);
            if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
                eprintln!("structvpr_node: another signal: ending at once");
                std::process::exit(130);
            }
        }
    });
    Ok(())
}

/// Takes what a subscription has received.
type Drain = Box<dyn FnMut()>;

/// r2r keeps ten messages per subscription and silently drops the next, so the thread that spins, which
/// takes one at a time, hands each on at once; a task would have to be scheduled first.
fn drain(mut messages: impl Stream<Item = Vec<u8>> + Unpin + 'static, mut take: impl FnMut(Vec<u8>) + 'static) -> Drain {
    Box::new(move || {
        while let Some(Some(bytes)) = messages.next().now_or_never() {
            take(bytes);
        }
    })
}

/// Logs the first error of a topic.
fn complain_once(logger: String, topic: String) -> impl FnMut(crate::error::Result<()>) {
    let mut complained = false;
    move |result| {
        if let (Err(e), false) = (result, complained) {
            r2r::log_warn!(&logger, "{topic}: {e}; the next such message is not mentioned");
            complained = true;
        }
    }
}

/// Subscribes each camera's topics, and odometry; returns the image topics, and what takes the messages.
fn subscribe(node: &mut Node, engine: &Arc<Engine>, settings: &Settings) -> r2r::Result<(Vec<Input>, Vec<Drain>)> {
    let logger = node.logger().to_string();
    let (mut inputs, mut drains) = (Vec::new(), Vec::new());
    for (camera, name) in engine.cameras().iter().enumerate() {
        let topic = |base: &str| if engine.cameras().len() == 1 { base.to_string() } else { format!("{name}/{base}") };
        let (image, type_name) =
            if engine.compressed() { (topic("image/compressed"), CompressedImage::TYPE) } else { (topic("image"), Image::TYPE) };
        let messages = node.subscribe_raw(&image, type_name, publish::qos(&settings.qos.image))?;
        let e = engine.clone();
        drains.push(drain(messages, move |bytes| e.image(camera, bytes)));
        inputs.push(Input { name: image, type_name, qos: settings.qos.image.clone() });

        if settings.input.depth {
            let depth = topic("depth");
            let messages = node.subscribe_raw(&depth, Image::TYPE, publish::qos(&settings.qos.depth))?;
            let (e, mut complain) = (engine.clone(), complain_once(logger.clone(), depth));
            drains.push(drain(messages, move |bytes| complain(e.depth(camera, &bytes))));
        }
        let info = topic("camera_info");
        let messages = node.subscribe_raw(&info, CameraInfo::TYPE, publish::qos(&settings.qos.camera_info))?;
        let (e, mut complain) = (engine.clone(), complain_once(logger.clone(), info));
        drains.push(drain(messages, move |bytes| complain(e.camera_info(camera, &bytes))));
    }
    if settings.input.odometry {
        let messages = node.subscribe_raw("odom", Odometry::TYPE, publish::qos(&settings.qos.odom))?;
        let (e, mut complain) = (engine.clone(), complain_once(logger, "odom".into()));
        drains.push(drain(messages, move |bytes| complain(e.odometry(&bytes))));
    }
    Ok((inputs, drains))
}

/// Writes what is new to the map's file, so often that nothing waits longer than the settings say; `wait` sleeps and returns whether to
/// go on.
fn save_now_and_then(engine: &Engine, logger: &str, wait: impl Fn(Duration) -> bool) {
    // Half the bound: a keyframe that just missed one round is written by the next. The interval may change while running.
    while wait(Duration::from_secs_f64((engine.settings().map.durable_s / 2.0).clamp(0.02, 1800.0))) {
        // A failure stands in the diagnostics, which log it; the next round tries again.
        if let Ok(Some((path, n))) = engine.save_changes() {
            r2r::log_debug!(logger, "{n} keyframes in {}", path.display());
        }
    }
}
