//! What a setting is: a name, a type, a range, a meaning. Sections are declared once; the struct, its
//! defaults, the parameter descriptions of the node and the shipped YAML all come from that.

use std::fmt;

/// A value of a setting, as YAML and ROS parameters know it.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// true or false.
    Flag(bool),
    /// A whole number.
    Integer(i64),
    /// A real number.
    Real(f64),
    /// A string.
    Text(String),
    /// A list of strings.
    Names(Vec<String>),
}

impl Value {
    /// The type's name, as ROS has it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Flag(_) => "bool",
            Self::Integer(_) => "integer",
            Self::Real(_) => "double",
            Self::Text(_) => "string",
            Self::Names(_) => "string array",
        }
    }
}

impl fmt::Display for Value {
    /// As YAML writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(v) => write!(f, "{v}"),
            Self::Integer(v) => write!(f, "{v}"),
            Self::Real(v) => write!(f, "{v:?}"),
            Self::Text(v) => write!(f, "\"{v}\""),
            Self::Names(v) => write!(f, "[{}]", v.iter().map(|n| format!("\"{n}\"")).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Type and range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// true or false.
    Flag,
    /// A real number, bounds included.
    Real(f64, f64),
    /// A whole number, bounds included.
    Count(usize, usize),
    /// Any string.
    Text,
    /// One of these strings.
    Choice(&'static [&'static str]),
    /// A list of one or more different names: letters, digits and underscores.
    Names,
}

impl Kind {
    /// The range in words.
    pub fn allowed(&self) -> String {
        match self {
            Self::Flag => "true or false".into(),
            Self::Real(low, high) => format!("a double, {low} to {high}"),
            Self::Count(low, high) => format!("an integer, {low} to {high}"),
            Self::Text => "a string".into(),
            Self::Choice(of) => of.iter().map(|c| format!("\"{c}\"")).collect::<Vec<_>>().join(" or "),
            Self::Names => "a list of one or more different names of letters, digits and underscores".into(),
        }
    }

    /// Whether `value` has the type and lies in the range.
    pub fn admits(&self, value: &Value) -> bool {
        let is_name = |n: &String| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        match (self, value) {
            (Self::Flag, Value::Flag(_)) | (Self::Text, Value::Text(_)) => true,
            (Self::Real(low, high), Value::Real(v)) => (low..=high).contains(&v),
            (Self::Count(low, high), Value::Integer(v)) => usize::try_from(*v).is_ok_and(|v| (*low..=*high).contains(&v)),
            (Self::Choice(of), Value::Text(v)) => of.contains(&v.as_str()),
            (Self::Names, Value::Names(v)) => {
                !v.is_empty() && v.iter().all(is_name) && v.iter().enumerate().all(|(i, n)| !v[..i].contains(n))
            }
            _ => false,
        }
    }
}

/// One setting of a table.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Dotted name.
    pub name: String,
    /// Type and range.
    pub kind: Kind,
    /// What it means, with its unit.
    pub doc: String,
    /// Whether a running node takes a new value.
    pub live: bool,
}

/// The types that fields of sections have.
pub trait Field {
    /// Its value.
    fn get(&self) -> Value;
    /// Takes a value of the right type; `false` leaves it as it was.
    fn set(&mut self, value: &Value) -> bool;
}

macro_rules! field {
    ($type:ty, $variant:ident, $get:expr, $set:expr) => {
        impl Field for $type {
            fn get(&self) -> Value {
                Value::$variant($get(self))
            }
            fn set(&mut self, value: &Value) -> bool {
                match value {
                    Value::$variant(v) => {
                        let new: Option<$type> = $set(v);
                        new.map(|n| *self = n).is_some()
                    }
                    _ => false,
                }
            }
        }
    };
}

field!(bool, Flag, |v: &bool| *v, |v: &bool| Some(*v));
field!(f64, Real, |v: &f64| *v, |v: &f64| Some(*v));
field!(usize, Integer, |v: &usize| i64::try_from(*v).unwrap_or(i64::MAX), |v: &i64| usize::try_from(*v).ok());
field!(String, Text, String::clone, |v: &String| Some(v.clone()));
field!(Vec<String>, Names, Vec::clone, |v: &Vec<String>| Some(v.clone()));

/// A group of settings: a struct whose fields can be reached by name.
pub trait Section {
    /// Its settings, names relative to the section.
    fn table() -> Vec<Setting>;
    /// A field by its name within the section.
    fn field(&mut self, name: &str) -> Option<&mut dyn Field>;
}

/// Declares a section: field, default, kind, and whether it may change while the node runs.
macro_rules! section {
    ($(#[doc = $about:literal])+ $name:ident {
        $( $(#[doc = $doc:literal])+ $field:ident: $type:ty = $default:expr, $kind:expr, $live:ident; )+
    }) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $type, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default.into(), )+ }
            }
        }

        impl $crate::config::setting::Section for $name {
            fn table() -> Vec<$crate::config::Setting> {
                vec![$( $crate::config::Setting {
                    name: stringify!($field).into(),
                    kind: $kind,
                    doc: [$($doc.trim()),+].join("\n"),
                    live: stringify!($live) == "live",
                }, )+]
            }

            fn field(&mut self, name: &str) -> Option<&mut dyn $crate::config::setting::Field> {
                match name {
                    $( stringify!($field) => Some(&mut self.$field), )+
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use section;
