//! The part of WQL that callers use: `SELECT columns FROM class [WITHIN n] [WHERE condition]`, and object paths.

use outrider_wmi::{Object, Value};

/// A parsed query.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Query {
    columns: Vec<String>,
    pub(crate) class: String,
    filter: Option<Condition>,
}

#[derive(Debug, Clone, PartialEq)]
enum Condition {
    Any(Vec<Condition>),
    All(Vec<Condition>),
    Not(Box<Condition>),
    Isa(Vec<String>, String),
    Compare(Vec<String>, Operator, Operand),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Operator {
    Equal,
    Different,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Like,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    Literal(Value),
    Property(Vec<String>),
}

/// Why a text is no query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not understood at {0:?}")]
pub(crate) struct WqlError(String);

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(i64),
    Sign(&'static str),
}

impl Query {
    pub(crate) fn parse(text: &str) -> Result<Self, WqlError> {
        let mut tokens = Tokens { all: tokens(text)?, at: 0 };
        tokens.keyword("select")?;
        let mut columns = Vec::new();
        if !tokens.sign("*") {
            loop {
                columns.push(tokens.word()?);
                if !tokens.sign(",") {
                    break;
                }
            }
        }
        tokens.keyword("from")?;
        let class = tokens.word()?;
        if tokens.is_keyword("within") {
            match tokens.next() {
                Some(Token::Number(_)) => {}
                other => return Err(tokens.error(other)),
            }
        }
        let filter = if tokens.is_keyword("where") { Some(any(&mut tokens, 0)?) } else { None };
        match tokens.next() {
            None => Ok(Self { columns, class, filter }),
            other => Err(tokens.error(other)),
        }
    }

    /// Whether an instance satisfies the condition; the class is the caller's matter.
    pub(crate) fn accepts(&self, object: &Object) -> bool {
        self.filter.as_ref().is_none_or(|f| f.holds(object))
    }

    /// Leaves only the selected columns.
    pub(crate) fn project(&self, object: Object) -> Object {
        if self.columns.is_empty() {
            return object;
        }
        let mut out = Object::new(object.class.clone(), object.path.clone());
        for column in &self.columns {
            if object.get(column) != &Value::Null {
                out.set(column, object.get(column).clone());
            }
        }
        out
    }
}

impl Condition {
    fn holds(&self, object: &Object) -> bool {
        match self {
            Self::Any(all) => all.iter().any(|c| c.holds(object)),
            Self::All(all) => all.iter().all(|c| c.holds(object)),
            Self::Not(c) => !c.holds(object),
            Self::Isa(path, class) => match lookup(object, path) {
                Value::Object(o) => o.class.eq_ignore_ascii_case(class),
                _ => false,
            },
            Self::Compare(path, operator, operand) => {
                let left = lookup(object, path);
                match operand {
                    Operand::Literal(right) => compare(left, *operator, right),
                    Operand::Property(path) => compare(left, *operator, lookup(object, path)),
                }
            }
        }
    }
}

fn lookup<'a>(object: &'a Object, path: &[String]) -> &'a Value {
    const NULL: &Value = &Value::Null;
    let Some((last, parents)) = path.split_last() else { return NULL };
    let mut at = object;
    for name in parents {
        match at.object(name) {
            Some(inner) => at = inner,
            None => return NULL,
        }
    }
    at.get(last)
}

fn number(value: &Value) -> Option<i128> {
    match value {
        Value::UInt(n) => Some(i128::from(*n)),
        Value::Int(n) => Some(i128::from(*n)),
        Value::Bool(b) => Some(i128::from(*b)),
        Value::Str(s) => s.parse().ok(),
        _ => None,
    }
}

fn compare(left: &Value, operator: Operator, right: &Value) -> bool {
    use std::cmp::Ordering;
    let order = match (left, right) {
        (Value::Null, Value::Null) => Some(Ordering::Equal),
        (Value::Null, _) | (_, Value::Null) => None,
        (Value::Str(a) | Value::Ref(a), Value::Str(b) | Value::Ref(b)) => {
            if operator == Operator::Like {
                return like(&a.to_lowercase(), &b.to_lowercase());
            }
            Some(a.to_lowercase().cmp(&b.to_lowercase()))
        }
        (a, b) => number(a).zip(number(b)).map(|(a, b)| a.cmp(&b)),
    };
    match (operator, order) {
        (Operator::Equal, o) => o == Some(Ordering::Equal),
        // As in SQL, a comparison with nothing holds for neither.
        (Operator::Different, o) => o.is_some_and(Ordering::is_ne),
        (Operator::Less, o) => o.is_some_and(Ordering::is_lt),
        (Operator::LessOrEqual, o) => o.is_some_and(Ordering::is_le),
        (Operator::Greater, o) => o.is_some_and(Ordering::is_gt),
        (Operator::GreaterOrEqual, o) => o.is_some_and(Ordering::is_ge),
        (Operator::Like, _) => false,
    }
}

fn like(text: &str, pattern: &str) -> bool {
    match pattern.chars().next() {
        None => text.is_empty(),
        Some('%') => {
            let rest = &pattern[1..];
            text.char_indices().any(|(i, _)| like(&text[i..], rest)) || like("", rest)
        }
        Some(p) => match text.chars().next() {
            Some(t) if p == '_' || p == t => like(&text[t.len_utf8()..], &pattern[p.len_utf8()..]),
            _ => false,
        },
    }
}

struct Tokens {
    all: Vec<Token>,
    at: usize,
}

impl Tokens {
    fn next(&mut self) -> Option<Token> {
        let token = self.all.get(self.at).cloned();
        self.at += 1;
        token
    }

    fn error(&self, token: Option<Token>) -> WqlError {
        WqlError(token.map_or_else(|| "the end".to_owned(), |t| format!("{t:?}")))
    }

    fn word(&mut self) -> Result<String, WqlError> {
        match self.next() {
            Some(Token::Word(w)) => Ok(w),
            other => Err(self.error(other)),
        }
    }

    fn is_keyword(&mut self, wanted: &str) -> bool {
        let is =
            matches!(self.all.get(self.at), Some(Token::Word(w)) if w.eq_ignore_ascii_case(wanted));
        self.at += usize::from(is);
        is
    }

    fn keyword(&mut self, wanted: &str) -> Result<(), WqlError> {
        if self.is_keyword(wanted) {
            Ok(())
        } else {
            Err(self.error(self.all.get(self.at).cloned()))
        }
    }

    fn sign(&mut self, wanted: &str) -> bool {
        let is = matches!(self.all.get(self.at), Some(Token::Sign(s)) if *s == wanted);
        self.at += usize::from(is);
        is
    }
}

/// Nesting of conditions is bounded: the parser recurses.
const MAX_DEPTH: usize = 32;

fn any(tokens: &mut Tokens, depth: usize) -> Result<Condition, WqlError> {
    let mut parts = vec![all(tokens, depth)?];
    while tokens.is_keyword("or") {
        parts.push(all(tokens, depth)?);
    }
    Ok(if parts.len() == 1 { parts.remove(0) } else { Condition::Any(parts) })
}

fn all(tokens: &mut Tokens, depth: usize) -> Result<Condition, WqlError> {
    let mut parts = vec![one(tokens, depth)?];
    while tokens.is_keyword("and") {
        parts.push(one(tokens, depth)?);
    }
    Ok(if parts.len() == 1 { parts.remove(0) } else { Condition::All(parts) })
}

fn one(tokens: &mut Tokens, depth: usize) -> Result<Condition, WqlError> {
    if depth > MAX_DEPTH {
        return Err(WqlError("too many parentheses".into()));
    }
    if tokens.is_keyword("not") {
        return Ok(Condition::Not(Box::new(one(tokens, depth + 1)?)));
    }
    if tokens.sign("(") {
        let inner = any(tokens, depth + 1)?;
        return if tokens.sign(")") { Ok(inner) } else { Err(WqlError("a missing )".into())) };
    }
    let property = dotted(&tokens.word()?);
    if tokens.is_keyword("isa") {
        return match tokens.next() {
            Some(Token::Text(class)) => Ok(Condition::Isa(property, class)),
            other => Err(tokens.error(other)),
        };
    }
    if tokens.is_keyword("is") {
        let not = tokens.is_keyword("not");
        tokens.keyword("null")?;
        let test = Condition::Compare(property, Operator::Equal, Operand::Literal(Value::Null));
        return Ok(if not { Condition::Not(Box::new(test)) } else { test });
    }
    let operator = if tokens.is_keyword("like") {
        Operator::Like
    } else {
        match tokens.next() {
            Some(Token::Sign("=")) => Operator::Equal,
            Some(Token::Sign("<>" | "!=")) => Operator::Different,
            Some(Token::Sign("<")) => Operator::Less,
            Some(Token::Sign("<=")) => Operator::LessOrEqual,
            Some(Token::Sign(">")) => Operator::Greater,
            Some(Token::Sign(">=")) => Operator::GreaterOrEqual,
            other => return Err(tokens.error(other)),
        }
    };
    let operand = match tokens.next() {
        Some(Token::Text(t)) => Operand::Literal(Value::Str(t)),
        Some(Token::Number(n)) => Operand::Literal(Value::Int(n)),
        Some(Token::Word(w)) if w.eq_ignore_ascii_case("true") => {
            Operand::Literal(Value::Bool(true))
        }
        Some(Token::Word(w)) if w.eq_ignore_ascii_case("false") => {
            Operand::Literal(Value::Bool(false))
        }
        Some(Token::Word(w)) if w.eq_ignore_ascii_case("null") => Operand::Literal(Value::Null),
        Some(Token::Word(w)) => Operand::Property(dotted(&w)),
        other => return Err(tokens.error(other)),
    };
    Ok(Condition::Compare(property, operator, operand))
}

fn dotted(word: &str) -> Vec<String> {
    word.split('.').map(str::to_owned).collect()
}

fn tokens(text: &str) -> Result<Vec<Token>, WqlError> {
    const SIGNS: [&str; 10] = ["<>", "!=", "<=", ">=", "=", "<", ">", "(", ")", ","];
    let mut out = Vec::new();
    let mut rest = text.trim_start();
    while let Some(c) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix('*') {
            out.push(Token::Sign("*"));
            rest = after;
        } else if let Some(sign) = SIGNS.iter().find(|s| rest.starts_with(**s)) {
            out.push(Token::Sign(sign));
            rest = &rest[sign.len()..];
        } else if matches!(c, '\'' | '"') {
            let (value, after) = quoted(&rest[1..], c).ok_or_else(|| WqlError(rest.to_owned()))?;
            out.push(Token::Text(value));
            rest = after;
        } else {
            let end = rest
                .find(|c: char| !(c.is_alphanumeric() || matches!(c, '_' | '.' | '-')))
                .unwrap_or(rest.len());
            if end == 0 {
                return Err(WqlError(rest.to_owned()));
            }
            let word = &rest[..end];
            out.push(match word.parse() {
                Ok(number) => Token::Number(number),
                Err(_) => Token::Word(word.to_owned()),
            });
            rest = &rest[end..];
        }
        rest = rest.trim_start();
    }
    Ok(out)
}

/// Reads a quoted literal whose quotes and backslashes are escaped by a backslash; gives the rest, too.
fn quoted(text: &str, quote: char) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => out.push(chars.next()?.1),
            c if c == quote => return Some((out, &text[i + c.len_utf8()..])),
            c => out.push(c),
        }
    }
    None
}

/// An object path, `[\\host\namespace:]Class.Key="value",Key=...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObjectPath {
    pub(crate) class: String,
    keys: Vec<(String, String)>,
}

impl ObjectPath {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let relative = if text.starts_with(r"\\") { text.split_once(':')?.1 } else { text };
        let (class, mut rest) = match relative.split_once(['.', '=']) {
            // `Class=@` names the only instance.
            Some(_) if relative.ends_with("=@") => (relative.trim_end_matches("=@"), ""),
            Some((class, rest)) => (class, rest),
            None => (relative, ""),
        };
        let mut keys = Vec::new();
        while !rest.is_empty() {
            let (key, after) = rest.split_once('=')?;
            let quote = after.chars().next()?;
            let (value, after) = if matches!(quote, '"' | '\'') {
                quoted(&after[1..], quote)?
            } else {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            };
            keys.push((key.trim().to_owned(), value));
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        Some(Self { class: class.to_owned(), keys })
    }

    /// Whether the path names this instance.
    pub(crate) fn names(&self, object: &Object) -> bool {
        self.class.eq_ignore_ascii_case(&object.class)
            && self.keys.iter().all(|(key, value)| {
                object.str(key).is_some_and(|v| v.to_lowercase() == value.to_lowercase())
            })
    }

    /// The value of a key.
    pub(crate) fn key(&self, name: &str) -> Option<&str> {
        self.keys.iter().find(|(k, _)| k.eq_ignore_ascii_case(name)).map(|(_, v)| v.as_str())
    }
}

/// Writes a relative object path.
pub(crate) fn path_of(class: &str, keys: &[(&str, &str)]) -> String {
    let keys: Vec<String> = keys
        .iter()
        .map(|(k, v)| format!("{k}=\"{}\"", v.replace('\\', r"\\").replace('"', "\\\"")))
        .collect();
    format!("{class}.{}", keys.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(wql: &str, object: &Object) -> bool {
        Query::parse(wql).expect("a query").accepts(object)
    }

    #[test]
    fn conditions_compare_as_wmi_does() {
        let group = Object::new("MSCluster_Resource", "")
            .with("Type", "Virtual Machine")
            .with("State", 2_u32)
            .with(
                "PrivateProperties",
                Value::Object(Box::new(Object::new("x", "").with("VmID", "AB-1"))),
            );
        assert!(accepts(
            "SELECT * FROM x WHERE Type='virtual machine' AND PrivateProperties.VmID='ab-1'",
            &group
        ));
        assert!(accepts(
            "select Name from x where State <> 3 and (Type like 'Virt%' or State=9)",
            &group
        ));
        assert!(!accepts("SELECT * FROM x WHERE Missing <> 'a'", &group));
        assert!(!accepts("SELECT * FROM x WHERE NOT Type='Virtual Machine'", &group));
    }

    #[test]
    fn an_event_query_compares_target_and_previous() {
        let at =
            |owner: &str| Value::Object(Box::new(Object::new("G", "").with("OwnerNode", owner)));
        let event = Object::new("__InstanceModificationEvent", "")
            .with("TargetInstance", at("b"))
            .with("PreviousInstance", at("a"));
        assert!(accepts(
            "SELECT * FROM e WITHIN 2 WHERE TargetInstance ISA 'G' AND TargetInstance.OwnerNode != PreviousInstance.OwnerNode",
            &event
        ));
    }

    #[test]
    fn a_path_names_the_instance_it_was_made_for() {
        let id = r"Microsoft:A\B\0\0\L";
        let path = path_of("Msvm_X", &[("InstanceID", id), ("Name", "q\"q")]);
        let object =
            Object::new("Msvm_X", path.clone()).with("InstanceID", id).with("Name", "q\"q");
        assert!(ObjectPath::parse(&path).expect("a path").names(&object));
        let full = format!(r"\\HOST\root\virtualization\v2:{path}");
        assert!(ObjectPath::parse(&full).expect("a path").names(&object));
    }

    #[test]
    fn nonsense_is_an_error() {
        for text in [
            "",
            "SELECT",
            "SELECT * FROM",
            "SELECT * FROM a WHERE",
            "SELECT * FROM a WHERE b='",
            "SELECT * FROM a b",
            "SELECT * FROM a WHERE (b=1",
        ] {
            assert!(Query::parse(text).is_err(), "{text:?}");
        }
    }
}
