//! Calls that `std` lacks, straight from the C library.
#![allow(unsafe_code)] // FFI: this module wraps it, and nothing else in the guest does.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

const SYS_FINIT_MODULE: c_long = 313;
const RB_POWER_OFF: c_int = 0x4321_fedc;
const RB_AUTOBOOT: c_int = 0x0123_4567;
const TCSANOW: c_int = 0;
const SIGCONT: c_int = 18;
const SIGSTOP: c_int = 19;

/// `struct termios` of glibc on x86-64.
#[repr(C)]
#[derive(Default)]
struct Termios {
    flags: [u32; 4],
    line: u8,
    controls: [u8; 32],
    speeds: [u32; 2],
}

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(how: c_int) -> c_int;
    fn sync();
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn tcgetattr(fd: c_int, termios: *mut Termios) -> c_int;
    fn tcsetattr(fd: c_int, when: c_int, termios: *const Termios) -> c_int;
    fn cfmakeraw(termios: *mut Termios);
}

fn checked(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// mount(2), with `options` as the file system understands them.
pub(crate) fn mount_at(source: &str, target: &str, kind: &str, options: &str) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let [source, target, kind, options] = [source, target, kind, options].map(CString::new);
    let (source, target, kind, options) = (source?, target?, kind?, options?);
    // SAFETY: all four are NUL-terminated and outlive the call.
    let result = unsafe {
        mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast())
    };
    checked(result.into())
}

/// Loads one kernel module; one that is there already is no error.
pub(crate) fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let fd = c_long::from(file.as_raw_fd());
    // SAFETY: the descriptor is open, the parameters are an empty string.
    let result = unsafe { syscall(SYS_FINIT_MODULE, fd, c"".as_ptr(), 0 as c_long) };
    match checked(result) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Line discipline off: bytes in, bytes out, no echo.
pub(crate) fn make_raw(tty: &File) -> io::Result<()> {
    let mut termios = Termios::default();
    // SAFETY: the structure has the C library's layout and is written by it.
    checked(unsafe { tcgetattr(tty.as_raw_fd(), &raw mut termios) }.into())?;
    // SAFETY: as above.
    unsafe { cfmakeraw(&raw mut termios) };
    // SAFETY: as above.
    checked(unsafe { tcsetattr(tty.as_raw_fd(), TCSANOW, &raw const termios) }.into())
}

/// Stops a process, or lets it go on.
pub(crate) fn pause(pid: u32, paused: bool) -> io::Result<()> {
    let pid = c_int::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    checked(unsafe { kill(pid, if paused { SIGSTOP } else { SIGCONT }) }.into())
}

/// sync(2): everything that is dirty is on its way and there.
pub(crate) fn sync_all() {
    // SAFETY: no arguments.
    unsafe { sync() };
}

/// Turns the machine off; does not return while the kernel can do it.
pub(crate) fn power_off() -> ! {
    end(RB_POWER_OFF)
}

/// Starts the machine again.
pub(crate) fn restart() -> ! {
    end(RB_AUTOBOOT)
}

fn end(how: c_int) -> ! {
    sync_all();
    // SAFETY: no memory is passed.
    unsafe { reboot(how) };
    loop {
        std::thread::park();
    }
}
