//! Names as ROS resolves them, for messages to people and for the graph. rcl resolves the topics
//! themselves; r2r does not hand out what it made of them.

/// One `-r from:=to` rule of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    from: String,
    to: String,
}

/// Namespace, name and remapping rules of a node.
#[derive(Clone, Debug)]
pub struct Names {
    namespace: String,
    node: String,
    rules: Vec<Rule>,
}

impl Names {
    /// `namespace` begins with a slash; `args` is the whole command line.
    pub fn new(namespace: &str, node: &str, args: &[String]) -> Self {
        let mut rules = Vec::new();
        let mut words = args.iter();
        while let Some(word) = words.next() {
            if word != "--ros-args" {
                continue;
            }
            while let Some(word) = words.next() {
                match word.as_str() {
                    "--" => break,
                    "-r" | "--remap" => rules.extend(words.next().and_then(|r| Rule::parse(r, node))),
                    _ => {}
                }
            }
        }
        Self { namespace: namespace.into(), node: node.into(), rules }
    }

    fn expand(&self, name: &str) -> String {
        let join = |a: &str, b: &str| format!("{}/{}", a.trim_end_matches('/'), b);
        match name.strip_prefix('~') {
            Some(rest) => join(&join(&self.namespace, &self.node), rest.trim_start_matches('/')).trim_end_matches('/').into(),
            None if name.starts_with('/') => name.into(),
            None => join(&self.namespace, name),
        }
    }

    /// The topic that `name` stands for after namespace and remapping.
    pub fn topic(&self, name: &str) -> String {
        let own = self.expand(name);
        match self.rules.iter().find(|r| self.expand(&r.from) == own) {
            Some(rule) => self.expand(&rule.to),
            None => own,
        }
    }
}

impl Rule {
    /// `None`: not of topics, or of another node.
    fn parse(text: &str, node: &str) -> Option<Self> {
        let (from, to) = text.split_once(":=")?;
        let from = from.strip_prefix("rostopic://").unwrap_or(from);
        let from = match from.split_once(':') {
            Some((of, rest)) if of == node => rest,
            Some(_) => return None,
            None => from,
        };
        (!from.starts_with("__")).then(|| Self { from: from.into(), to: to.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved_as_rcl_does() {
        let check = |args: &str, name: &str, expect: &str| {
            let args: Vec<String> = args.split_whitespace().map(String::from).collect();
            assert_eq!(Names::new("/car", "vpr", &args).topic(name), expect, "{name} with {args:?}");
        };
        check("", "image", "/car/image");
        check("", "~/candidates", "/car/vpr/candidates");
        check("", "/tf", "/tf");
        check("--ros-args -r image:=/cam/image_raw", "image", "/cam/image_raw");
        check("--ros-args -p a:=1 --remap image:=left/image -r __node:=vpr", "image", "/car/left/image");
        check("--ros-args -r ~/match_stamps:=/lio_loop/loop_closure_detection", "~/match_stamps", "/lio_loop/loop_closure_detection");
        check("--ros-args -r other:image:=x -r vpr:image:=y", "image", "/car/y");
        check("-r image:=x", "image", "/car/image");
        check("--ros-args -r __ns:=/car -- -r image:=x", "image", "/car/image");
    }
}
