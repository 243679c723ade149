//! Flags about the node's devices to the outside: node ports, and masquerading of pods.

use clap::Args;
use ipnet::IpNet;
use isthmus_bpf_abi::feature;
use isthmus_datapath::outside::DevicePattern;
use isthmus_runtime::command_line::FlagError;

/// As they are written.
#[derive(Clone, Debug, Args)]
pub struct OutsideArgs {
    /// Devices that lead outside: names, or beginnings of names and '+', with commas between. Default: those with a default
    /// route, and those that have the node's addresses.
    #[arg(long, env = "ISTHMUS_DEVICES", value_name = "NAMES", value_delimiter = ',')]
    devices: Vec<String>,
    /// Answer at these devices for node ports, load balancers' addresses and external IPs.
    #[arg(long, env = "ISTHMUS_ENABLE_NODE_PORT", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    enable_node_port: bool,
    /// Give pods' IPv4 packets that leave the mesh an address of the node as their source.
    #[arg(long, env = "ISTHMUS_ENABLE_IPV4_MASQUERADE", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    enable_ipv4_masquerade: bool,
    /// The same for IPv6.
    #[arg(long, env = "ISTHMUS_ENABLE_IPV6_MASQUERADE", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    enable_ipv6_masquerade: bool,
    /// IPv4 prefixes outside the mesh that pods reach from their own addresses, with commas between.
    #[arg(
        long,
        env = "ISTHMUS_IPV4_NATIVE_ROUTING_CIDR",
        value_name = "CIDRS",
        value_delimiter = ','
    )]
    ipv4_native_routing_cidr: Vec<String>,
    /// The same for IPv6.
    #[arg(
        long,
        env = "ISTHMUS_IPV6_NATIVE_ROUTING_CIDR",
        value_name = "CIDRS",
        value_delimiter = ','
    )]
    ipv6_native_routing_cidr: Vec<String>,
}

/// Checked.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Outside {
    /// Devices that were named; none: they are looked for.
    pub devices: Vec<DevicePattern>,
    /// Bits of `bpf-abi`'s `feature`.
    pub features: u32,
    /// Prefixes outside the mesh that pods reach from their own addresses.
    pub keep_source: Vec<IpNet>,
}

impl OutsideArgs {
    /// Prefixes in both flags together at most: with the node's own, less than half of what the map takes, for others may take
    /// their place before they go.
    const PREFIXES_MAX: usize = 500;

    /// Checks every value.
    pub fn check(&self) -> Result<Outside, FlagError> {
        let devices = written(&self.devices)
            .map(|text| {
                DevicePattern::new(text).ok_or_else(|| {
                    FlagError::new(
                        "devices",
                        text,
                        "it takes names of devices (1 to 15 characters), or beginnings of names and '+'",
                    )
                })
            })
            .collect::<Result<_, _>>()?;
        let mut keep_source = cidrs("ipv4-native-routing-cidr", &self.ipv4_native_routing_cidr, true)?;
        keep_source.extend(cidrs(
            "ipv6-native-routing-cidr",
            &self.ipv6_native_routing_cidr,
            false,
        )?);
        let bit = |wanted: bool, bit: u32| if wanted { bit } else { 0 };
        Ok(Outside {
            devices,
            features: bit(self.enable_node_port, feature::NODE_PORT)
                | bit(self.enable_ipv4_masquerade, feature::MASQUERADE_IPV4)
                | bit(self.enable_ipv6_masquerade, feature::MASQUERADE_IPV6),
            keep_source,
        })
    }
}

/// What stands between the commas; an empty value is none.
fn written(values: &[String]) -> impl Iterator<Item = &str> {
    let all = values.iter().map(|value| value.trim());
    all.filter(move |value| !value.is_empty() || values.len() > 1)
}

fn cidrs(flag: &'static str, values: &[String], ipv4: bool) -> Result<Vec<IpNet>, FlagError> {
    let family = if ipv4 { "IPv4" } else { "IPv6" };
    if values.len() > OutsideArgs::PREFIXES_MAX / 2 {
        let max = OutsideArgs::PREFIXES_MAX / 2;
        return Err(FlagError::new(
            flag,
            format!("{} prefixes", values.len()),
            format!("it takes {max} at most"),
        ));
    }
    written(values)
        .map(|text| match text.parse::<IpNet>() {
            Ok(cidr) if cidr.addr().is_ipv4() == ipv4 => Ok(cidr.trunc()),
            _ => Err(FlagError::new(
                flag,
                text,
                format!(
                    "it takes {family} prefixes with commas between, such as {}",
                    if ipv4 { "10.0.0.0/8" } else { "fd00::/8" }
                ),
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        outside: OutsideArgs,
    }

    fn check(flags: &[&str]) -> Result<Outside, FlagError> {
        Only::parse_from(["test"].iter().chain(flags)).outside.check()
    }

    #[test]
    fn everything_is_on_and_devices_are_looked_for() {
        let outside = check(&[]).unwrap();
        let all = feature::NODE_PORT | feature::MASQUERADE_IPV4 | feature::MASQUERADE_IPV6;
        assert_eq!((outside.features, outside.devices.len()), (all, 0));
        assert_eq!(check(&["--devices="]).unwrap(), outside);
    }

    #[test]
    fn lists_are_read_and_each_part_can_be_switched_off() {
        let outside = check(&[
            "--devices=eth0,bond+",
            "--enable-node-port=false",
            "--enable-ipv6-masquerade=false",
            "--ipv4-native-routing-cidr=10.0.0.1/8, 172.16.0.0/12",
            "--ipv6-native-routing-cidr=fd00::/8",
        ])
        .unwrap();
        assert_eq!(outside.features, feature::MASQUERADE_IPV4);
        assert!(outside.devices[0].matches("eth0") && outside.devices[1].matches("bond7"));
        let text: Vec<_> = outside.keep_source.iter().map(IpNet::to_string).collect();
        assert_eq!(text, ["10.0.0.0/8", "172.16.0.0/12", "fd00::/8"]);
    }

    #[test]
    fn bad_values_name_their_flag() {
        for (flag, value) in [
            ("devices", "eth0,,eth1"),
            ("devices", "eth/0"),
            ("ipv4-native-routing-cidr", "fd00::/8"),
            ("ipv4-native-routing-cidr", "10.0.0.0/33"),
            ("ipv6-native-routing-cidr", "10.0.0.0/8"),
            ("ipv6-native-routing-cidr", "everything"),
        ] {
            let error = check(&[&format!("--{flag}={value}")]).unwrap_err();
            assert_eq!(error.flag, flag, "{value}");
        }
    }
}
