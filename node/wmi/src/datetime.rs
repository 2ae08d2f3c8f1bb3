//! CIM datetime: `yyyymmddHHMMSS.mmmmmm+UUU`, the offset from UTC in minutes (DMTF DSP0004, section 5.2.4).

use jiff::civil::DateTime;
use jiff::tz::Offset;

/// The moment in Unix milliseconds; `None` for what is no moment: an interval, wildcards, the time before 1970.
pub(crate) fn unix_ms(text: &str) -> Option<u64> {
    let civil = DateTime::strptime("%Y%m%d%H%M%S%.f", text.get(..21)?).ok()?;
    let minutes: i32 = match text.get(21..22)? {
        "+" => text.get(22..25)?.parse().ok()?,
        "-" => -text.get(22..25)?.parse::<i32>().ok()?,
        _ => return None,
    };
    let offset = Offset::from_seconds(minutes.checked_mul(60)?).ok()?;
    u64::try_from(offset.to_timestamp(civil).ok()?.as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_read_with_its_offset_and_nothing_else_is() {
        assert_eq!(unix_ms("19700101000001.500000+000"), Some(1_500));
        assert_eq!(unix_ms("20241231235959.000000+000"), Some(1_735_689_599_000));
        assert_eq!(unix_ms("20250101005959.000000+060"), Some(1_735_689_599_000));
        assert_eq!(unix_ms("20241231165959.000000-420"), Some(1_735_689_599_000));
        for no in [
            "",
            "00000003123456.000000:000",
            "20241331235959.000000+000",
            "2024123123****.******+000",
            "19690101000000.000000+000",
            "20241231235959.000000+0",
            "2024123123595\u{e9}.000000+000",
        ] {
            assert_eq!(unix_ms(no), None, "{no}");
        }
    }
}
