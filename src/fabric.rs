//! A new fabric on disk: its id, its certificate authority, its key-encryption key, and identities for its members.
//!
//! ```text
//! DIR/fabric-id                 the id, as the configuration files want it
//! DIR/ca/ca.pem, ca.key         the authority; the key goes to a safe place
//! DIR/enrolment/enrol.pem, enrol.key   lets coordinators sign hosts and storage nodes that join by a token
//! DIR/kek                       wraps all other keys; only coordinators need it
//! DIR/coordinators/NAME/...     an identity directory each
//! DIR/storage/NAME/... DIR/nodes/NAME/... DIR/operators/NAME/...
//! ```

pub(crate) mod join;
pub(crate) mod token;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use outrider_process::fs;
use outrider_process::identity::Role;
use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::enrolment::SealedEnrolment;
use outrider_process::secret::kek::KeyEncryptionKey;
use outrider_proto::ids::FabricId;
use serde_json::json;

use crate::cli::{Done, duration};
use crate::output;
use crate::report::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a new fabric
    Init(Init),
    /// Issue one more identity
    Issue(Issue),
    /// Tokens by which hosts and storage nodes join by themselves
    #[command(subcommand)]
    Token(token::Command),
    /// Join with this machine: its own keys, signed by the coordinators
    Join(join::Join),
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// A folder that does not exist yet, or is empty
    #[arg(long)]
    dir: PathBuf,
    /// A coordinator; may be given several times
    #[arg(long = "coordinator", value_name = "NAME")]
    coordinators: Vec<String>,
    /// A storage node
    #[arg(long = "storage", value_name = "NAME")]
    storage: Vec<String>,
    /// A node agent, named as its host
    #[arg(long = "node", value_name = "NAME")]
    nodes: Vec<String>,
    /// An operator
    #[arg(long = "operator", value_name = "NAME")]
    operators: Vec<String>,
    /// How long the identities are valid
    #[arg(long, default_value = "365d", value_parser = duration, value_name = "TIME")]
    valid: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Issue {
    /// The fabric's folder
    #[arg(long)]
    dir: PathBuf,
    /// What it is for
    #[arg(value_enum)]
    role: Kind,
    /// Its name
    name: String,
    /// How long it is valid
    #[arg(long, default_value = "365d", value_parser = duration, value_name = "TIME")]
    valid: Duration,
}

/// Folder of the enrolment authority.
const ENROLMENT: &str = "enrolment";

/// Roles as they are typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    Coordinator,
    Storage,
    Node,
    Operator,
}

impl From<Kind> for Role {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Coordinator => Self::Coordinator,
            Kind::Storage => Self::Storage,
            Kind::Node => Self::Node,
            Kind::Operator => Self::Operator,
        }
    }
}

/// A fabric's folder.
#[derive(Debug)]
pub(crate) struct Fabric {
    dir: PathBuf,
    ca: FabricCa,
}

impl Fabric {
    /// Makes a fabric in a folder that is empty or not there.
    pub(crate) fn create(dir: &Path) -> Result<Self, Failure> {
        let occupied = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
        if occupied {
            return Err(Failure::refused(format!("{} is not empty; nothing was written", dir.display()))
                .hint("Choose a new folder: a fabric's keys are never overwritten. `outrider fabric issue` adds members."));
        }
        let id = FabricId::random();
        let ca = FabricCa::create(&id.to_string())?;
        fs::create_dir_durable(dir)?;
        // The authority is written last: a folder with `ca/ca.pem` is complete.
        let kek = KeyEncryptionKey::generate();
        fs::write_private(&dir.join("kek"), kek.to_text().expose())?;
        ca.enrolment(&kek)?.save(&dir.join(ENROLMENT))?;
        fs::write_atomic(&dir.join("fabric-id"), format!("{id}\n").as_bytes())?;
        ca.save(&dir.join("ca"))?;
        Ok(Self { dir: dir.to_owned(), ca })
    }

    fn open(dir: &Path) -> Result<Self, Failure> {
        Ok(Self { dir: dir.to_owned(), ca: FabricCa::load(&dir.join("ca"))? })
    }

    /// The fabric's id.
    pub(crate) fn id(&self) -> &str {
        self.ca.fabric()
    }

    /// The file of the key-encryption key.
    pub(crate) fn kek_file(&self) -> PathBuf {
        self.dir.join("kek")
    }

    /// Issues an identity and gives its folder.
    pub(crate) fn issue(
        &self,
        role: Role,
        name: &str,
        valid: Duration,
    ) -> Result<PathBuf, Failure> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return Err(Failure::usage(format!("{name:?} cannot be the name of a member"))
                .hint("Use a name without slashes that does not begin with a dot."));
        }
        let folder = match role {
            Role::Coordinator => "coordinators",
            Role::Storage => "storage",
            Role::Node => "nodes",
            Role::Operator => "operators",
        };
        let path = self.dir.join(folder).join(name);
        if path.exists() {
            return Err(Failure::refused(format!(
                "{} exists; nothing was written",
                path.display()
            ))
            .hint("Remove the folder first if this identity is to be replaced."));
        }
        self.ca.issue(role, name, valid)?.save(&path)?;
        if role == Role::Coordinator
            && let Some(enrolment) = SealedEnrolment::load(&self.dir.join(ENROLMENT))?
        {
            enrolment.save(&path)?;
        }
        Ok(path)
    }
}

pub(crate) async fn run(command: Command, json: bool) -> Done {
    let (fabric, issued) = match command {
        Command::Init(init) => {
            let fabric = Fabric::create(&init.dir)?;
            let members = [
                (Role::Coordinator, &init.coordinators),
                (Role::Storage, &init.storage),
                (Role::Node, &init.nodes),
                (Role::Operator, &init.operators),
            ];
            let mut issued = Vec::new();
            for (role, names) in members {
                for name in names {
                    issued.push((role, name.clone(), fabric.issue(role, name, init.valid)?));
                }
            }
            (fabric, issued)
        }
        Command::Issue(Issue { dir, role, name, valid }) => {
            let fabric = Fabric::open(&dir)?;
            let path = fabric.issue(role.into(), &name, valid)?;
            (fabric, vec![(role.into(), name, path)])
        }
        Command::Token(command) => return token::run(command, json).await,
        Command::Join(options) => return join::run(options, json).await,
    };
    if json {
        let issued: Vec<_> = issued
            .iter()
            .map(|(role, name, path)| json!({ "role": role.as_str(), "name": name, "identity_dir": path }))
            .collect();
        output::json(&json!({ "ok": true, "fabric": fabric.id(), "issued": issued }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("fabric  {}", fabric.id());
    let rows = issued
        .into_iter()
        .map(|(role, name, path)| [role.as_str().to_owned(), name, path.display().to_string()]);
    println!("{}", output::table(["role", "name", "identity"], rows.collect()));
    eprintln!(
        "keep {} and {} where nobody else can read them; without the key-encryption key no backup can be read",
        fabric.dir.join("ca").join("ca.key").display(),
        fabric.kek_file().display()
    );
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Exit;
    use outrider_process::identity::Identity;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn an_issued_identity_loads_and_its_keys_are_private() {
        let dir = tempfile::tempdir().expect("a folder");
        let fabric = Fabric::create(&dir.path().join("f")).expect("made");
        let path = fabric.issue(Role::Node, "호스트-1", DAY).expect("issued");
        let identity = Identity::load(&path).expect("loads");
        assert_eq!(identity.peer().name, "호스트-1");
        assert_eq!(identity.peer().fabric, fabric.id());
        outrider_process::secret::kek::load_kek(&fabric.kek_file()).expect("a key");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            for file in [fabric.kek_file(), path.join("key.pem"), dir.path().join("f/ca/ca.key")] {
                let mode = std::fs::metadata(&file).expect("is there").permissions().mode();
                assert_eq!(mode & 0o077, 0, "{}", file.display());
            }
        }
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("a folder");
        let fabric = Fabric::create(dir.path()).expect("an empty folder is fine");
        let before = std::fs::read(fabric.kek_file()).expect("a key");
        assert_eq!(Fabric::create(dir.path()).expect_err("occupied").exit(), Exit::Refused);
        assert_eq!(std::fs::read(fabric.kek_file()).expect("a key"), before);
        fabric.issue(Role::Storage, "s1", DAY).expect("issued");
        assert_eq!(
            fabric.issue(Role::Storage, "s1", DAY).expect_err("twice").exit(),
            Exit::Refused
        );
        assert_eq!(
            fabric.issue(Role::Storage, "../x", DAY).expect_err("a path").exit(),
            Exit::Usage
        );
    }
}
