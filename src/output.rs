//! What goes to standard output: tables for people, JSON for scripts. Talk goes to standard error.

use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value;

/// Prints one JSON value on one line.
pub(crate) fn json(value: &Value) {
    println!("{value}");
}

/// A table without frames: readable on a terminal, cut-able in a pipe.
pub(crate) fn table<const N: usize>(headers: [&str; N], rows: Vec<[String; N]>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if std::io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    table.set_header(headers.map(str::to_uppercase));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Aligns the named columns to the right: numbers.
pub(crate) fn right(mut table: Table, columns: &[usize]) -> Table {
    for &index in columns {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// "1.5 GiB"; exact below a KiB.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// "2.4 : 1"; a dash when there is nothing to compare.
pub(crate) fn ratio(whole: u64, part: u64) -> String {
    if part == 0 { "-".to_owned() } else { format!("{:.1} : 1", whole as f64 / part as f64) }
}

/// A point in time in local words, `-` for never.
pub(crate) fn time(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".to_owned();
    }
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(
            || "-".to_owned(),
            |t| t.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        )
}

/// "12 s ago", "3 min ago".
pub(crate) fn ago(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "never".to_owned();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let ago = now.saturating_sub(Duration::from_millis(unix_ms)).as_secs();
    match ago {
        0..120 => format!("{ago} s ago"),
        120..7200 => format!("{} min ago", ago / 60),
        7200..172_800 => format!("{} h ago", ago / 3600),
        _ => format!("{} d ago", ago / 86_400),
    }
}

/// "1.2 s".
pub(crate) fn millis(ms: u64) -> String {
    if ms < 1000 { format!("{ms} ms") } else { format!("{:.1} s", ms as f64 / 1000.0) }
}

/// `-` for an empty text.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_exact_when_small() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes(1_048_550), "1.0 MiB", "never 1024.0 KiB");
        assert_eq!(bytes(3 << 40), "3.0 TiB");
        assert_eq!(ratio(10, 4), "2.5 : 1");
        assert_eq!(ratio(10, 0), "-");
    }
}
