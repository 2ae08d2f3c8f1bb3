//! The network adapters of a restored VM, on its command line. Pure.

use uuid::Uuid;

/// Hubs of adapters that are connected to nothing else begin at this number: one of 0 is QEMU's own.
const ALONE: usize = 1000;

/// A copy of a VM must not answer to the original's hardware addresses.
pub(super) fn with_own_mac(argument: &str, uuid: Uuid) -> String {
    let mut out = argument.to_owned();
    for mark in ["mac=", "\"mac\":\"", "macaddr="] {
        let Some(at) = out.find(mark).map(|at| at + mark.len()) else { continue };
        let Some(old) = out.get(at..at + 17).map(str::to_owned) else { continue };
        if old
            .bytes()
            .enumerate()
            .all(|(i, b)| if i % 3 == 2 { b == b':' } else { b.is_ascii_hexdigit() })
        {
            let hash = blake3::keyed_hash(
                &blake3::hash(uuid.as_bytes()).into(),
                old.to_lowercase().as_bytes(),
            );
            let b = hash.as_bytes();
            out.replace_range(
                at..at + 17,
                &format!("52:54:00:{:02x}:{:02x}:{:02x}", b[0], b[1], b[2]),
            );
        }
    }
    out
}

/// The command line with every adapter on a hub of its own: the guest has them all, and none reaches anybody.
pub(super) fn disconnected(argv: &[String]) -> Vec<String> {
    let mut out: Vec<String> = Vec::with_capacity(argv.len());
    let mut hub = ALONE;
    let mut arguments = argv.iter().peekable();
    while let Some(argument) = arguments.next() {
        let option = argument.trim_start_matches('-');
        let network = argument.starts_with('-') && matches!(option, "netdev" | "nic" | "net");
        let value = if network { arguments.next() } else { None };
        let Some(value) = value else {
            out.push(argument.clone());
            continue;
        };
        let lone = match option {
            // Adapters of the old way are on QEMU's own hub; who else is on it goes.
            "net" => value.starts_with("nic").then(|| value.clone()),
            "nic" if value == "none" => Some(value.clone()),
            "nic" => Some(format!("hubport,hubid={hub}{}", kept(value, &["id", "model", "mac"]))),
            _ => Some(format!("hubport,hubid={hub}{}", kept(value, &["id"]))),
        };
        hub += 1;
        out.extend(lone.into_iter().flat_map(|value| [argument.clone(), value]));
    }
    out
}

/// `,key=value` of these keys, as they are in an option or in JSON.
fn kept(value: &str, keys: &[&str]) -> String {
    let json = serde_json::from_str::<serde_json::Value>(value).unwrap_or_default();
    let find = |key: &str| {
        let plain = value.split(',').find_map(|p| p.strip_prefix(key)?.strip_prefix('='));
        json[key].as_str().or(plain).map(|found| format!(",{key}={found}"))
    };
    keys.iter().filter_map(|key| find(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_stay_and_reach_nobody() {
        let made = |line: &str| {
            let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
            disconnected(&argv).join(" ")
        };
        assert_eq!(
            made(
                "qemu -netdev tap,ifname=tap0,id=n0 -device virtio-net-pci,netdev=n0 -nic user,model=e1000,mac=52:54:00:1:2:3"
            ),
            "qemu -netdev hubport,hubid=1000,id=n0 -device virtio-net-pci,netdev=n0 -nic hubport,hubid=1001,model=e1000,mac=52:54:00:1:2:3"
        );
        assert_eq!(
            made(r#"qemu -netdev {"type":"user","id":"a"} -net nic -net user -nic none -S"#),
            "qemu -netdev hubport,hubid=1000,id=a -net nic -nic none -S"
        );
    }
}
