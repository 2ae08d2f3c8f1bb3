//! A job object of Windows: a process and all that it starts, ended together.
//!
//! `unsafe` because the system's interface is C: handles, and structures that are passed by address and length.
#![allow(unsafe_code)]

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use tokio::process::Child;
use windows::Win32::Foundation::{ERROR_NO_MORE_FILES, HANDLE};
use windows::Win32::System::Diagnostics::ToolHelp::{
    CreateToolhelp32Snapshot, TH32CS_SNAPTHREAD, THREADENTRY32, Thread32First, Thread32Next,
};
use windows::Win32::System::JobObjects::{
    AssignProcessToJobObject, CreateJobObjectW, JOB_OBJECT_LIMIT,
    JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE, JOBOBJECT_EXTENDED_LIMIT_INFORMATION,
    JobObjectExtendedLimitInformation, SetInformationJobObject, TerminateJobObject,
};
use windows::Win32::System::Threading::{
    CREATE_SUSPENDED, OpenThread, ResumeThread, THREAD_SUSPEND_RESUME,
};

/// The creation flag of processes for [`JobObject::of`].
pub(super) const SUSPENDED: u32 = CREATE_SUSPENDED.0;
/// Exit code of processes that are ended with their job.
const ENDED: u32 = 1;

/// A job object. Dropping it, also by the end of this very process, ends everything in it.
pub(super) struct JobObject(OwnedHandle);

impl JobObject {
    /// Puts a process that was created suspended into a job of its own, and lets it run.
    ///
    /// # Errors
    /// The system's refusal; the process has not run, and ends with the caller's `child`.
    pub(super) fn of(child: &Child) -> io::Result<Self> {
        // SAFETY: no pointer is passed; what comes back is ours alone.
        let job = unsafe { OwnedHandle::from_raw_handle(CreateJobObjectW(None, None)?.0) };
        let job = Self(job);
        job.limit(JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)?;
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let process = HANDLE(child.raw_handle().ok_or_else(gone)?);
        // SAFETY: both handles are open: the child was not waited for.
        unsafe { AssignProcessToJobObject(job.raw(), process)? };
        resume(child.id().ok_or_else(gone)?)?;
        Ok(job)
    }

    /// Ends everything in it.
    ///
    /// # Errors
    /// The system's refusal.
    pub(super) fn end(&self) -> io::Result<()> {
        // SAFETY: the handle is open.
        Ok(unsafe { TerminateJobObject(self.raw(), ENDED)? })
    }

    /// What is still in it goes on when this is dropped.
    ///
    /// # Errors
    /// The system's refusal.
    pub(super) fn release(&self) -> io::Result<()> {
        self.limit(JOB_OBJECT_LIMIT(0))
    }

    fn limit(&self, flags: JOB_OBJECT_LIMIT) -> io::Result<()> {
        let mut limits = JOBOBJECT_EXTENDED_LIMIT_INFORMATION::default();
        limits.BasicLimitInformation.LimitFlags = flags;
        // SAFETY: the structure is the one that this class of information asks for, of that length.
        unsafe {
            SetInformationJobObject(
                self.raw(),
                JobObjectExtendedLimitInformation,
                (&raw const limits).cast(),
                size_of_val(&limits) as u32,
            )?;
        }
        Ok(())
    }

    fn raw(&self) -> HANDLE {
        HANDLE(self.0.as_raw_handle())
    }
}

/// Lets a process that was created suspended run. Its first thread's handle is not kept by whoever created it for us, so it is
/// looked for among all threads; a process that has not run has one.
fn resume(process: u32) -> io::Result<()> {
    // SAFETY: no pointer is passed; what comes back is ours alone.
    let threads =
        unsafe { OwnedHandle::from_raw_handle(CreateToolhelp32Snapshot(TH32CS_SNAPTHREAD, 0)?.0) };
    let threads = HANDLE(threads.as_raw_handle());
    let mut entry =
        THREADENTRY32 { dwSize: size_of::<THREADENTRY32>() as u32, ..THREADENTRY32::default() };
    // SAFETY: the entry says how long it is.
    let mut found = unsafe { Thread32First(threads, &raw mut entry) };
    let mut resumed = false;
    while found.is_ok() {
        if entry.th32OwnerProcessID == process {
            // SAFETY: no pointer is passed; what comes back is ours alone.
            let thread = unsafe {
                OwnedHandle::from_raw_handle(
                    OpenThread(THREAD_SUSPEND_RESUME, false, entry.th32ThreadID)?.0,
                )
            };
            // SAFETY: the handle is open.
            if unsafe { ResumeThread(HANDLE(thread.as_raw_handle())) } == u32::MAX {
                return Err(io::Error::last_os_error());
            }
            resumed = true;
        }
        // SAFETY: as above.
        found = unsafe { Thread32Next(threads, &raw mut entry) };
    }
    match found {
        Err(e) if e.code() != ERROR_NO_MORE_FILES.to_hresult() => Err(e.into()),
        _ if !resumed => Err(io::Error::other("the new process has no thread")),
        _ => Ok(()),
    }
}
