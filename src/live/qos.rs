//! Why nothing arrives, in words.

/// Type and quality of service that one side of a topic offers or asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// `package/msg/Name`.
    pub type_name: String,
    /// Name of the node.
    pub node: String,
    /// Best effort, where not reliable.
    pub reliable: bool,
    /// Volatile, where not transient local.
    pub transient_local: bool,
}

/// Says why a subscriber of `topic` hears nothing of its publishers, and what to do; `setting` is the
/// topic's section below `qos`.
pub fn why_silent(topic: &str, setting: &str, ours: &Endpoint, publishers: &[Endpoint]) -> String {
    if publishers.is_empty() {
        return format!("nobody publishes {topic}; remap the input to your camera's topic, or start the camera");
    }
    let of = |p: &Endpoint| {
        if p.type_name != ours.type_name {
            let hint = match (p.type_name.as_str(), ours.type_name.as_str()) {
                ("sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image") => "; set input.image_transport to \"compressed\"",
                ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage") => "; set input.image_transport to \"raw\"",
                _ => "",
            };
            return Some(format!("publisher {} sends {}, we want {}{hint}", p.node, p.type_name, ours.type_name));
        }
        if ours.reliable && !p.reliable {
            return Some(format!(
                "publisher {} offers best-effort, we ask reliable; set qos.{setting}.reliability to \"best_effort\"",
                p.node
            ));
        }
        if ours.transient_local && !p.transient_local {
            return Some(format!(
                "publisher {} offers volatile, we ask transient-local; set qos.{setting}.durability to \"volatile\"",
                p.node
            ));
        }
        None
    };
    let wrong: Vec<String> = publishers.iter().filter_map(of).collect();
    match wrong.len() == publishers.len() {
        true => wrong.join("; "),
        false => {
            let node = publishers.iter().find(|p| of(p).is_none()).map_or("", |p| &p.node);
            format!("publisher {node} fits, but sends nothing; large images over a network or a full shared-memory segment get lost with best-effort (see README, Quality of service)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(type_name: &str, reliable: bool, transient_local: bool) -> Endpoint {
        Endpoint { type_name: format!("sensor_msgs/msg/{type_name}"), node: "/cam".into(), reliable, transient_local }
    }

    #[test]
    fn every_cause_is_named_with_its_cure() {
        let ours = end("Image", true, true);
        let said = |p: &[Endpoint]| why_silent("/image", "image", &ours, p);
        assert!(said(&[]).contains("nobody publishes /image"));
        assert!(said(&[end("Image", false, true)]).contains("publisher /cam offers best-effort, we ask reliable"));
        assert!(said(&[end("Image", true, false)]).contains("qos.image.durability"));
        assert!(said(&[end("CompressedImage", true, true)]).contains("input.image_transport to \"compressed\""));
        assert!(said(&[end("Image", false, true), end("Image", true, true)]).contains("fits"));
    }
}
