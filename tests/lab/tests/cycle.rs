//! The backup sequence on real VHDX files, and what Hyper-V refuses in it.

mod support;

use outrider_disk::{DiskChain, RawDisk, ReadDisk};
use outrider_lab::{
    CheckpointOnMigration, Comparison, CreateVm, DiskSource, Fault, FaultKind, GuestWrite,
};
use outrider_wmi::files::HostFiles;
use outrider_wmi::{NS_CLUSTER, NS_VIRTUALIZATION, Object, Value, Wmi, WmiError, embedded};
use support::{
    IMAGE_SERVICE, Lab, MANAGEMENT_SERVICE, MIB, REFERENCE_SERVICE, SNAPSHOT_SERVICE, args,
    checkpoint_id, code, guid, rct_id, snapshot_args, vm_path,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_cycle_freezes_converts_and_reports_exactly_what_changed() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 64 * MIB).await;
    let agent = lab.agent("alpha").await;
    lab.control.guest_write(GuestWrite::scattered("vm", 5 * MIB, 1)).await.expect("written");

    let first = agent.checkpoint(&vm).await;
    assert_eq!(first.str("VirtualSystemType"), Some("Microsoft:Hyper-V:Snapshot:Recovery"));
    let frozen = agent.frozen(&first).await;
    lab.control.guest_write(GuestWrite::at("vm", 0, 3 * MIB + 5, 10, 2)).await.expect("written");
    assert_eq!(lab.state(&vm).await.disks[0].chain.len(), 2);
    let same = lab.control.compare_disk(&frozen[0], checkpoint_id(&first), 0).await;
    assert_eq!(same.expect("compared"), Comparison::Identical);
    let point = agent.convert(&first).await;
    lab.no_merge(&vm).await;
    let state = lab.state(&vm).await;
    assert_eq!((state.disks[0].chain.len(), state.checkpoints.len()), (1, 0));

    lab.control.guest_write(GuestWrite::at("vm", 0, 40 * MIB, 1, 3)).await.expect("written");
    let second = agent.checkpoint(&vm).await;
    lab.control.guest_write(GuestWrite::at("vm", 0, 50 * MIB, 1, 4)).await.expect("written");
    let frozen = agent.frozen(&second).await;
    let changed = agent.changes(&frozen[0], &rct_id(&point), 64 * MIB).await.expect("tracked");
    assert_eq!(changed, vec![(3 * MIB, 64 << 10), (40 * MIB, 64 << 10)]);
    agent.destroy(&second).await;
    lab.no_merge(&vm).await;
    let chain = lab.state(&vm).await.disks[0].chain.clone();
    lab.control.stop_vm("vm").await.expect("stopped");
    let differs = lab.control.compare_disk(&chain[0], checkpoint_id(&second), 0).await;
    assert_eq!(differs.expect("compared"), Comparison::DiffersAt { offset: 50 * MIB });
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_recovery_checkpoint_is_refused_while_one_exists() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let first = agent.checkpoint(&vm).await;
    let again = agent.call(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(&vm)).await;
    assert_eq!(code(&again), 32775);
    let stuck = lab.control.set_fault(Fault::new(FaultKind::StuckMerge)).await.expect("set");
    agent.destroy(&first).await;
    let merging = agent.call(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(&vm)).await;
    assert_eq!(code(&merging), 32775, "a merge is pending");
    let system = agent.wmi.get(NS_VIRTUALIZATION, &vm_path(&vm)).await.expect("there");
    assert_eq!(system.array("OperationalStatus")[1].as_u64(), Some(32772));
    lab.control.clear_fault(stuck).await.expect("cleared");
    lab.no_merge(&vm).await;
    agent.checkpoint(&vm).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_reference_point_is_unusable() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let first = agent.checkpoint(&vm).await;
    let point = agent.convert(&first).await;
    lab.no_merge(&vm).await;
    let second = agent.checkpoint(&vm).await;
    let frozen = agent.frozen(&second).await;
    assert!(agent.changes(&frozen[0], &rct_id(&point), 16 * MIB).await.is_ok());
    let gone = args(&[("AffectedReferencePoint", Value::Ref(point.path.clone()))]);
    agent.succeed(REFERENCE_SERVICE, "DestroyReferencePoint", gone).await;
    let refused = agent.changes(&frozen[0], &rct_id(&point), 16 * MIB).await;
    assert_eq!(refused, Err(0xC03A_0029));
    assert!(matches!(
        agent.wmi.get(NS_VIRTUALIZATION, &point.path).await,
        Err(WmiError::NotFound { .. })
    ));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tracking_ends_with_an_applied_checkpoint_a_resize_a_replacement_and_a_storage_move() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    for reason in ["applied", "resized", "replaced", "moved", "lost"] {
        let base = agent.checkpoint(&vm).await;
        let point = agent.convert(&base).await;
        lab.no_merge(&vm).await;
        match reason {
            "applied" => {
                let user = lab.control.user_checkpoint("vm", "before").await.expect("made");
                lab.control.guest_write(GuestWrite::at("vm", 0, 0, 100, 5)).await.expect("written");
                lab.control.apply_checkpoint("vm", user).await.expect("applied");
                lab.control.delete_checkpoint("vm", user).await.expect("deleted");
                lab.no_merge(&vm).await;
            }
            "resized" => lab.control.resize_disk("vm", 0, 24 * MIB).await.expect("resized"),
            "replaced" => {
                let with = DiskSource::Empty { size: 24 * MIB, block_size: 0 };
                lab.control.replace_disk("vm", 0, with).await.expect("replaced");
            }
            "moved" => lab.control.migrate_storage("vm", "Volume2").await.expect("moved"),
            _ => lab.control.lose_rct("vm").await.expect("lost"),
        }
        let next = agent.checkpoint(&vm).await;
        let frozen = agent.frozen(&next).await;
        let refused = agent.changes(&frozen[0], &rct_id(&point), 16 * MIB).await;
        assert_eq!(refused, Err(0xC03A_0029), "{reason}");
        agent.destroy(&next).await;
        lab.no_merge(&vm).await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_are_paired_by_identifier_and_pass_through_disks_are_left_out() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let empty = || DiskSource::Empty { size: 16 * MIB, block_size: 0 };
    let disks = vec![empty(), DiskSource::PassThrough, empty()];
    let new = CreateVm::new("vm", "alpha", "Volume1", disks);
    let vm = lab.control.create_vm(new).await.expect("made");
    let agent = lab.agent("alpha").await;
    let first = agent.checkpoint(&vm).await;
    assert_eq!(agent.frozen(&first).await.len(), 2);
    let point = agent.convert(&first).await;
    lab.no_merge(&vm).await;
    lab.control.guest_write(GuestWrite::at("vm", 2, MIB, 1, 1)).await.expect("written");
    let second = agent.checkpoint(&vm).await;
    let frozen = agent.frozen(&second).await;
    let ids = point.array("ResilientChangeTrackingIdentifiers");
    let names = point.array("VirtualDiskIdentifiers");
    let at = names.iter().position(|n| n.as_str().is_some_and(|n| n.ends_with(r"\2\L")));
    let id = ids[at.expect("the third disk")].as_str().expect("an id");
    let changed = agent.changes(&frozen[1], id, 16 * MIB).await.expect("tracked");
    assert_eq!(changed, vec![(MIB, 64 << 10)]);
    let rasd = agent
        .query("SELECT * FROM Msvm_ResourceAllocationSettingData WHERE ResourceSubType='Microsoft:Hyper-V:Physical Disk Drive'")
        .await;
    // That of the VM, and the one that the checkpoint's definition names though it holds no byte of it.
    assert_eq!(rasd.len(), 2, "{rasd:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_come_as_often_as_told_and_in_the_shape_of_the_real_thing() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let busy = FaultKind::MethodReturns { method: "CreateSnapshot".into(), code: 32774 };
    let writer = FaultKind::JobFails {
        method: "CreateSnapshot".into(),
        code: 32768,
        description: "a VSS writer failed".into(),
    };
    lab.control.set_fault(Fault::new(busy).on_vm("vm").times(2)).await.expect("set");
    lab.control.set_fault(Fault::new(writer).times(1)).await.expect("set");
    let create = || agent.call(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(&vm));
    assert_eq!(code(&create().await), 32774);
    assert_eq!(code(&create().await), 32774);
    let failed = agent.job(&create().await).await;
    assert_eq!((failed.u64("JobState"), failed.u64("ErrorCode")), (Some(10), Some(32768)));
    assert_eq!(failed.str("ErrorDescription"), Some("a VSS writer failed"));
    lab.control.set_vss("vm", false).await.expect("set");
    let no_vss = agent.job(&create().await).await;
    assert_eq!(no_vss.u64("ErrorCode"), Some(32768));
    lab.control.set_vss("vm", true).await.expect("set");
    agent.checkpoint(&vm).await;
    let calls = lab.control.call_log(Some("alpha")).await.expect("a log");
    let codes: Vec<u32> = calls.iter().filter(|c| c.vm == Some(vm.id)).map(|c| c.code).collect();
    assert_eq!(codes, vec![32774, 32774, 4096, 4096, 4096]);
    let low = FaultKind::LowSpace { csv: "Volume1".into(), free: 7 << 20 };
    lab.control.set_fault(Fault::new(low)).await.expect("set");
    let csvs = agent
        .wmi
        .query(NS_CLUSTER, "SELECT * FROM MSCluster_DiskPartition WHERE VolumeLabel='Volume1'")
        .await
        .expect("an answer");
    assert_eq!(csvs[0].u64("FreeSpace"), Some(7), "MiB");
    assert!(csvs[0].str("Path").is_some_and(|p| p.starts_with(r"\\?\Volume{")));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_renamed_and_its_disks_described() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let mut made = agent.checkpoint(&vm).await;
    made.set("ElementName", "Outrider <job & 1>");
    let rename = args(&[("SystemSettings", embedded::to_text(&made).into())]);
    agent.succeed(MANAGEMENT_SERVICE, "ModifySystemSettings", rename).await;
    let wql = format!(
        "SELECT * FROM Msvm_VirtualSystemSettingData WHERE VirtualSystemIdentifier='{}' AND ElementName LIKE 'Outrider%'",
        guid(&vm)
    );
    assert_eq!(agent.query(&wql).await.len(), 1);
    let leaf = lab.state(&vm).await.disks[0].chain[1].clone();
    let path = args(&[("Path", leaf.display().to_string().into())]);
    let out = agent.call(IMAGE_SERVICE, "GetVirtualHardDiskSettingData", path).await;
    let facts: Object =
        embedded::from_text(out.str("SettingData").expect("text")).expect("an instance");
    assert_eq!((facts.u64("Type"), facts.u64("MaxInternalSize")), (Some(4), Some(16 * MIB)));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_any_unicode_work_everywhere() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let name = "Größe 数据库 \u{1F5A5} 'q\"uote\\ /<&>";
    let vm = lab.vm(name, 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    let escaped = name.replace('\\', r"\\").replace('\'', r"\'");
    let wql = format!("SELECT * FROM Msvm_ComputerSystem WHERE ElementName='{escaped}'");
    assert_eq!(agent.query(&wql).await.len(), 1);
    lab.control.guest_write(GuestWrite::scattered(name, MIB, 1)).await.expect("written");
    let made = agent.checkpoint(&vm).await;
    let frozen = agent.frozen(&made).await;
    let same = lab.control.compare_disk(&frozen[0], checkpoint_id(&made), 0).await;
    assert_eq!(same.expect("compared"), Comparison::Identical);
    agent.convert(&made).await;
    lab.no_merge(&vm).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_imports_realizes_becomes_clustered_and_starts() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    lab.control.guest_write(GuestWrite::scattered("vm", MIB, 1)).await.expect("written");
    let alpha = lab.agent("alpha").await;
    let made = alpha.checkpoint(&vm).await;
    let frozen = alpha.frozen(&made).await;
    let root = made.str("ConfigurationDataRoot").expect("a folder");
    let file = made.str("ConfigurationFile").expect("a file");
    let folder = lab.folder.path().join("Volume2").join("restored");
    std::fs::create_dir_all(&folder).expect("a folder");
    let definition = folder.join("config.vmcx");
    std::fs::copy(std::path::Path::new(root).join(file), &definition).expect("copied");
    let disk = folder.join("disk.vhdx");
    std::fs::copy(&frozen[0], &disk).expect("copied");

    let beta = lab.agent("beta").await;
    let import = args(&[
        ("SystemDefinitionFile", definition.display().to_string().into()),
        ("GenerateNewSystemIdentifier", true.into()),
    ]);
    let job = beta.succeed(MANAGEMENT_SERVICE, "ImportSystemDefinition", import).await;
    let planned = beta.affected(&job, "Msvm_PlannedComputerSystem").await.remove(0);
    let settings = beta
        .wmi
        .associators(NS_VIRTUALIZATION, &planned.path, "Msvm_SettingsDefineState", "")
        .await
        .expect("settings")
        .remove(0);
    assert_eq!(settings.str("VirtualSystemType"), Some("Microsoft:Hyper-V:System:Planned"));
    let reference = || args(&[("PlannedSystem", Value::Ref(planned.path.clone()))]);
    let early = beta.call(MANAGEMENT_SERVICE, "RealizePlannedSystem", reference()).await;
    assert_eq!(beta.job(&early).await.u64("JobState"), Some(10), "its disk is another VM's");
    let mut slot = beta
        .wmi
        .associators(
            NS_VIRTUALIZATION,
            &settings.path,
            "Msvm_VirtualSystemSettingDataComponent",
            "Msvm_StorageAllocationSettingData",
        )
        .await
        .expect("disks")
        .remove(0);
    slot.set("HostResource", vec![disk.display().to_string()]);
    let place = args(&[("ResourceSettings", vec![embedded::to_text(&slot)].into())]);
    beta.succeed(MANAGEMENT_SERVICE, "ModifyResourceSettings", place).await;
    let mut renamed = settings.clone();
    renamed.set("ElementName", "restored");
    let rename = args(&[("SystemSettings", embedded::to_text(&renamed).into())]);
    beta.succeed(MANAGEMENT_SERVICE, "ModifySystemSettings", rename).await;
    beta.succeed(MANAGEMENT_SERVICE, "ValidatePlannedSystem", reference()).await;
    let job = beta.succeed(MANAGEMENT_SERVICE, "RealizePlannedSystem", reference()).await;
    let restored = beta.affected(&job, "Msvm_ComputerSystem").await.remove(0);
    let id = restored.str("Name").expect("a GUID").to_owned();

    let clusters = beta.wmi.query(NS_CLUSTER, "SELECT * FROM MSCluster_Cluster").await;
    let add = args(&[("VirtualMachine", id.as_str().into())]);
    let path = clusters.expect("a cluster").remove(0).path;
    let out = beta.wmi.exec_method(NS_CLUSTER, &path, "AddVirtualMachine", add).await;
    assert_eq!(code(&out.expect("an answer")), 0);
    let start = args(&[("RequestedState", 2_u32.into())]);
    let start = || {
        beta.wmi.exec_method(NS_VIRTUALIZATION, &restored.path, "RequestStateChange", start.clone())
    };
    let refused = beta.job(&start().await.expect("an answer")).await;
    let why = refused.str("ErrorDescription").unwrap_or_default();
    assert!(why.contains("General access denied"), "nobody gave its account rights: {why}");
    let vm_id = lab.control.vm("restored").await.expect("there").id;
    let (files, folder) = (beta.files.clone(), disk.parent().expect("a folder").to_owned());
    let granted = tokio::task::spawn_blocking(move || files.grant(vm_id, &folder)).await;
    granted.expect("not stopped").expect("granted");
    assert_eq!(beta.job(&start().await.expect("an answer")).await.u64("JobState"), Some(7));
    let state = lab.control.vm("restored").await.expect("there");
    assert_eq!((state.enabled_state, state.owner.as_deref()), (2, Some("beta")));
    assert_ne!(state.id, vm.id);
    let wql = format!(
        "SELECT * FROM MSCluster_Resource WHERE Type='Virtual Machine' AND PrivateProperties.VmID='{id}'"
    );
    let resource = beta.wmi.query(NS_CLUSTER, &wql).await.expect("an answer");
    assert_eq!(resource[0].str("OwnerNode"), Some("beta"));
    let same = lab.control.compare_disk(&disk, checkpoint_id(&made), 0).await;
    assert_eq!(same.expect("compared"), Comparison::Identical);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_truth_is_the_frozen_bytes_while_the_guest_writes_on() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 32 * MIB).await;
    lab.control.guest_write(GuestWrite::scattered("vm", 8 * MIB, 3)).await.expect("written");
    let agent = lab.agent("alpha").await;
    let made = agent.checkpoint(&vm).await;
    lab.control.guest_write(GuestWrite::scattered("vm", 8 * MIB, 4)).await.expect("written");
    let id = checkpoint_id(&made);
    let raw = lab.control.truth_path("vm", id, 0).await.expect("an answer").expect("kept");
    let frozen = DiskChain::open(&agent.frozen(&made).await[0]).expect("opens");
    let truth = RawDisk::open(raw).expect("opens");
    let differs = outrider_disk::compare::first_difference(&truth, &frozen).expect("compared");
    assert_eq!((differs, truth.info().size), (None, 32 * MIB));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_rewritten_in_place_while_the_vm_was_off_has_lost_its_tracking() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 16 * MIB).await;
    let agent = lab.agent("alpha").await;
    for rewritten in [false, true] {
        let base = agent.checkpoint(&vm).await;
        let point = agent.convert(&base).await;
        lab.no_merge(&vm).await;
        let leaf = lab.state(&vm).await.disks[0].chain[0].clone();
        lab.control.stop_vm("vm").await.expect("stopped");
        if rewritten {
            let mut writer = outrider_disk::vhdx::VhdxWriter::open(&leaf).expect("opens");
            writer.write_at(9 * MIB, b"restored").expect("written");
            writer.close().expect("closed");
        }
        lab.control.start_vm("vm").await.expect("started");
        let next = agent.checkpoint(&vm).await;
        let frozen = agent.frozen(&next).await;
        let changes = agent.changes(&frozen[0], &rct_id(&point), 16 * MIB).await;
        let expected = if rewritten { Err(0xC03A_0029) } else { Ok(Vec::new()) };
        assert_eq!(changes, expected);
        agent.destroy(&next).await;
        lab.no_merge(&vm).await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_tells_its_facts_while_the_guest_writes_to_it() {
    let lab = Lab::start(CheckpointOnMigration::Travels).await;
    let vm = lab.vm("vm", 64 * MIB).await;
    let agent = lab.agent("alpha").await;
    agent.checkpoint(&vm).await;
    let leaf = lab.state(&vm).await.disks[0].chain[1].display().to_string();
    let mut id = None;
    for round in 0..20 {
        let write = lab.control.guest_write(GuestWrite::scattered("vm", 4 * MIB, round));
        let path = args(&[("Path", leaf.as_str().into())]);
        let ask = agent.call(IMAGE_SERVICE, "GetVirtualHardDiskSettingData", path);
        let (written, out) = tokio::join!(write, ask);
        assert_eq!((written.expect("written"), code(&out)), (4 * MIB, 0));
        let facts = embedded::from_text(out.str("SettingData").expect("text")).expect("facts");
        assert_eq!(facts.u64("MaxInternalSize"), Some(64 * MIB));
        let told = facts.str("VirtualDiskId").map(str::to_owned);
        assert!(told.is_some() && id.replace(told.clone()).is_none_or(|before| before == told));
    }
    lab.stop().await;
}
