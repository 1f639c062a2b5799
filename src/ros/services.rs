//! The node's own services: convert, call once, answer.

use super::convert;
use crate::live::Engine;
use futures::StreamExt;
use r2r::std_srvs::srv::{SetBool, Trigger};
use r2r::structvpr::srv::{LoadMap, QueryImage, SaveMap, VerifyPair};
use r2r::{Node, QosProfile};
use std::path::Path;
use std::sync::Arc;

/// Splits a result into ROS's `success` and `message`.
fn said<T>(result: Result<T, impl std::fmt::Display>, words: impl FnOnce(T) -> String) -> (bool, String) {
    match result {
        Ok(v) => (true, words(v)),
        Err(e) => (false, e.to_string()),
    }
}

fn save_map(engine: &Engine, request: &SaveMap::Request) -> SaveMap::Response {
    let path = (!request.path.is_empty()).then(|| Path::new(&request.path));
    let result = engine.save(path);
    let keyframes = result.as_ref().map_or(0, |(_, n)| *n as u64);
    let (success, message) = said(result, |(path, n)| format!("{n} keyframes saved to {}", path.display()));
    SaveMap::Response { success, message, keyframes }
}

fn load_map(engine: &Engine, request: &LoadMap::Request) -> LoadMap::Response {
    let result = match request.path.as_str() {
        "" => Err(crate::error::Error::map("no path given")),
        path => engine.load(Path::new(path), request.merge),
    };
    let (success, message) = said(result, |(words, _)| words);
    let keyframes = engine.map_report().keyframes as u64;
    LoadMap::Response { success, message, keyframes, model_id: engine.model().identity().name.clone() }
}

fn query_image(engine: &Engine, request: &QueryImage::Request) -> QueryImage::Response {
    let stamp_ns = convert::nanoseconds(&request.image.header.stamp);
    let result = engine.query(&request.image.data, stamp_ns, request.top_k.into(), request.verify);
    let mut candidates = Default::default();
    if let Ok((found, timings, id, revision)) = &result {
        let query = convert::keyframe_id(engine.robot(), 0, None, stamp_ns);
        let hash = engine.config_hash();
        let map = convert::MapState { id, revision: *revision, config_hash: &hash };
        candidates = convert::candidates(request.image.header.clone(), query, "", &map, found, timings);
    }
    let (success, message) = said(result, |(found, ..)| format!("{} candidates", found.len()));
    QueryImage::Response { success, message, candidates }
}

fn verify_pair(engine: &Engine, request: &VerifyPair::Request) -> VerifyPair::Response {
    let result = engine.verify_pair(request.a.keyframe_id, request.b.keyframe_id);
    let verification = result.as_ref().map(convert::verification).unwrap_or_default();
    let (success, message) = said(result, |c| match c.failure {
        Some(failure) => format!("the images do not agree: {}", failure.name()),
        None => {
            format!("{} of {} matches agree: {}", c.inliers, c.matches, if c.success { "one place" } else { "no more than chance gives" })
        }
    });
    VerifyPair::Response { success, message, verification }
}

/// Creates the services; they run on `runtime`, and what takes long on its blocking threads.
pub fn offer(node: &mut Node, runtime: &tokio::runtime::Handle, engine: &Arc<Engine>) -> r2r::Result<()> {
    macro_rules! service {
        ($type:ty, $name:literal, $answer:expr) => {{
            let mut requests = node.create_service::<$type>(concat!("~/", $name), QosProfile::services_default())?;
            let (engine, logger) = (engine.clone(), node.logger().to_string());
            runtime.spawn(async move {
                while let Some(request) = requests.next().await {
                    let (engine, message) = (engine.clone(), request.message.clone());
                    let answer = $answer;
                    match tokio::task::spawn_blocking(move || answer(&engine, &message)).await {
                        Ok(response) => {
                            let level = if response.success { "" } else { "refused: " };
                            r2r::log_info!(&logger, "{}: {level}{}", $name, response.message);
                            // A caller that has gone is no error.
                            let _ = request.respond(response);
                        }
                        Err(e) => r2r::log_error!(&logger, "{}: {e}", $name),
                    }
                }
            });
        }};
    }
    service!(SaveMap::Service, "save_map", save_map);
    service!(LoadMap::Service, "load_map", load_map);
    service!(QueryImage::Service, "query_image", query_image);
    service!(VerifyPair::Service, "verify_pair", verify_pair);
    service!(Trigger::Service, "reset", |engine: &Engine, _: &Trigger::Request| {
        let (success, message) = said(engine.reset(), |words| words);
        Trigger::Response { success, message }
    });
    service!(Trigger::Service, "trigger_relocalization", |engine: &Engine, _: &Trigger::Request| {
        let message = match engine.relocalize() {
            0 => "the map is empty: there is nothing to be found again".into(),
            n => format!("looking for the robot among {n} keyframes; the closure of kind RELOCALIZATION answers"),
        };
        Trigger::Response { success: engine.map_report().keyframes > 0, message }
    });
    service!(SetBool::Service, "pause", |engine: &Engine, request: &SetBool::Request| {
        engine.pause(request.data);
        let message = if request.data { "paused: images are thrown away" } else { "running" };
        SetBool::Response { success: true, message: message.into() }
    });
    service!(SetBool::Service, "localization_only", |engine: &Engine, request: &SetBool::Request| {
        let _changing = engine.changing();
        let mut settings = engine.settings();
        settings.map.localization_only = request.data;
        let words = if request.data { "places are looked up, none is added" } else { "places are looked up and added" };
        let (success, message) = said(engine.apply(settings), |()| words.into());
        SetBool::Response { success, message }
    });
    Ok(())
}
