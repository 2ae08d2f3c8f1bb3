//! Before the story: disks, processes, VMs, and a fabric that has seen them all.

use std::path::{Path, PathBuf};

use outrider_disk::{DiskChain, ReadDisk};
use outrider_lab::{CreateVm, DiskSource, LabControl};
use outrider_process::fs;
use outrider_proto::rpc;
use tokio::task::JoinSet;

use super::configs::{self, CSV, HOSTS, STORAGE, TRUTHS};
use super::disks::{self, DISK_SIZE, Files, GUEST_WINDOW, Recipe};
use super::given::{self, GivenDisk};
use super::processes::Processes;
use super::stage::{Disk, Lab, PATIENCE, Stage, Vm, operator};
use super::tell::Tell;
use crate::output::bytes;
use crate::report::Failure;

const MIB: u64 = 1 << 20;
/// What the three VMs of the machine's own files are called, and what is on their disks.
const OWN_VMS: [(&str, &[(&str, Recipe)]); 3] = [
    ("web", &[("web", Recipe { shared: 80 * MIB, own: 80 * MIB, part: 0 })]),
    ("büro-서버", &[("büro-서버", Recipe { shared: 80 * MIB, own: 60 * MIB, part: 1 })]),
    (
        "database",
        &[
            ("database", Recipe { shared: 80 * MIB, own: 40 * MIB, part: 2 }),
            ("database-data", Recipe { shared: 0, own: 40 * MIB, part: 3 }),
        ],
    ),
];
/// What the story writes and keeps apart from the disks.
const ASIDE: u64 = 1536 * MIB;

/// A VM to be made.
#[derive(Debug)]
pub(super) struct Plan {
    name: String,
    disks: Vec<Disk>,
}

impl Plan {
    /// Names of its disks.
    pub(super) fn disk_names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|d| d.name.as_str())
    }
}

/// Checks the given disks; nothing is written yet.
pub(super) async fn given_disks(
    files: Vec<PathBuf>,
    tell: Tell,
) -> Result<Vec<GivenDisk>, Failure> {
    tokio::task::spawn_blocking(move || given::check(&files, |line| tell.note(line))).await?
}

/// Refuses a folder without the space that the story needs.
pub(super) fn check_space(
    dir: &Path,
    given: &[GivenDisk],
    restore_to: Option<&Path>,
) -> Result<(), Failure> {
    let data: u64 = if given.is_empty() {
        OWN_VMS.iter().flat_map(|(_, disks)| *disks).map(|(_, r)| r.shared + r.own).sum()
    } else {
        given.iter().map(|g| g.allocated).sum()
    };
    // The VM's copy, the lab's copies of checkpoints, three copies in storage, one restored VM, one export at a time.
    let copies = 1 + TRUTHS as u64 + 1 + 3 + 1 + 1 + u64::from(given.is_empty());
    let mut wanted = vec![(dir, data * copies + ASIDE)];
    if let Some(to) = restore_to {
        wanted.push((to, data * 2 + ASIDE / 4));
    }
    for (folder, needed) in wanted {
        let free = fs::free_space(folder)?;
        if free < needed {
            return Err(Failure::refused(format!(
                "{} has {} free; the demo needs about {}",
                folder.display(),
                bytes(free),
                bytes(needed)
            ))
            .hint("Free some space, or choose another place with --dir."));
        }
    }
    Ok(())
}

/// Makes the plan of the VMs: from the given disks, or with disks made of this machine's files.
pub(super) async fn plan(
    dir: &Path,
    given: Vec<GivenDisk>,
    disks_per_vm: usize,
    tell: Tell,
) -> Result<Vec<Plan>, Failure> {
    let folder = dir.join("disks");
    std::fs::create_dir_all(&folder)?;
    if given.is_empty() {
        own_plan(&folder, tell).await
    } else {
        given_plan(&folder, given, disks_per_vm, tell)
    }
}

async fn own_plan(folder: &Path, tell: Tell) -> Result<Vec<Plan>, Failure> {
    let files = std::sync::Arc::new(tokio::task::spawn_blocking(Files::of_this_machine).await?);
    let mut making = JoinSet::new();
    let mut plans = Vec::new();
    for (name, recipes) in &OWN_VMS {
        let mut disks = Vec::new();
        for (disk, recipe) in *recipes {
            let source = folder.join(format!("{disk}.vhdx"));
            let (to, files) = (source.clone(), std::sync::Arc::clone(&files));
            making.spawn_blocking(move || disks::make(&to, recipe, &files).map(|n| (*disk, n)));
            disks.push(Disk {
                name: (*disk).into(),
                source,
                size: DISK_SIZE,
                window: GUEST_WINDOW,
            });
        }
        plans.push(Plan { name: (*name).into(), disks });
    }
    while let Some(made) = making.join_next().await {
        let (name, len) = made??;
        tell.note(format!(
            "disk {name}: a FAT32 file system with {} of this machine's files",
            bytes(len)
        ));
    }
    Ok(plans)
}

fn given_plan(
    folder: &Path,
    given: Vec<GivenDisk>,
    disks_per_vm: usize,
    tell: Tell,
) -> Result<Vec<Plan>, Failure> {
    let mut disks = Vec::new();
    for g in given {
        let mut source = g.path.clone();
        if g.differencing {
            source = folder.join(format!("{}.vhdx", g.name));
            given::flatten(&g.path, &source)?;
            tell.note(format!(
                "{} has parents; the VM gets one disk with what the guest sees",
                g.path.display()
            ));
        }
        tell.note(format!("disk {}: {} with {} in use", g.name, bytes(g.size), bytes(g.allocated)));
        disks.push(Disk { name: g.name, source, size: g.size, window: (0, g.size) });
    }
    let plans = disks.chunks(disks_per_vm.max(1));
    Ok(plans.map(|d| Plan { name: d[0].name.clone(), disks: d.to_vec() }).collect())
}

/// Starts everything and returns when the fabric has seen all hosts, storage nodes and VMs.
pub(super) async fn raise(
    dir: &Path,
    seed: u64,
    keep: bool,
    tell: Tell,
    plans: Vec<Plan>,
    processes: &mut Option<Processes>,
) -> Result<Stage, Failure> {
    let configs = configs::write(dir, seed, &configs::Hosts::Lab)?;
    // From here on the caller stops what was started, however this ends.
    let processes = processes.insert(Processes::new(dir, keep, tell)?);
    processes.start(vec![configs.lab.clone()]).await?;
    let lab = Lab(LabControl::connect(configs.lab_address).await?);
    let mut vms = Vec::new();
    for (index, plan) in plans.into_iter().enumerate() {
        let host = HOSTS[index % HOSTS.len()];
        let sources = plan.disks.iter().map(|d| DiskSource::CopyOf(d.source.clone())).collect();
        let mut new = CreateVm::new(&plan.name, host, CSV, sources);
        new.seed = new.seed.wrapping_add(seed);
        let made = lab.create_vm(new).await?;
        tell.note(format!("VM {:?} with {} disks runs on {host}", plan.name, plan.disks.len()));
        let chains = made.disks.iter().map(|d| d.chain.len()).collect();
        vms.push(Vm { name: plan.name, guid: made.id, disks: plan.disks, chains, points: vec![] });
    }
    let mut specs = configs.coordinator_specs.clone();
    specs.extend(configs.storage_specs.clone());
    specs.extend(configs.node_specs.clone());
    processes.start(specs).await?;
    let operator = operator(&configs)?;
    let stage = Stage {
        dir: dir.to_owned(),
        seed,
        tell,
        processes: std::mem::replace(processes, Processes::new(dir, keep, tell)?),
        configs,
        operator,
        lab,
        vms,
    };
    Ok(stage)
}

/// Waits until the fabric is whole, and makes the protection group.
pub(super) async fn settle(stage: &Stage) -> Result<rpc::StatusReply, Failure> {
    let wanted = stage.vms.len();
    let status = stage
        .until("three storage nodes, three hosts and all VMs in sight", PATIENCE, async || {
            let s = stage.operator.status().await?;
            let serving =
                s.storage.iter().filter(|n| n.node.as_ref().is_some_and(|n| n.online)).count();
            let layout = s.layout.as_ref().is_some_and(|l| l.epoch > 0);
            if layout
                && serving == STORAGE.len()
                && s.hosts_up as usize == HOSTS.len()
                && s.vms as usize >= wanted
            {
                return Ok(Ok(s));
            }
            Ok(Err(format!(
                "{serving} storage nodes, {} hosts, {} VMs, layout {layout}",
                s.hosts_up, s.vms
            )))
        })
        .await?;
    let request = rpc::CreateGroupRequest {
        name: super::GROUP.into(),
        vms: (0..wanted).map(|i| stage.key(i)).collect(),
        name_patterns: vec![],
        policy: Some(rpc::Policy::default()),
    };
    stage.operator.create_group(request).await?;
    Ok(status)
}

/// Whether a file is, for a guest, the same disk as another.
pub(super) async fn same_disk(a: PathBuf, b: PathBuf) -> Result<(), Failure> {
    tokio::task::spawn_blocking(move || {
        let (left, right) = (DiskChain::open(&a)?, DiskChain::open(&b)?);
        match outrider_disk::compare::first_difference(&left, &right)? {
            None => Ok(()),
            Some(at) => Err(Failure::new(format!(
                "{} differs from {} at byte {at} of {}",
                b.display(),
                a.display(),
                left.info().size
            ))),
        }
    })
    .await?
}
