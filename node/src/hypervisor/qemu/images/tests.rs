use super::*;

const DISK: Moved<'_> = Moved { slot: "disk0", from: "/srv/web.qcow2", to: "/new/web.qcow2" };

fn made_in(line: &[&str], in_place: bool) -> Result<Images, String> {
    let argv: Vec<String> = line.iter().map(|a| (*a).to_owned()).collect();
    let place = Place { cwd: Path::new("/srv"), folder: Path::new("/new"), in_place };
    moved(&argv, &[DISK], place)
}

fn made(line: &[&str]) -> Images {
    made_in(line, false).expect("made")
}

const DEVICE: [&str; 2] = ["-device", "virtio-blk-pci,id=disk0,drive=d0"];

fn line<'a>(parts: &[&'a str]) -> Vec<&'a str> {
    [&["qemu"], parts, &DEVICE[..]].concat()
}

#[test]
fn a_disk_in_two_arguments_stands_alone_and_what_was_below_it_is_not_opened() {
    let found = made(&line(&[
        "-blockdev",
        r#"{"driver":"file","node-name":"b0","filename":"/srv/base.qcow2"}"#,
        "-blockdev",
        "driver=qcow2,node-name=base,file=b0,read-only=on",
        "-blockdev",
        r#"{"driver":"host_device","node-name":"f0","filename":"/srv/web.qcow2"}"#,
        "-blockdev",
        r#"{"backing":"base","driver":"qcow2","file":"f0","node-name":"d0"}"#,
    ]));
    assert_eq!(
        found.argv,
        line(&[
            "-blockdev",
            r#"{"driver":"file","filename":"/new/web.qcow2","node-name":"f0"}"#,
            "-blockdev",
            r#"{"driver":"qcow2","file":"f0","node-name":"d0"}"#,
        ])
    );
    assert_eq!(found.notes, [] as [String; 0]);
}

#[test]
fn a_drive_keeps_what_it_is_and_loses_what_was_below_it() {
    let drive = "file=/srv/web.qcow2,format=qcow2,if=none,id=d0,backing.file.filename=/srv/base";
    assert_eq!(
        made(&line(&["-drive", drive])).argv,
        line(&["-drive", "file=/new/web.qcow2,format=qcow2,if=none,id=d0"])
    );
    // Relative to the folder that QEMU was started in.
    assert_eq!(made(&["qemu", "-hda", "web.qcow2"]).argv, ["qemu", "-hda", "/new/web.qcow2"]);
}

#[test]
fn a_captured_disk_that_the_command_line_does_not_attach_is_refused() {
    for other in [
        // A snapshot was made over it, or it was mirrored.
        &["-drive", "file=/srv/before.qcow2,if=none,id=d0"][..],
        // An active commit: the image was below another one.
        &[
            "-blockdev",
            r#"{"driver":"qcow2","node-name":"d0","file":{"driver":"file","filename":"/srv/top"},"backing":{"driver":"file","filename":"/srv/web.qcow2"}}"#,
        ],
        &[
            "-blockdev",
            "driver=file,node-name=base,filename=/srv/web.qcow2",
            "-blockdev",
            "driver=qcow2,node-name=d0,file.driver=file,file.filename=/srv/top,backing=base",
        ],
        // Its node was there, its device was plugged in.
        &["-blockdev", "driver=file,node-name=d1,filename=/srv/web.qcow2"],
        &[],
    ] {
        for in_place in [false, true] {
            let why = made_in(&line(other), in_place).expect_err("refused");
            assert!(why.contains("disk0") && why.contains("/srv/web.qcow2"), "{why}");
            assert!(why.contains("Restore the disks alone"), "{why}");
        }
    }
}

const OWN: [&str; 2] = ["-drive", "file=/srv/web.qcow2,if=none,id=d0"];
const OWN_NEW: [&str; 2] = ["-drive", "file=/new/web.qcow2,if=none,id=d0"];

#[test]
fn a_disk_that_the_point_does_not_hold_is_left_out_with_its_device_unless_it_is_the_same_vm() {
    let other = [
        "-blockdev",
        "driver=file,node-name=f1,filename=/srv/data",
        "-blockdev",
        "driver=raw,node-name=d1,file=f1",
        "-device",
        "scsi-hd,id=data,drive=d1",
        "-drive",
        "driver=nbd,host=h,if=virtio",
    ];
    let all = line(&[&OWN[..], &other].concat());
    let found = made(&all);
    assert_eq!(found.argv, line(&OWN_NEW));
    assert_eq!(found.notes.len(), 2, "{:?}", found.notes);
    assert!(found.notes[0].contains("the disk data (/srv/data)"), "{:?}", found.notes);
    let same = made_in(&all, true).expect("made");
    assert_eq!(same.argv, line(&[&OWN_NEW[..], &other].concat()));
    assert!(same.notes[0].contains("stays attached"), "{:?}", same.notes);
    // A node that nothing uses would be opened all the same.
    let found = made(&line(&[&OWN[..], &other[..2]].concat()));
    assert_eq!(found.argv, line(&OWN_NEW));
    assert!(found.notes[0].contains("/srv/data was left out"), "{:?}", found.notes);
}

#[test]
fn what_is_only_read_stays_and_the_firmwares_variables_are_copied() {
    let read = [
        "-cdrom",
        "/srv/a.iso",
        "-drive",
        "file=/srv/b.iso,media=cdrom",
        "-blockdev",
        "driver=file,node-name=c,filename=/srv/c.iso",
        "-device",
        "ide-cd,drive=c",
        "-blockdev",
        "driver=file,node-name=code,filename=/usr/OVMF_CODE.fd",
        "-blockdev",
        "driver=raw,node-name=pf0,file=code,read-only=on",
        "-drive",
        "if=pflash,file=/usr/CODE.fd,readonly",
        "-drive",
        "if=floppy",
    ];
    let found = made(&line(&[&OWN[..], &read, &["-M", "q35,pflash0=pf0"]].concat()));
    assert_eq!(found.argv, line(&[&OWN_NEW[..], &read, &["-M", "q35,pflash0=pf0"]].concat()));
    assert_eq!((found.notes.len(), found.copies.len()), (0, 0), "{:?}", found.notes);

    let copies = [(PathBuf::from("/srv/web_VARS.fd"), PathBuf::from("/new/web_VARS.fd"))];
    let node = "driver=raw,node-name=pf1,file.driver=file,file.filename=";
    let before = format!("{node}/srv/web_VARS.fd");
    let after = format!("{node}/new/web_VARS.fd");
    let machine = ["-machine", "q35,pflash1=pf1"];
    let found = made(&line(&[&OWN[..], &["-blockdev", &before], &machine].concat()));
    assert_eq!(found.argv, line(&[&OWN_NEW[..], &["-blockdev", &after], &machine].concat()));
    assert_eq!(found.copies, copies);
    let found = made(&line(&[&OWN[..], &["-pflash", "web_VARS.fd"]].concat()));
    assert_eq!(found.argv, line(&[&OWN_NEW[..], &["-pflash", "/new/web_VARS.fd"]].concat()));
    assert_eq!(found.copies, copies);
    assert!(found.notes[0].contains("variables"), "{:?}", found.notes);
}
