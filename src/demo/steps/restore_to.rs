//! restore-to: the first and the last point of every VM as VHDX files in the user's folder.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::Figures;
use crate::demo::setup::same_disk;
use crate::demo::stage::Stage;
use crate::report::Failure;

/// Where to.
#[derive(Debug, Clone)]
pub(in crate::demo) struct RestoreTo(pub(in crate::demo) PathBuf);

impl RestoreTo {
    fn file(&self, disk: &str, which: &str) -> PathBuf {
        self.0.join(format!("{disk}-{which}.vhdx"))
    }
}

/// Makes the folder and refuses to overwrite anything, before the story begins.
pub(in crate::demo) fn check_target<'a>(
    to: &RestoreTo,
    disks: impl Iterator<Item = &'a str>,
) -> Result<(), Failure> {
    std::fs::create_dir_all(&to.0)
        .map_err(|e| Failure::from(e).during(format!("cannot make {}", to.0.display())))?;
    for disk in disks {
        for file in ["first", "last"].map(|which| to.file(disk, which)) {
            if file.exists() {
                return Err(Failure::refused(format!(
                    "{} exists and is not overwritten",
                    file.display()
                ))
                .hint("Move it away, or give another folder to --restore-to."));
            }
        }
    }
    Ok(())
}

pub(in crate::demo) async fn run(stage: &mut Stage, to: &RestoreTo) -> Result<Figures, Failure> {
    let mut files = Vec::new();
    for vm in 0..stage.vms.len() {
        let points = &stage.vms[vm].points;
        let (Some(first), Some(last)) = (points.first().cloned(), points.last().cloned()) else {
            return Err(Failure::new(format!("{:?} has no recovery point", stage.vms[vm].name)));
        };
        // Beside the target, so that the finished file only has to be renamed.
        let scratch = to.0.join(format!(".outrider-{}", stage.vms[vm].guid));
        for (which, point_id) in [("first", first), ("last", last)] {
            let folder = scratch.join(which);
            let disks = stage.export(vm, &point_id, &folder).await?;
            if which == "last" {
                let point = stage.point(vm, &point_id).await?;
                stage.compare(vm, &point, &disks).await?;
            }
            for (place, file) in disks.iter().enumerate() {
                let disk = stage.vms[vm].disks[place].clone();
                if which == "first" {
                    same_disk(disk.source.clone(), file.clone()).await?;
                }
                let target = to.file(&disk.name, which);
                rename(file, &target)?;
                files.push(target);
            }
        }
        std::fs::remove_dir_all(&scratch)?;
        stage.tell.note(format!(
            "{}: the first point is the given disk, the last one its last checkpoint, byte for byte",
            stage.vms[vm].name
        ));
    }
    Ok(super::figures([("files", json!(files))]))
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    std::fs::rename(from, to)
        .map_err(|e| Failure::from(e).during(format!("cannot put {} in its place", to.display())))
}
