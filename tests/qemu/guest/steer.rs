//! Commands and answers over the second serial port, one line each; an answer begins with its command's word.
//!
//! Unasked: `ready` once, then `verified`; `committed` after every batch of a running writer, `written` at its end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::str::SplitWhitespace;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::boot::{Machine, file_system_errors, parameter};
use crate::kernel;
use crate::writer::{Disks, LATENCIES, Order};

type Shared = Arc<Mutex<Disks>>;

/// The port; a line is written as a whole.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn say(&self, line: &str) {
        let mut file = lock(&self.0);
        // Nobody may be listening; that is no reason to stop.
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}

/// Says what was found, then serves commands until the port is gone.
pub(crate) fn serve(machine: Machine) -> io::Result<()> {
    let Machine { disks, states, agent, port: file } = machine;
    let port = Port(Arc::new(Mutex::new(file.try_clone()?)));
    let with_agent = if agent.is_some() { "yes" } else { "no" };
    let ready = format!("ready fs={} agent={with_agent}", states.join(","));
    eprintln!("guest: {ready}");
    port.say(&ready);
    let Some(disks) = disks else { return Err(io::Error::other("no disk to write to")) };
    let disks = Arc::new(Mutex::new(disks));
    let verdict = verdict(&lock(&disks))?;
    eprintln!("guest: {verdict}");
    port.say(&verdict);
    lock(&disks).redo()?;
    let heard = Arc::new(Mutex::new(Instant::now()));
    leave_when_nobody_asks(&heard);

    let agent = agent.map(|a| a.id());
    let mut writer: Option<Writer> = None;
    for line in BufReader::new(file).lines() {
        let line = line?;
        *lock(&heard) = Instant::now();
        let mut words = line.split_whitespace();
        match words.next().unwrap_or_default() {
            "write" if writer.is_none() => {
                port.say("write");
                writer = Some(Writer::start(order(words), Arc::clone(&disks), port.clone()));
            }
            "stop" => {
                if let Some(writer) = writer.take() {
                    writer.stop();
                }
                kernel::sync_all();
                let disks = lock(&disks);
                let (upto, bytes) = (disks.journal.committed(), disks.journal.bytes());
                port.say(&format!("stop committed={upto} bytes={bytes}"));
            }
            "verify" if writer.is_none() => {
                // What is in memory proves nothing about the disk.
                kernel::sync_all();
                std::fs::write("/proc/sys/vm/drop_caches", "3")?;
                port.say(&self::verdict(&lock(&disks))?);
            }
            "latency" => port.say(&latency()),
            "agent" => {
                let hang = words.next() == Some("hang");
                let done = agent.is_some_and(|pid| kernel::pause(pid, hang).is_ok());
                port.say(&format!("agent done={}", u8::from(done)));
            }
            "ping" => port.say("ping"),
            "poweroff" => kernel::power_off(),
            "reboot" => kernel::restart(),
            other => port.say(&format!("refused {other}")),
        }
    }
    Ok(())
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn order(words: SplitWhitespace<'_>) -> Order {
    let mut order = Order::default();
    for (key, value) in words.filter_map(|w| w.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "seed" => order.seed = value,
            "rate" => order.rate = value,
            "bytes" => order.bytes = value,
            _ => {}
        }
    }
    order
}

fn verdict(disks: &Disks) -> io::Result<String> {
    let found = disks.verify()?;
    Ok(format!(
        "verified committed={} records={} blocks={} pending={} bad={} errors={} first_bad={}",
        found.committed,
        found.records,
        found.blocks,
        found.pending,
        found.bad,
        file_system_errors(),
        found.first_bad.as_deref().unwrap_or("none")
    ))
}

fn latency() -> String {
    let mut all = std::mem::take(&mut *lock(&LATENCIES));
    all.sort_unstable();
    let at = |percent: usize| all.get(all.len() * percent / 100).copied().unwrap_or(0);
    let last = all.last().copied().unwrap_or(0);
    format!("latency count={} p50={} p99={} max={last}", all.len(), at(50), at(99))
}

struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Writer {
    fn start(order: Order, disks: Shared, port: Port) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut disks = lock(&disks);
            let result = disks.write(order, &stopping, |sequence, bytes| {
                port.say(&format!("committed sequence={sequence} bytes={bytes}"));
            });
            match result {
                Ok(()) => port.say(&format!("written bytes={}", disks.journal.bytes())),
                Err(error) => port.say(&format!("failed {error}")),
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        // It says itself how it went.
        let _ = self.thread.join();
    }
}

/// A machine that lost its tester must not run for ever.
fn leave_when_nobody_asks(heard: &Arc<Mutex<Instant>>) {
    let Some(limit) = parameter("outrider.idle").filter(|s| *s > 0).map(Duration::from_secs) else {
        return;
    };
    let heard = Arc::clone(heard);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let last = *lock(&heard);
            if last.elapsed() > limit {
                kernel::power_off();
            }
        }
    });
}
