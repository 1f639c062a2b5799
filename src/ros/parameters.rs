//! Parameters: from the command line and files at start, by the ordinary services while running.
//!
//! r2r's own handlers take any value; here every value has a type, a range and a meaning, and what cannot
//! change while running says so.

use crate::config::{nearest, Kind, Setting, Settings, Value};
use crate::error::Error;
use crate::live::Engine;
use futures::{Stream, StreamExt};
use r2r::rcl_interfaces::msg::{
    FloatingPointRange, IntegerRange, ListParametersResult, Parameter, ParameterDescriptor, ParameterEvent, ParameterType, ParameterValue,
    SetParametersResult,
};
use r2r::rcl_interfaces::srv::{
    DescribeParameters, GetParameterTypes, GetParameters, ListParameters, SetParameters, SetParametersAtomically,
};
use r2r::{Node, Publisher, QosProfile, ServiceRequest};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const SIM_TIME: &str = "use_sim_time";
/// What rcl and others may set on any node.
const FOREIGN: [&str; 2] = ["start_type_description_service", "qos_overrides."];

fn from_r2r(value: &r2r::ParameterValue) -> Option<Value> {
    use r2r::ParameterValue as P;
    Some(match value {
        P::Bool(v) => Value::Flag(*v),
        P::Integer(v) => Value::Integer(*v),
        P::Double(v) => Value::Real(*v),
        P::String(v) => Value::Text(v.clone()),
        P::StringArray(v) => Value::Names(v.clone()),
        _ => return None,
    })
}

fn from_message(value: &ParameterValue) -> Option<Value> {
    Some(match i64::from(value.type_) {
        t if t == ParameterType::PARAMETER_BOOL as i64 => Value::Flag(value.bool_value),
        t if t == ParameterType::PARAMETER_INTEGER as i64 => Value::Integer(value.integer_value),
        t if t == ParameterType::PARAMETER_DOUBLE as i64 => Value::Real(value.double_value),
        t if t == ParameterType::PARAMETER_STRING as i64 => Value::Text(value.string_value.clone()),
        t if t == ParameterType::PARAMETER_STRING_ARRAY as i64 => Value::Names(value.string_array_value.clone()),
        _ => return None,
    })
}

fn type_of(value: &Value) -> u8 {
    match value {
        Value::Flag(_) => ParameterType::PARAMETER_BOOL as u8,
        Value::Integer(_) => ParameterType::PARAMETER_INTEGER as u8,
        Value::Real(_) => ParameterType::PARAMETER_DOUBLE as u8,
        Value::Text(_) => ParameterType::PARAMETER_STRING as u8,
        Value::Names(_) => ParameterType::PARAMETER_STRING_ARRAY as u8,
    }
}

fn to_message(value: Value) -> ParameterValue {
    let mut m = ParameterValue { type_: type_of(&value), ..Default::default() };
    match value {
        Value::Flag(v) => m.bool_value = v,
        Value::Integer(v) => m.integer_value = v,
        Value::Real(v) => m.double_value = v,
        Value::Text(v) => m.string_value = v,
        Value::Names(v) => m.string_array_value = v,
    }
    m
}

/// A parameter's message says `parameter`, where a file's says `setting`.
fn said(error: &Error) -> String {
    match error {
        Error::Config { field, value, allowed } => format!("parameter `{field}`: {value} is not allowed; allowed: {allowed}"),
        other => other.to_string(),
    }
}

/// The settings that the node was started with, whether it takes simulated time, and warnings about
/// names that nobody knows.
///
/// Errors: a wrong type or a value out of range, in one line that names the parameter and the range.
pub fn at_start(node: &Node) -> Result<(Settings, bool, Vec<String>), String> {
    let given: Vec<(String, r2r::ParameterValue)> = {
        let params = node.params.lock().unwrap_or_else(PoisonError::into_inner);
        params.iter().map(|(name, p)| (name.clone(), p.value.clone())).collect()
    };
    let (mut settings, mut sim_time, mut warnings) = (Settings::default(), false, Vec::new());
    // Bounds that depend on each other may come in any order: all are laid down before any is judged.
    let mut later = Vec::new();
    for (name, value) in given {
        if name == SIM_TIME {
            match value {
                r2r::ParameterValue::Bool(on) => sim_time = on,
                _ => return Err(format!("parameter `{SIM_TIME}`: allowed: true or false")),
            }
        } else if Settings::table().iter().any(|s| s.name == name) {
            later.push((name, value));
        } else if !FOREIGN.iter().any(|f| name.starts_with(f)) {
            let hint = nearest(&name).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
            warnings.push(format!("unknown parameter `{name}` has no effect{hint}"));
        }
    }
    let mut failed: Option<String>;
    loop {
        let before = later.len();
        failed = None;
        let mut again = Vec::new();
        for (name, value) in later {
            let result = match from_r2r(&value) {
                Some(v) => settings.set(&name, &v).map_err(|e| said(&e)),
                None => {
                    let allowed = Settings::table().iter().find(|s| s.name == name).map(|s| s.kind.allowed()).unwrap_or_default();
                    Err(format!("parameter `{name}`: {} is not allowed; allowed: {allowed}", value.type_name()))
                }
            };
            if let Err(e) = result {
                failed.get_or_insert(e);
                again.push((name, value));
            }
        }
        match failed {
            None => return Ok((settings, sim_time, warnings)),
            Some(e) if again.len() == before => return Err(e),
            Some(_) => later = again,
        }
    }
}

fn descriptor(setting: &Setting, value: &Value) -> ParameterDescriptor {
    let mut d = ParameterDescriptor {
        name: setting.name.clone(),
        type_: type_of(value),
        description: setting.doc.clone(),
        read_only: !setting.live,
        ..Default::default()
    };
    match setting.kind {
        Kind::Real(low, high) => d.floating_point_range = vec![FloatingPointRange { from_value: low, to_value: high, step: 0.0 }],
        Kind::Count(low, high) => {
            let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
            d.integer_range = vec![IntegerRange { from_value: whole(low), to_value: whole(high), step: 1 }];
        }
        _ => d.additional_constraints = setting.kind.allowed(),
    }
    d
}

/// The parameters of a running node.
pub struct Parameters {
    engine: Arc<Engine>,
    sim_time: Arc<AtomicBool>,
    events: Publisher<ParameterEvent>,
    node: String,
    clock: Arc<Mutex<r2r::Clock>>,
}

impl Parameters {
    fn get(&self, name: &str) -> Option<Value> {
        match name {
            SIM_TIME => Some(Value::Flag(self.sim_time.load(Ordering::Relaxed))),
            _ => self.engine.settings().get(name),
        }
    }

    /// Sets all or none; the reason against it otherwise.
    fn set(&self, wanted: &[Parameter]) -> Result<(), String> {
        let _changing = self.engine.changing();
        let mut settings = self.engine.settings();
        let mut sim_time = self.sim_time.load(Ordering::Relaxed);
        for p in wanted {
            let value = from_message(&p.value).ok_or_else(|| {
                let allowed = Settings::table().iter().find(|s| s.name == p.name).map_or("a known name".into(), |s| s.kind.allowed());
                format!("parameter `{}`: a value of this type, or none, is not allowed; allowed: {allowed}", p.name)
            })?;
            if p.name == SIM_TIME {
                let Value::Flag(on) = value else { return Err(format!("parameter `{SIM_TIME}`: allowed: true or false")) };
                sim_time = on;
                continue;
            }
            let live = Settings::table().iter().any(|s| s.name == p.name && s.live);
            let before = settings.get(&p.name);
            settings.set(&p.name, &value).map_err(|e| said(&e))?;
            if !live && before != Some(value) {
                return Err(format!("parameter `{}` needs a restart: set it in the launch file or the parameter file", p.name));
            }
        }
        self.engine.apply(settings).map_err(|e| said(&e))?;
        self.sim_time.store(sim_time, Ordering::Relaxed);
        self.announce(wanted.to_vec(), false);
        Ok(())
    }

    fn announce(&self, parameters: Vec<Parameter>, new: bool) {
        let now = self.clock.lock().unwrap_or_else(PoisonError::into_inner).get_now().unwrap_or_default();
        let mut event = ParameterEvent { stamp: r2r::Clock::to_builtin_time(&now), node: self.node.clone(), ..Default::default() };
        if new {
            event.new_parameters = parameters;
        } else {
            event.changed_parameters = parameters;
        }
        // Nobody has to listen to events.
        let _ = self.events.publish(&event);
    }

    fn list(&self, prefixes: &[String], depth: u64) -> ListParametersResult {
        let names = Settings::table().iter().map(|s| s.name.as_str()).chain([SIM_TIME]);
        // Depth counts the dots below the prefix, as in rclcpp; 0 is all.
        let within = |name: &str, prefix: &str| {
            let rest = name.strip_prefix(prefix).unwrap_or_default().trim_start_matches('.');
            depth == 0 || (rest.matches('.').count() as u64) < depth
        };
        let below = |name: &str, p: &String| name == p || (name.starts_with(&format!("{p}.")) && within(name, p));
        let wanted = |name: &&str| if prefixes.is_empty() { within(name, "") } else { prefixes.iter().any(|p| below(name, p)) };
        let names: Vec<String> = names.filter(wanted).map(String::from).collect();
        let mut prefixes: Vec<String> = names.iter().filter_map(|n| Some(n.rsplit_once('.')?.0.to_string())).collect();
        prefixes.dedup();
        ListParametersResult { names, prefixes }
    }
}

fn outcome(result: Result<(), String>) -> SetParametersResult {
    match result {
        Ok(()) => SetParametersResult { successful: true, reason: String::new() },
        Err(reason) => SetParametersResult { successful: false, reason },
    }
}

/// Answers every request of a stream; a caller that has gone is no error.
async fn serve<T>(mut requests: impl Stream<Item = ServiceRequest<T>> + Unpin, answer: impl Fn(&T::Request) -> T::Response)
where
    T: r2r::WrappedServiceTypeSupport + 'static,
{
    while let Some(request) = requests.next().await {
        let response = answer(&request.message);
        let _ = request.respond(response);
    }
}

/// Creates the six services; they run on `runtime`.
pub fn offer(node: &mut Node, runtime: &tokio::runtime::Handle, engine: &Arc<Engine>, sim_time: &Arc<AtomicBool>) -> r2r::Result<()> {
    let parameters = Arc::new(Mutex::new(Parameters {
        engine: engine.clone(),
        sim_time: sim_time.clone(),
        events: node.create_publisher("/parameter_events", QosProfile::parameter_events())?,
        node: node.fully_qualified_name()?,
        clock: node.get_ros_clock(),
    }));
    let qos = QosProfile::parameters;
    macro_rules! service {
        ($type:ty, $name:literal, $answer:expr) => {{
            let (requests, parameters) = (node.create_service::<$type>(concat!("~/", $name), qos())?, parameters.clone());
            let answer = $answer;
            runtime.spawn(serve::<$type>(requests, move |request| {
                answer(&parameters.lock().unwrap_or_else(PoisonError::into_inner), request)
            }));
        }};
    }
    service!(SetParameters::Service, "set_parameters", |p: &Parameters, r: &SetParameters::Request| {
        let results = r.parameters.iter().map(|one| outcome(p.set(std::slice::from_ref(one)))).collect();
        SetParameters::Response { results }
    });
    service!(SetParametersAtomically::Service, "set_parameters_atomically", |p: &Parameters, r: &SetParametersAtomically::Request| {
        SetParametersAtomically::Response { result: outcome(p.set(&r.parameters)) }
    });
    service!(GetParameters::Service, "get_parameters", |p: &Parameters, r: &GetParameters::Request| {
        let values = r.names.iter().map(|n| p.get(n).map(to_message).unwrap_or_default()).collect();
        GetParameters::Response { values }
    });
    service!(GetParameterTypes::Service, "get_parameter_types", |p: &Parameters, r: &GetParameterTypes::Request| {
        let types = r.names.iter().map(|n| p.get(n).map_or(0, |v| type_of(&v))).collect();
        GetParameterTypes::Response { types }
    });
    service!(DescribeParameters::Service, "describe_parameters", |p: &Parameters, r: &DescribeParameters::Request| {
        let describe = |name: &String| {
            let unknown = || ParameterDescriptor { name: name.clone(), ..Default::default() };
            if name == SIM_TIME {
                let type_ = ParameterType::PARAMETER_BOOL as u8;
                return ParameterDescriptor { type_, description: "Take the time from /clock.".into(), ..unknown() };
            }
            let setting = Settings::table().iter().find(|s| s.name == *name);
            setting.zip(p.get(name)).map_or_else(unknown, |(s, v)| descriptor(s, &v))
        };
        DescribeParameters::Response { descriptors: r.names.iter().map(describe).collect() }
    });
    service!(ListParameters::Service, "list_parameters", |p: &Parameters, r: &ListParameters::Request| ListParameters::Response {
        result: p.list(&r.prefixes, r.depth)
    });
    let p = parameters.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = engine.settings();
    let all = Settings::table().iter().filter_map(|s| Some(Parameter { name: s.name.clone(), value: to_message(settings.get(&s.name)?) }));
    p.announce(all.collect(), true);
    Ok(())
}
