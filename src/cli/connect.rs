//! How an operator's command finds the fabric: options, environment, or a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use outrider_process::config;
use outrider_process::identity::Identity;
use serde::Deserialize;

use crate::operator::Operator;
use crate::report::Failure;

/// Where the coordinators are and who we are.
#[derive(Debug, Clone, Args)]
pub(crate) struct Connection {
    /// Addresses of the coordinators, ip:port
    #[arg(
        long,
        env = "OUTRIDER_COORDINATORS",
        value_delimiter = ',',
        global = true,
        value_name = "A,B,C"
    )]
    coordinators: Vec<String>,
    /// Folder of an operator's identity (ca.pem, cert.pem, key.pem, sign.pk8)
    #[arg(long, env = "OUTRIDER_IDENTITY", global = true, value_name = "DIR")]
    identity: Option<PathBuf>,
    /// A file with `coordinators` and `identity`
    #[arg(long, env = "OUTRIDER_CONFIG", global = true, value_name = "FILE")]
    operator_config: Option<PathBuf>,
    /// How long to look for a coordinator that leads
    #[arg(long, default_value = "15s", value_parser = super::duration, global = true, value_name = "TIME")]
    patience: Duration,
}

/// The file; the default place is `~/.config/outrider/operator.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct OperatorFile {
    #[serde(default)]
    coordinators: Vec<String>,
    identity: Option<PathBuf>,
}

impl Connection {
    /// Loads the identity and makes the client; nothing is sent yet.
    pub(crate) fn open(&self) -> Result<Operator, Failure> {
        let file = self.file()?;
        let members = if self.coordinators.is_empty() {
            file.coordinators
        } else {
            self.coordinators.clone()
        };
        let identity = self.identity.clone().or(file.identity);
        let (false, Some(identity)) = (members.is_empty(), identity) else {
            return Err(Failure::usage("no fabric to talk to").hint(
                "Give --coordinators A,B,C and --identity DIR, set OUTRIDER_COORDINATORS and OUTRIDER_IDENTITY, or \
                 write both into ~/.config/outrider/operator.toml. `outrider demo --keep` makes a fabric to try.",
            ));
        };
        let identity = Identity::load(&identity)?;
        Ok(Operator::new(members, Arc::new(identity), self.patience))
    }

    fn file(&self) -> Result<OperatorFile, Failure> {
        if let Some(path) = &self.operator_config {
            return Ok(config::load(path)?);
        }
        let default = std::env::var_os("XDG_CONFIG_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")))
            .map(|folder| folder.join("outrider").join("operator.toml"));
        match default {
            Some(path) if path.is_file() => Ok(config::load(&path)?),
            _ => Ok(OperatorFile::default()),
        }
    }
}
