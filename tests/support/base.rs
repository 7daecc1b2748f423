//! Base images of a few MiB: just what kiln reads of a real one.

use std::io::Read;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;
/// Of every base here.
pub(crate) const SIZE: u64 = 16 * MIB;

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Base {
    /// GPT with an ext4 root that has systemd and a kernel.
    Direct,
    /// MBR with GRUB's boot code, otherwise the same.
    Mbr,
    /// As `Mbr` without systemd: only its boot loader can start it.
    Firmware,
    /// As `Direct`, with an initrd of 128 MiB, which has a hole for all but a word.
    LargeInitrd,
    /// As `Direct`, with this many MiB of data.
    Large(u64),
}

/// Adds so many bytes of data behind a base's partition, where they take mke2fs no time.
pub(crate) fn append_data(path: &Path, len: u64) {
    let file = std::fs::File::options().append(true).open(path).unwrap();
    std::io::copy(&mut std::io::repeat(b'd').take(len), &mut { file }).unwrap();
}

/// Adds so many bytes without data.
pub(crate) fn append_hole(path: &Path, len: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() + len).unwrap();
}

/// The same of data that doesn't get smaller.
pub(crate) fn append_noise(path: &Path, len: usize) {
    let mut state = 1_u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    });
    let mut file = std::fs::File::options().append(true).open(path).unwrap();
    std::io::Write::write_all(&mut file, &noise.take(len).collect::<Vec<_>>()).unwrap();
}

pub(crate) fn write_base(path: &Path, base: Base) {
    let extra = if let Base::Large(mib) = base { mib * MIB } else { 0 };
    let file = std::fs::File::create(path).unwrap();
    file.set_len(SIZE + extra).unwrap();
    if matches!(base, Base::Mbr | Base::Firmware) {
        tool(Command::new("sfdisk").arg("-q").arg(path), "label: dos\n,,83,*\n");
    } else {
        // The type says: the root of an x86-64 system.
        let root = "label: gpt\n2048,,4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709\n";
        tool(Command::new("sfdisk").arg("-q").arg(path), root);
    }
    let tree = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| {
        let path = tree.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    };
    write("etc/os-release", b"ID=fake\n");
    write("boot/vmlinuz-6.1.0-1-amd64", &kernel());
    write("boot/initrd.img-6.1.0-1-amd64", b"initrd");
    if base == Base::LargeInitrd {
        let initrd = tree.path().join("boot/initrd.img-6.1.0-1-amd64");
        std::fs::File::options().write(true).open(initrd).unwrap().set_len(128 * MIB).unwrap();
    }
    if base != Base::Firmware {
        write("usr/lib/systemd/systemd", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    }
    if extra > 0 {
        write("data", &vec![b'd'; usize::try_from(extra).unwrap()]);
    }
    let length = format!("{}k", (SIZE + extra - 2 * MIB) / 1024);
    let offset = format!("offset={MIB},lazy_itable_init=0");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-E", &offset, "-d"]).arg(tree.path()).arg(path).arg(length);
    tool(&mut make, "");
    if matches!(base, Base::Mbr | Base::Firmware) {
        use std::os::unix::fs::FileExt;
        file.write_all_at(b"\xebGRUB", 0).unwrap();
    }
}

/// The head of a bzImage for x86-64 (Linux Documentation/arch/x86/boot.rst).
fn kernel() -> Vec<u8> {
    let mut kernel = vec![0; 4096];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    kernel[0x236] = 1;
    kernel
}

/// Runs a tool that must be there and succeed.
pub(crate) fn tool(command: &mut Command, input: &str) {
    use std::io::Write;
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    command.env("PATH", path).stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let name = command.get_program().to_owned();
    let mut child = command.spawn().unwrap_or_else(|error| panic!("these tests need {}: {error}", name.display()));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}: {}", name.display(), String::from_utf8_lossy(&output.stderr));
}
