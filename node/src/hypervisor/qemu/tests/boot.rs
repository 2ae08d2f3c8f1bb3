//! Whether restored VMs boot, on real QEMU processes: disks whose boot sector says something, or that have none.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrider_proto::ids::{FabricId, VmGuid};
use serde_json::json;

use super::super::Qemu;
use super::real::{DEADLINE, Host, MIB, lease, qemu, qemu_is_missing};
use crate::hypervisor::{BootCheck, Booting, Hypervisor, Networks, NewVm, Sign};

/// Writes a text that ends with a zero to the first serial port, and halts.
fn says(text: &str) -> Vec<u8> {
    let mut code = vec![
        0x31, 0xc0, 0x8e, 0xd8, 0xfc, // xor ax,ax; mov ds,ax; cld
        0xbe, 0x16, 0x7c, // mov si,text
        0xac, 0x84, 0xc0, 0x74, 0x06, // lodsb; test al,al; jz end
        0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // mov dx,3f8h; out dx,al; jmp lodsb
        0xf4, 0xeb, 0xfd, // end: hlt; jmp end
    ];
    code.extend(text.bytes());
    code.push(0);
    boot_sector(code)
}

/// A picture of 640 x 480 in two colours that stays.
fn draws() -> Vec<u8> {
    boot_sector(vec![
        0xb8, 0x02, 0x4f, 0xbb, 0x01, 0x01, 0xcd, 0x10, // mode 101h by the VESA BIOS
        0xb8, 0x00, 0xa0, 0x8e, 0xc0, 0x31, 0xff, 0xb9, 0xff,
        0xff, // es:di = a000:0, cx = ffffh
        0xb0, 0x0f, 0xfc, 0xf3, 0xaa, // mov al,15; cld; rep stosb
        0xf4, 0xeb, 0xfd,
    ])
}

fn boot_sector(mut code: Vec<u8>) -> Vec<u8> {
    code.resize(510, 0);
    code.extend([0x55, 0xaa]);
    code
}

/// A VM that a restore has defined on a host, and its console's file.
struct Restored {
    agent: Arc<Qemu>,
    vm: VmGuid,
    console: PathBuf,
}

impl Restored {
    async fn new(folder: &Path, boot_sector: &[u8], more: &[&str]) -> Self {
        let host = Host::new(folder, FabricId::random());
        let agent = host.agent().await;
        let (disk, console) = (folder.join("d.raw"), folder.join("web.console"));
        let mut content = boot_sector.to_vec();
        content.resize(usize::try_from(MIB).expect("small"), 0);
        std::fs::write(&disk, content).expect("written");
        let socket = |id: &str, name: &str| {
            format!("socket,id={id},path={},server=on,wait=off", folder.join(name).display())
        };
        let mut argv: Vec<String> =
            [&*qemu().to_string_lossy(), "-name", "old", "-machine", "q35,accel=tcg,graphics=off"]
                .map(str::to_owned)
                .to_vec();
        let node = json!({ "driver": "raw", "node-name": "d0", "file": { "driver": "file", "filename": "/old.raw" } });
        let all = [
            "-m",
            "64",
            "-display",
            "none",
            "-nodefaults",
            "-chardev",
            &socket("outrider", "old.qmp"),
            "-mon",
            "chardev=outrider,mode=control",
            "-blockdev",
            &node.to_string(),
            "-device",
            "virtio-blk-pci,id=disk0,drive=d0",
            "-netdev",
            "tap,fd=99,id=n0",
            "-device",
            "virtio-net-pci,netdev=n0,romfile=,mac=52:54:00:00:00:01",
            "-chardev",
            &format!("file,id=c,append=on,path={}", folder.join("old.console").display()),
            "-serial",
            "chardev:c",
        ];
        argv.extend(all.iter().chain(more).map(|s| (*s).to_owned()));
        let definition = json!({
            "format": "outrider-qemu-vm/1", "name": "old", "uuid": VmGuid::random().to_string(), "argv": argv, "cwd": "/",
            "qmp": folder.join("old.qmp"), "qga": folder.join("old.qga"),
            "disks": [{ "slot": "disk0", "path": "/old.raw", "format": "raw", "size": MIB }],
        });
        let file = folder.join("vm.json");
        std::fs::write(&file, definition.to_string()).expect("written");
        let new = NewVm {
            definition: file,
            folder: folder.to_owned(),
            name: "web".into(),
            disks: vec![("disk0".into(), disk)],
            // QEMU itself says whether it takes what is made of the adapters.
            networks: Networks { disconnect: true, ..Networks::default() },
            ..NewVm::default()
        };
        let vm = agent.define_vm(&lease(), &new).await.expect("defined").vm;
        Self { agent, vm, console }
    }

    async fn boot(&self, check: BootCheck) -> Booting {
        assert_eq!(self.agent.boot_obstacle(&check), None);
        self.agent.boot_vm(&lease(), self.vm, &check).await.expect("it starts")
    }

    async fn end(&self) {
        self.agent.stop_vm(&lease(), self.vm).await.expect("it ends");
    }
}

fn check() -> BootCheck {
    BootCheck { patience: DEADLINE, text: None, screen: false }
}

fn brief() -> BootCheck {
    BootCheck { patience: Duration::from_secs(5), ..check() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_boots_is_told_by_its_console_and_one_that_does_not_is_never_called_booted() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let good = Restored::new(&dir.path().join("good"), &says("hello\r\nweb login: "), &[]).await;
    // What a VM of that name said before is no sign.
    std::fs::write(&good.console, "old login: \n").expect("written");
    let other = BootCheck { text: Some("database is up".into()), ..brief() };
    let seen = good.boot(other).await;
    assert_eq!(seen.sign, None, "only the text counts: {seen:?}");
    assert!(seen.sentence("web").contains("database is up"), "{seen:?}");
    good.end().await;
    let seen = good.boot(check()).await;
    let Some(Sign::Console(line)) = &seen.sign else { panic!("{seen:?}") };
    assert!(line.starts_with("web login:"), "{seen:?}");
    assert!(seen.watched < DEADLINE);
    good.end().await;

    let bad = Restored::new(&dir.path().join("bad"), &[0; 512], &[]).await;
    let seen = bad.boot(BootCheck { patience: Duration::from_secs(20), ..check() }).await;
    assert_eq!(seen.sign, None, "{seen:?}");
    assert!(seen.ended.is_none(), "it runs: {seen:?}");
    let told = seen.sentence("web");
    for part in ["not seen to boot", "no login prompt", "no guest agent", "No bootable device"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    bad.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_screen_counts_only_when_asked_for_and_never_with_firmwares_own_words() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let vga = ["-device", "VGA"];
    let screen = BootCheck { screen: true, ..check() };
    let good = Restored::new(&dir.path().join("good"), &draws(), &vga).await;
    let seen = good.boot(brief()).await;
    assert_eq!(seen.sign, None, "nobody asked for the screen: {seen:?}");
    let picture = std::fs::read(seen.picture.expect("a picture for the report")).expect("kept");
    assert!(picture.starts_with(b"\x89PNG") || picture.starts_with(b"P6"), "a picture");
    let seen = good.boot(screen.clone()).await;
    assert_eq!(seen.sign, Some(Sign::Screen { width: 640, height: 480 }), "{seen:?}");
    good.end().await;
    let bad = Restored::new(&dir.path().join("bad"), &[0; 512], &vga).await;
    let seen = bad.boot(BootCheck { patience: Duration::from_secs(20), ..screen }).await;
    assert_eq!(seen.sign, None, "{seen:?}");
    assert!(seen.sentence("web").contains("firmware"), "{seen:?}");
    bad.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_ends_while_it_is_watched_is_told_at_once() {
    if qemu_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let resets = boot_sector(vec![
        0xe4, 0x64, // in al,64h
        0xb0, 0xfe, 0xe6,
        0x64, // mov al,feh; out 64h,al: the keyboard controller resets the machine
        0xf4, 0xeb, 0xfd,
    ]);
    let vm = Restored::new(dir.path(), &resets, &["-no-reboot"]).await;
    let seen = vm.boot(check()).await;
    assert_eq!(seen.sign, None, "{seen:?}");
    assert!(seen.watched < DEADLINE, "{seen:?}");
    let told = seen.sentence("web");
    assert!(told.contains("did not boot") && told.contains("its QEMU ended"), "{told}");
}
