//! Which accelerator to use: found out with a real guest, because /dev/kvm may open and still be useless.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::spec::Accelerator;
use crate::cancel::Cancel;
use crate::exec::{self, Tool};

/// See `canary.asm`.
const CANARY: &[u8; 512] = include_bytes!("canary.bin");
/// The status with which QEMU ends if the canary got through.
const SUNG: i32 = 85;
/// A healthy KVM takes well under half a second (measured); one that can't run guests takes several or fails.
const LIMIT: Duration = Duration::from_millis(2500);

/// What is to be known about KVM on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "why")]
pub enum Kvm {
    /// A guest ran.
    Works,
    /// There is no /dev/kvm.
    Absent,
    /// /dev/kvm is there, but not for this user.
    Forbidden,
    /// /dev/kvm opens, and a guest doesn't get through.
    Unusable(String),
}

impl Kvm {
    /// The cause, in words; empty if it works.
    #[must_use]
    pub fn cause(&self) -> String {
        match self {
            Self::Works => String::new(),
            Self::Absent => "there is no /dev/kvm".to_owned(),
            Self::Forbidden => "/dev/kvm may not be opened by this user".to_owned(),
            Self::Unusable(why) => format!("/dev/kvm opens, but a guest can't run on it ({why})"),
        }
    }

    /// What to do about it; empty if it works.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Works => "",
            Self::Absent => {
                "turn on virtualisation in the firmware and load kvm_intel or kvm_amd; in a virtual machine turn on \
                 nested virtualisation, in a container pass --device /dev/kvm"
            }
            Self::Forbidden => {
                "add the user to the group kvm (sudo usermod -aG kvm $USER, then log in again); on a CI runner: \
                 sudo chmod 0666 /dev/kvm"
            }
            Self::Unusable(_) => {
                "this is a fault of the host's hypervisor (often incomplete nested virtualisation): use another \
                 machine type or a newer host kernel"
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Remembered {
    boot: String,
    qemu: String,
    kvm: Kvm,
}

/// Finds out about KVM, or remembers what was found since the host's last boot in `memory`.
///
/// # Errors
/// When cancelled.
pub fn probe(qemu: &Path, memory: &Path, cancel: &Cancel) -> Result<Kvm, exec::Error> {
    match rustix::fs::access("/dev/kvm", rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK) {
        Err(rustix::io::Errno::NOENT) => return Ok(Kvm::Absent),
        Err(_) => return Ok(Kvm::Forbidden),
        Ok(()) => {}
    }
    let boot = exec::boot_id();
    let qemu_name = qemu.display().to_string();
    let remembered = fs_err::read(memory).ok().and_then(|text| serde_json::from_slice::<Remembered>(&text).ok());
    if let Some(remembered) = remembered
        && boot.as_ref() == Some(&remembered.boot)
        && remembered.qemu == qemu_name
    {
        return Ok(remembered.kvm);
    }
    let kvm = sing(qemu, cancel)?;
    // Only a help for the next time: a folder that can't be written costs a probe, not the build.
    if let Some(boot) = boot {
        let _ = remember(memory, &Remembered { boot, qemu: qemu_name, kvm: kvm.clone() });
    }
    Ok(kvm)
}

fn remember(memory: &Path, remembered: &Remembered) -> io::Result<()> {
    let folder = memory.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, remembered)?;
    file.persist(memory)?;
    Ok(())
}

fn sing(qemu: &Path, cancel: &Cancel) -> Result<Kvm, exec::Error> {
    let start = |error| exec::Error::Start { program: qemu.to_owned(), error };
    let folder = tempfile::tempdir().map_err(start)?;
    let canary = folder.path().join("canary");
    fs_err::write(&canary, CANARY).map_err(start)?;
    let drive = serde_json::json!({
        "driver": "raw", "node-name": "canary", "read-only": true,
        "file": { "driver": "file", "filename": canary },
    });
    let arguments = ["-nodefaults", "-no-user-config", "-machine", "q35", "-accel", "kvm", "-cpu", "host"];
    let tool = Tool::new(qemu, LIMIT)
        .args(arguments)
        .args(["-m", "32M", "-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .arg("-blockdev")
        .arg(drive.to_string())
        .args(["-device", "virtio-blk-pci,drive=canary,bootindex=0"]);
    match tool.run_any_status(cancel) {
        Ok(output) if output.status.code() == Some(SUNG) => Ok(Kvm::Works),
        Ok(output) => Ok(Kvm::Unusable(last_line(&output.stderr, &exec::describe(output.status)))),
        Err(exec::Error::TimedOut { .. }) => {
            Ok(Kvm::Unusable(format!("a guest of one sector did not end within {} s", LIMIT.as_secs_f32())))
        }
        Err(error) => Err(error),
    }
}

fn last_line(stderr: &str, otherwise: &str) -> String {
    // QEMU's own word for the cause comes before the assertion that it ends with.
    let line = stderr.lines().find(|line| line.contains("error:") || line.contains("failed"));
    let line = line.or_else(|| stderr.lines().last()).unwrap_or(otherwise);
    line.rsplit_once("qemu-system-x86_64: ").map_or(line, |(_, rest)| rest).trim().to_owned()
}

/// The vendor of the host's processor, as `/proc/cpuinfo` has it: QEMU gives it to the processor of KVM's guests.
#[must_use]
pub fn host_vendor() -> String {
    vendor(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()).to_owned()
}

fn vendor(cpuinfo: &str) -> &str {
    let line = cpuinfo.lines().find(|line| line.starts_with("vendor_id"));
    line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, vendor)| vendor.trim())
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// KVM if it works.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// The accelerator to use, and the reason if it is not the one hoped for; `Err` when KVM was insisted on in vain.
///
/// # Errors
/// The verdict that forbids what was wanted.
pub fn choose(wanted: Wanted, kvm: &Kvm) -> Result<(Accelerator, Option<String>), Kvm> {
    match (wanted, kvm) {
        (Wanted::Tcg, _) => Ok((Accelerator::Tcg, None)),
        (_, Kvm::Works) => Ok((Accelerator::Kvm, None)),
        (Wanted::Auto, kvm) => Ok((Accelerator::Tcg, Some(kvm.cause()))),
        (Wanted::Kvm, kvm) => Err(kvm.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canary_is_a_boot_sector() {
        assert_eq!(CANARY[510..], [0x55, 0xaa]);
    }

    #[test]
    fn the_vendor_is_the_first_processors() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\n\nprocessor\t: 1\nvendor_id\t: Other\n";
        assert_eq!(vendor(cpuinfo), "GenuineIntel");
        assert_eq!(vendor("processor : 0\n"), "unknown");
    }

    #[test]
    fn only_auto_falls_back() {
        let kvm = Kvm::Forbidden;
        assert_eq!(choose(Wanted::Auto, &kvm).unwrap(), (Accelerator::Tcg, Some(kvm.cause())));
        assert_eq!(choose(Wanted::Kvm, &kvm), Err(Kvm::Forbidden));
        assert_eq!(choose(Wanted::Tcg, &Kvm::Works), Ok((Accelerator::Tcg, None)));
        assert_eq!(choose(Wanted::Auto, &Kvm::Works), Ok((Accelerator::Kvm, None)));
    }

    #[test]
    fn three_causes_have_three_remedies() {
        let causes = [Kvm::Absent, Kvm::Forbidden, Kvm::Unusable("x".to_owned())];
        let mut texts: Vec<_> = causes.iter().flat_map(|kvm| [kvm.cause(), kvm.remedy().to_owned()]).collect();
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 6);
    }
}
