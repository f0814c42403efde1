//! What chat templates expect of Python: dicts that keep their order, `json.dumps`, `strftime`.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Enumerator, Kwargs, Object, ValueKind},
};
use serde_json::Value as Json;

/// Deeper data than any conversation has.
const MAX_DEPTH: usize = 64;

/// A dict that is iterated in the order of its entries.
#[derive(Debug)]
struct Dict(Vec<(Arc<str>, Value)>);

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        self.0.iter().find(|(known, _)| &**known == key).map(|(_, value)| value.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(key, _)| Value::from(key.clone())).collect())
    }
}

/// A value of JSON as templates see it.
pub(super) fn to_template(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_template).collect(),
        Json::Object(entries) => dict(entries.iter().map(|(key, value)| (key.as_str(), to_template(value)))),
    }
}

pub(super) fn dict<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
    Value::from_object(Dict(entries.into_iter().map(|(key, value)| (Arc::from(key), value)).collect()))
}

/// `{{ value | tojson(indent=...) }}` as transformers has it: `json.dumps(value, ensure_ascii=False, indent=indent)`.
pub(super) fn tojson(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut json = String::new();
    write_json(state, value, indent, 0, &mut json)?;
    Ok(Value::from(json))
}

/// Takes the fuel for printing all that a value holds. A few lines of a template make a list of lists whose text no
/// memory holds, and the engine itself counts what is printed only afterwards.
pub(super) fn pay_for(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    state.consume_fuel(1)?;
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "the value is nested too deeply to be printed"));
    }
    let inside = |value: &Value| pay_for(state, value, depth + 1);
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => value.try_iter()?.try_for_each(|item| inside(&item)),
        ValueKind::Map => value.try_iter()?.try_for_each(|key| inside(&value.get_item(&key)?)),
        _ => Ok(()),
    }
}

/// A list may hold another one many times over: what is written is paid for as it is written, one item and 64 bytes a
/// unit of fuel, as the template's own filters do.
fn write_json(
    state: &State,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    json: &mut String,
) -> Result<(), Error> {
    let text = value.as_str().map_or(0, str::len) + indent.map_or(0, |indent| indent.min(16) * depth);
    state.consume_fuel(1 + (text / 64) as u64)?;
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deeply"));
    }
    let line = |json: &mut String, depth: usize| {
        if let Some(indent) = indent {
            json.push('\n');
            json.extend(std::iter::repeat_n(' ', indent.min(16) * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None => json.push_str("null"),
        ValueKind::Bool => json.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => json.push_str(&value.to_string()),
        ValueKind::String => json.push_str(&Json::from(value.as_str().unwrap_or_default()).to_string()),
        ValueKind::Seq | ValueKind::Iterable => {
            json.push('[');
            let mut is_empty = true;
            for item in value.try_iter()? {
                json.push_str(if is_empty { "" } else { comma });
                line(json, depth + 1);
                write_json(state, &item, indent, depth + 1, json)?;
                is_empty = false;
            }
            if !is_empty {
                line(json, depth);
            }
            json.push(']');
        }
        ValueKind::Map => {
            json.push('{');
            let mut is_empty = true;
            for key in value.try_iter()? {
                json.push_str(if is_empty { "" } else { comma });
                line(json, depth + 1);
                json.push_str(&Json::from(key.to_string()).to_string());
                json.push_str(": ");
                write_json(state, &value.get_item(&key)?, indent, depth + 1, json)?;
                is_empty = false;
            }
            if !is_empty {
                line(json, depth);
            }
            json.push('}');
        }
        kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: cannot write {kind}"))),
    }
    Ok(())
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// `strftime` for the fields that dates in prompts are made of, in UTC; an unknown field stays as it is.
pub(super) fn strftime(time: SystemTime, format: &str) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let name = |names: &[&'static str], index: u64| names[index as usize % names.len()];
    let (month_name, day_name) = (name(&MONTHS, month - 1), name(&DAYS, days + 3));
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let mut field = rest.next();
        let padded = field != Some('-');
        if !padded {
            field = rest.next();
        }
        let two = |value: u64| if padded { format!("{value:02}") } else { value.to_string() };
        text += &match field {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('p') => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            Some('M') => two(minute),
            Some('S') => two(second % 60),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            Some(other) => format!("%{}{other}", if padded { "" } else { "-" }),
            None => "%".to_owned(),
        };
    }
    text
}

/// Year, month and day, counted from 1, of a day after 1 January 1970 (Howard Hinnant's `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) =
        (day_of_year - (153 * shifted + 2) / 5 + 1, if shifted < 10 { shifted + 3 } else { shifted - 9 });
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| strftime(UNIX_EPOCH + std::time::Duration::from_secs(seconds), "%d %b %Y %H:%M:%S %A %-d%%");
        assert_eq!(at(0), "01 Jan 1970 00:00:00 Thursday 1%");
        assert_eq!(at(951_827_696), "29 Feb 2000 12:34:56 Tuesday 29%");
        assert_eq!(at(1_735_689_599), "31 Dec 2024 23:59:59 Tuesday 31%");
    }
}
