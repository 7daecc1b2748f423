//! The host's programs and files that machines need.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::exec::{self, Tool};

/// The oldest QEMU that kiln is tested with.
const OLDEST: (u32, u32) = (6, 2);

/// Firmware for UEFI guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uefi {
    /// The code, read-only.
    pub code: PathBuf,
    /// The empty variable store, to be copied.
    pub variables: PathBuf,
}

/// QEMU and what belongs to it.
#[derive(Debug, Clone)]
pub struct Host {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// Its version with the distribution's revision, for example `7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
    pub qemu_version: String,
    /// `qemu-img`.
    pub qemu_img: PathBuf,
    /// Its version.
    pub qemu_img_version: String,
    /// UEFI firmware, where the host has some.
    pub uefi: Option<Uefi>,
}

/// Where distributions keep OVMF: code, then variables. Secure-boot builds are left out: they insist on signed loaders.
const OVMF: [(&str, &str); 8] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"), // Debian, Ubuntu
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),       // older Debian, Ubuntu
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"), // Fedora, EL
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"), // Arch
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"), // older Arch
    ("/usr/share/edk2-ovmf/OVMF_CODE.fd", "/usr/share/edk2-ovmf/OVMF_VARS.fd"), // Gentoo, Alpine
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"), // SUSE
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"), // QEMU's own
];

/// What installs a missing program, in the words of the common distributions.
const INSTALL: &str = "install it: apt install qemu-system-x86 qemu-utils (Debian, Ubuntu), dnf install qemu-kvm \
                       qemu-img (Fedora, EL), pacman -S qemu-base (Arch)";

impl Host {
    /// Finds QEMU and its parts. `KILN_QEMU` and `KILN_QEMU_IMG`, given here as values, come before the PATH.
    ///
    /// # Errors
    /// When a program is missing, fails, or is too old.
    pub fn find(qemu: Option<PathBuf>, qemu_img: Option<PathBuf>, cancel: &Cancel) -> Result<Self, Error> {
        let qemu = program("KILN_QEMU", qemu, &["qemu-system-x86_64", "/usr/libexec/qemu-kvm"])?;
        let qemu_img = program("KILN_QEMU_IMG", qemu_img, &["qemu-img"])?;
        let qemu_version = version(&qemu, cancel)?;
        let qemu_img_version = version(&qemu_img, cancel)?;
        if number(&qemu_version).is_some_and(|found| found < OLDEST) {
            let message = format!("`{}` is QEMU {qemu_version}, and kiln needs 6.2 or newer", qemu.display());
            return Err(Error::new(Exit::Host, message).help("install a newer QEMU, or name one in KILN_QEMU"));
        }
        Ok(Self { qemu, qemu_version, qemu_img, qemu_img_version, uefi: find_uefi() })
    }
}

/// UEFI firmware, where the host has some.
#[must_use]
pub fn find_uefi() -> Option<Uefi> {
    OVMF.iter()
        .map(|(code, variables)| Uefi { code: code.into(), variables: variables.into() })
        .find(|uefi| uefi.code.is_file() && uefi.variables.is_file())
}

fn program(variable: &str, named: Option<PathBuf>, names: &[&str]) -> Result<PathBuf, Error> {
    if let Some(named) = named {
        return exec::find(&named).ok_or_else(|| {
            let message = format!("{variable} names `{}`, which is not a program that can be run", named.display());
            Error::new(Exit::Host, message).help(format!("correct {variable} or unset it"))
        });
    }
    names.iter().find_map(|name| exec::find(Path::new(name))).ok_or_else(|| {
        Error::new(Exit::Host, format!("`{}` not found", names[0])).help(format!("{INSTALL}, or name it in {variable}"))
    })
}

fn version(program: &Path, cancel: &Cancel) -> Result<String, Error> {
    let output = Tool::new(program, Duration::from_secs(10)).arg("--version").run(cancel)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // With the distribution's own revision, which may change what a saved memory must be.
    let line = text.lines().next().unwrap_or_default();
    let version = line.split_once("version ").map(|(_, version)| version.trim());
    Ok(version.filter(|version| !version.is_empty()).unwrap_or("unknown").to_owned())
}

fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(number("10.0.2").unwrap() > OLDEST);
        assert!(number("5.2.0").unwrap() < OLDEST);
        assert_eq!(number("unknown"), None);
    }
}
