//! `kiln doctor`.

use std::fmt::Write as _;

use kiln::error::{Error, Exit};
use kiln::store;
use kiln::units::Size;
use kiln::vm::accelerator;
use kiln::vm::host::find_uefi;
use serde_json::json;

use super::Context;

/// Says what the host offers. Fails if it can't build at all.
pub(super) fn run(context: &Context<'_>) -> Result<(), Error> {
    let mut report = Report::default();
    let store = context.store();
    let host = context.host();
    match &host {
        Ok(host) => {
            report.good("QEMU", format!("{} {}", host.qemu.display(), host.qemu_version));
            report.good("qemu-img", format!("{} {}", host.qemu_img.display(), host.qemu_img_version));
        }
        Err(error) => report.bad("QEMU", error.message.clone(), error.help.clone().unwrap_or_default()),
    }
    match find_uefi() {
        Some(uefi) => report.good("UEFI", uefi.code.display().to_string()),
        None => report.weak("UEFI", "no firmware found: disks are tested by BIOS only", "apt install ovmf"),
    }
    if let (Ok(host), Ok(store)) = (&host, &store) {
        match accelerator::probe(&host.qemu, &store.accelerator_memory(), context.cancel)? {
            accelerator::Kvm::Works => report.good("KVM", "works".to_owned()),
            kvm => report.weak("KVM", &format!("{}; kiln uses software emulation", kvm.cause()), kvm.remedy()),
        }
    }
    match &store {
        Ok(store) => {
            let free =
                store::free_space(store.path()).map_or_else(|error| error.to_string(), |free| Size(free).to_string());
            report.good("cache", format!("{} ({free} free)", store.path().display()));
        }
        Err(error) => report.bad("cache", error.message.clone(), error.help.clone().unwrap_or_default()),
    }
    context.ui.result(&report.text, &json!({ "ready": report.missing == 0, "checks": report.checks }));
    match host.and(store) {
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Error::new(Exit::Host, "this host can't build yet").help(error.help.unwrap_or(error.message)))
        }
    }
}

#[derive(Default)]
struct Report {
    text: String,
    checks: Vec<serde_json::Value>,
    missing: usize,
}

impl Report {
    fn good(&mut self, what: &str, found: String) {
        let _ = writeln!(self.text, "ok       {what:9} {found}");
        self.checks.push(json!({ "check": what, "state": "ok", "found": found }));
    }

    fn weak(&mut self, what: &str, found: &str, remedy: &str) {
        let _ = writeln!(self.text, "without  {what:9} {found}\n                   help: {remedy}");
        self.checks.push(json!({ "check": what, "state": "without", "found": found, "help": remedy }));
    }

    fn bad(&mut self, what: &str, found: String, remedy: String) {
        self.missing += 1;
        let _ = writeln!(self.text, "missing  {what:9} {found}\n                   help: {remedy}");
        self.checks.push(json!({ "check": what, "state": "missing", "found": found, "help": remedy }));
    }
}
