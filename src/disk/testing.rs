//! What the tests of this module share: tools of the system, small disks made with them.

use super::layout::{Content, NewOverlay, Piece};
use super::{Backing, Image, Patch};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

/// That many cases of a property; what fails is printed, and no file is left in the source tree.
pub(super) fn cases(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}

/// An image in memory.
pub(super) fn memory(bytes: Vec<u8>) -> Image {
    Image::new(Arc::new(bytes), Path::new("memory")).unwrap()
}

/// Runs a tool that must be there and succeed; its standard output. System tools of the superuser are found too.
pub(super) fn tool(program: &str, arguments: &[&str]) -> String {
    let output = spawn(program, arguments, b"");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// As [`tool`], with standard input, and standard output as bytes.
pub(super) fn tool_with_input(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let output = spawn(program, arguments, input);
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn spawn(program: &str, arguments: &[&str], input: &[u8]) -> Output {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("these tests need {program}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}

/// A path as the tools take it.
pub(super) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes patches into a raw disk of `size` bytes.
pub(super) fn apply(path: &Path, size: u64, patches: &[Patch]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(size).unwrap();
    for patch in patches {
        file.write_all_at(&patch.bytes, patch.offset).unwrap();
    }
}

/// A file of `size` bytes with these pieces of data, `(start, length, byte)`. One that ends behind it makes it longer.
pub(super) fn sparse(path: &Path, size: u64, pieces: &[(u64, usize, u8)]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (start, len, byte) in pieces {
        file.write_all_at(&vec![*byte; *len], *start).unwrap();
    }
}

/// A new overlay of a size in bytes, with clusters of `2^cluster_bits` bytes, that holds these: `(first, count, byte)`.
/// Byte 0 stands for a discarded cluster, 1 for zeros with space in the file. Later entries replace earlier ones.
pub(super) fn layer(path: &Path, (size, cluster_bits): (u64, u32), backing: Backing<'_>, clusters: &[(u64, u64, u8)]) {
    let end = size.div_ceil(1 << cluster_bits);
    let each = clusters
        .iter()
        .flat_map(|(first, count, byte)| (*first..(first + count).min(end)).map(move |cluster| (cluster, *byte)));
    let held: BTreeMap<u64, u8> = each.collect();
    let mut runs: Vec<(Range<u64>, u8)> = Vec::new();
    for (cluster, byte) in held {
        match runs.last_mut() {
            Some((run, same)) if run.end == cluster && *same == byte => run.end += 1,
            _ => runs.push((cluster..cluster + 1, byte)),
        }
    }
    let piece = |(clusters, byte): (Range<u64>, u8)| {
        let content = match byte {
            0 => Content::Zero { allocated: false },
            1 => Content::Zero { allocated: true },
            byte => {
                Content::Data(vec![byte; usize::try_from((clusters.end - clusters.start) << cluster_bits).unwrap()])
            }
        };
        Piece { clusters, content }
    };
    let pieces: Vec<_> = runs.into_iter().map(piece).collect();
    let put = |bytes: &Vec<u8>, file: &std::fs::File, at| {
        file.write_all_at(bytes, at).unwrap();
        Ok(())
    };
    NewOverlay { path, size, cluster_bits, backing, pieces: &pieces }.write(put, |_| Ok(())).unwrap();
}

/// A folder with a disk in the making.
pub(super) struct Workshop {
    pub(super) dir: tempfile::TempDir,
}

impl Workshop {
    pub(super) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An empty raw disk, partitioned by sgdisk.
    pub(super) fn gpt(&self, size: u64, sgdisk: &[&str]) -> PathBuf {
        let disk = self.path("disk.raw");
        std::fs::File::create(&disk).unwrap().set_len(size).unwrap();
        let mut arguments = sgdisk.to_vec();
        arguments.push(text(&disk));
        tool("sgdisk", &arguments);
        disk
    }

    /// A folder with nothing but these files, from `(path, content)`; a content that begins with `->` is a symbolic
    /// link's target.
    fn tree(&self, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
        let root = self.path(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir(&root).unwrap();
        for (path, content) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match content.strip_prefix(b"->") {
                Some(target) => std::os::unix::fs::symlink(std::str::from_utf8(target).unwrap(), path).unwrap(),
                None => std::fs::write(path, content).unwrap(),
            }
        }
        root
    }

    /// Puts an ext4 filesystem with these files at `start` of a disk, `len` bytes long.
    pub(super) fn ext4(&self, disk: &Path, start: u64, len: u64, options: &[&str], files: &[(&str, &[u8])]) {
        let tree = self.tree(&format!("tree-{start}"), files);
        let offset = format!("offset={start}");
        let blocks = format!("{}k", len / 1024);
        let mut arguments = vec!["-q", "-F", "-t", "ext4", "-E", &offset, "-d", text(&tree)];
        arguments.extend(options);
        arguments.extend([text(disk), &blocks]);
        tool("mke2fs", &arguments);
    }
}

/// Overwrites bytes of a disk.
pub(super) fn poke(disk: &Path, offset: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(disk).unwrap().write_all_at(bytes, offset).unwrap();
}

/// Puts a FAT filesystem with these (empty) files at `start` of a disk, `len` bytes long.
pub(super) fn fat(disk: &Path, start: u64, len: u64, files: &[&str]) {
    let mut bytes = std::io::Cursor::new(vec![0; usize::try_from(len).unwrap()]);
    fatfs::format_volume(&mut bytes, fatfs::FormatVolumeOptions::new()).unwrap();
    let fs = fatfs::FileSystem::new(&mut bytes, fatfs::FsOptions::new()).unwrap();
    for file in files {
        for (end, _) in file.match_indices('/') {
            fs.root_dir().create_dir(&file[..end]).unwrap();
        }
        fs.root_dir().create_file(file).unwrap();
    }
    drop(fs);
    poke(disk, start, bytes.get_ref());
}
