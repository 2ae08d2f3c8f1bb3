//! Object paths: `\\SERVER\namespace:Class.Key="value"`, or only what follows the colon.

/// Where a connection is at home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The machine's name, as WMI spells it; "." while it is not known.
    pub server: String,
    /// The namespace without server.
    pub namespace: String,
}

/// The path without server and namespace, if they are those of `place`; as it is otherwise.
#[must_use]
pub fn relative<'a>(path: &'a str, place: &Place) -> &'a str {
    let Some((server, rest)) = path.strip_prefix(r"\\").and_then(|p| p.split_once('\\')) else {
        return path;
    };
    let Some((namespace, object)) = rest.split_once(':') else { return path };
    let own = server == "." || place.server == "." || server.eq_ignore_ascii_case(&place.server);
    if own && namespace.eq_ignore_ascii_case(&place.namespace) { object } else { path }
}

/// The path with server and namespace.
#[must_use]
pub fn absolute(path: &str, place: &Place) -> String {
    if path.starts_with(r"\\") {
        return path.to_owned();
    }
    format!(r"\\{}\{}:{path}", place.server, place.namespace)
}

/// The class that a path (or a bare class name) names.
#[must_use]
pub fn class_of(path: &str) -> &str {
    let object = match path.strip_prefix(r"\\") {
        Some(rest) => rest.split_once(':').map_or(path, |(_, object)| object),
        None => path,
    };
    object.split(['.', '=']).next().unwrap_or(object)
}

/// The query for what is associated with an object; an empty class name means "any".
#[must_use]
pub fn associators(path: &str, assoc_class: &str, result_class: &str) -> String {
    let mut conditions = Vec::new();
    if !assoc_class.is_empty() {
        conditions.push(format!("AssocClass = {assoc_class}"));
    }
    if !result_class.is_empty() {
        conditions.push(format!("ResultClass = {result_class}"));
    }
    let filter = if conditions.is_empty() {
        String::new()
    } else {
        format!(" WHERE {}", conditions.join(" "))
    };
    format!("ASSOCIATORS OF {{{path}}}{filter}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart_and_put_together() {
        let place = Place { server: "H".into(), namespace: r"root\v2".into() };
        assert_eq!(relative(r#"\\h\ROOT\V2:A.B="c:d""#, &place), r#"A.B="c:d""#);
        assert_eq!(relative(r#"\\other\root\v2:A.B="c""#, &place), r#"\\other\root\v2:A.B="c""#);
        assert_eq!(relative("A.B=1", &place), "A.B=1");
        assert_eq!(relative(r"\\", &place), r"\\");
        assert_eq!(absolute("A.B=1", &place), r"\\H\root\v2:A.B=1");
        assert_eq!(absolute(r"\\x\y:A", &place), r"\\x\y:A");
        assert_eq!(
            associators("A=1", "L", "B"),
            "ASSOCIATORS OF {A=1} WHERE AssocClass = L ResultClass = B"
        );
        assert_eq!(associators("A=1", "", ""), "ASSOCIATORS OF {A=1}");
        for path in ["A", "A=@", r#"A.B="x.y""#, r"\\h\root\v2:A.B=1"] {
            assert_eq!(class_of(path), "A", "{path}");
        }
    }
}
