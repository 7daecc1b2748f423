//! What went wrong, with its exit code and remedy, and what is kept of it.

use std::path::Path;

use super::output::{self, Pending};
use super::{Fresh, Request};
use crate::disk::{self, Image, Table, Work};
use crate::error::{Error, Exit};
use crate::plan::Plan;
use crate::store::Scratch;
use crate::vm::spec::{Accelerator, Processor};
use crate::{exec, vm};

/// A disk that can't be read or written, with its exit code and remedy.
pub(crate) fn disk_failure(error: disk::Error) -> Error {
    let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    let exit = match &error {
        disk::Error::NoSpace { .. }
        | disk::Error::Create { .. }
        | disk::Error::Write { .. }
        | disk::Error::Open { .. }
        | disk::Error::Read { .. }
        | disk::Error::BlockMapIo(_) => Exit::Host,
        _ => Exit::Input,
    };
    let full = match &error {
        disk::Error::NoSpace { .. } => true,
        disk::Error::BlockMapIo(error) => error.kind() == std::io::ErrorKind::StorageFull,
        _ => false,
    };
    let failure = Error::new(exit, format!("{error}{cause}"));
    if full { failure.help("free some space, or choose another place with --out or --cache-dir") } else { failure }
}

/// A guest that failed, with its exit code and remedy.
pub(crate) fn guest_failure(error: vm::Error) -> Error {
    if let vm::Error::Cancelled(cancelled) | vm::Error::Exec(exec::Error::Cancelled(cancelled)) = error {
        return cancelled.into();
    }
    let mut failure = Error::new(error.exit(), error.to_string());
    if let Some(console) = error.console() {
        let last = console.lines().rev().take(3).collect::<Vec<_>>();
        failure.notes.extend(last.iter().rev().map(|line| format!("console: {line}")));
    }
    match &error {
        vm::Error::HostDiskFull => failure.help("free some space, or choose another place with --cache-dir"),
        vm::Error::Processor { processor, accelerator, .. } => failure.help(match (processor, accelerator) {
            (Processor::V3, Accelerator::Tcg) => "set [machine] cpu = \"x86-64-v2\", or install a newer QEMU",
            (Processor::V3, Accelerator::Kvm) => "set [machine] cpu = \"x86-64-v2\", or use --accel tcg",
            (Processor::V2, Accelerator::Tcg) => "install a newer QEMU",
            (Processor::V2, Accelerator::Kvm) => "use --accel tcg",
        }),
        vm::Error::Died { how, .. } if how.contains("signal 9") => {
            failure.help("was it the host's out-of-memory killer? see dmesg; a smaller [machine] memory may help")
        }
        vm::Error::Died { .. } => failure.help("build again; if it ends the same way, try --accel tcg or another QEMU"),
        _ => failure,
    }
}

/// Says how to look at the guest as it was before step `index` (from 0), if that is kept.
pub(super) fn with_shell(error: Error, request: &Request, plan: &Plan, index: usize) -> Error {
    if !matches!(error.exit, Exit::Step | Exit::TimedOut) || !plan.layers[index].cached {
        return error;
    }
    let set = request.set.iter().map(|set| format!(" --set '{set}'")).collect::<Vec<_>>().concat();
    // What was left aside this time may be kept nevertheless, and lie deeper.
    let at = if request.fresh == Fresh::Nothing { String::new() } else { format!(" --at {index}") };
    let look = format!("look at the guest as it was before: kiln shell {}{set}{at}", request.recipe.display());
    if error.help.is_some() { error.with_note(look) } else { error.help(look) }
}

/// Keeps what explains the failure; after a signal nothing.
pub(super) fn keep(mut error: Error, request: &Request, pending: Pending, scratch: &Scratch) -> Error {
    if let Exit::Signal(_) = error.exit {
        return error;
    }
    let (build_log, console_log) =
        (pending.after_failure().join(output::BUILD_LOG), pending.after_failure().join("console.log"));
    match pending.fail() {
        Ok(folder) => {
            if error.log.is_none() {
                let console = std::fs::metadata(&console_log).is_ok_and(|console| console.len() > 0);
                error.log = Some(if console { console_log } else { build_log });
            }
            if request.keep_on_error {
                error.notes.extend(keep_disk(scratch.path(), &folder));
            }
        }
        Err(lost) => error.notes.push(format!("the logs could not be kept: {lost}")),
    }
    error
}

/// Keeps the failed guest's disk, with all that is behind its overlay, and says how to look into it.
fn keep_disk(scratch: &Path, folder: &Path) -> Vec<String> {
    let overlays = (0..).map(|number| scratch.join(format!("overlay-{number}.qcow2")));
    let mut written = overlays.skip_while(|path| !path.exists()).take_while(|path| path.exists());
    let Some(overlay) = written.by_ref().last() else { return Vec::new() };
    let kept = folder.join(output::FAILED_DISK);
    let root = Image::overlay(&overlay).and_then(|image| {
        disk::export(&image, &kept, &Work::quiet(4))?;
        let table = Table::read(&image)?;
        Ok(table.find_root(&image)?.map_or(0, |root| root.start))
    });
    match root {
        Ok(start) => {
            let shown = kept.display();
            vec![
                format!("the guest's disk is kept: {shown}"),
                format!("look into it: sudo mount -o ro,loop,offset={start} {shown} /mnt"),
            ]
        }
        Err(lost) => {
            let _ = std::fs::remove_file(&kept);
            vec![format!("the guest's disk could not be kept: {}", disk_failure(lost).message)]
        }
    }
}
