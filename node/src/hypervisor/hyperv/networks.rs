//! Which networks a failover cluster has for itself (requirement O8).

use std::net::IpAddr;

use outrider_process::network::Subnet;
use outrider_wmi::{Object, Value};

use super::HyperV;
use crate::hypervisor::error::HypervisorError;

/// Role of a network: cluster only. 0 is none (storage, or a network for backups), 2 and 3 let clients in.
const CLUSTER_ONLY: u64 = 1;

impl HyperV {
    pub(super) async fn networks_of_cluster(&self) -> Result<Vec<Subnet>, HypervisorError> {
        let doing = "look at the cluster's networks";
        let networks = self.cluster_query(doing, "SELECT * FROM MSCluster_Network").await?;
        Ok(networks
            .iter()
            .filter(|n| n.u64("Role") == Some(CLUSTER_ONLY))
            .flat_map(subnets)
            .collect())
    }
}

/// The subnets of a network, by its lists of both families; by its one address and mask where they are not told.
fn subnets(network: &Object) -> Vec<Subnet> {
    let listed = |addresses: &str, lengths: &str| -> Vec<Subnet> {
        let address = |v: &Value| v.as_str()?.trim().parse::<IpAddr>().ok();
        let bits = |v: &Value| v.as_u64().and_then(|n| u8::try_from(n).ok());
        let pairs = network.array(addresses).iter().zip(network.array(lengths));
        pairs.filter_map(|(a, b)| Subnet::of(address(a)?, bits(b)?)).collect()
    };
    let mut found = listed("IPv4Addresses", "IPv4PrefixLengths");
    found.extend(listed("IPv6Addresses", "IPv6PrefixLengths"));
    if found.is_empty() {
        let of = |name| network.str(name)?.trim().parse::<IpAddr>().ok();
        let masked = of("Address").zip(of("AddressMask"));
        found.extend(masked.and_then(|(address, mask)| Subnet::of(address, bits_of(mask)?)));
    }
    found
}

/// Leading ones of a mask; `None` for one that has others, too.
fn bits_of(mask: IpAddr) -> Option<u8> {
    let IpAddr::V4(mask) = mask else { return None };
    let bits = mask.to_bits();
    let ones = bits.leading_ones();
    (bits.count_ones() == ones).then(|| u8::try_from(ones).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_read_in_both_families_and_in_the_old_way() {
        let told = |network: Object| -> Vec<String> {
            subnets(&network).iter().map(ToString::to_string).collect()
        };
        let network = || Object::new("MSCluster_Network", "p").with("Role", 1_u32);
        let new = network()
            .with("IPv4Addresses", vec!["10.9.0.0", "broken"])
            .with("IPv4PrefixLengths", vec!["24", "24"])
            .with("IPv6Addresses", vec!["fd09::"])
            .with("IPv6PrefixLengths", vec!["64"]);
        assert_eq!(told(new), ["10.9.0.0/24", "fd09::/64"]);
        let old = |mask: &str| network().with("Address", "10.9.8.0").with("AddressMask", mask);
        assert_eq!(told(old("255.255.248.0")), ["10.9.8.0/21"]);
        assert_eq!(told(old("255.0.255.0")), Vec::<String>::new());
        assert_eq!(told(network()), Vec::<String>::new());
    }
}
