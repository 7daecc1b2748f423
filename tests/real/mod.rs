//! Real QEMU, real Debian disks. Under software emulation each boot takes half a minute or more, so these are few, and
//! each looks at many things. They run one at a time (.config/nextest.toml).

mod failures;
mod features;
mod filesystems;
mod ordinary;
mod provisioners;
mod published;
mod run;
mod shell;
mod suites;
mod warm;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A folder for one test, its cache included: what another test kept, or an earlier run, must not stand in for what this
/// one is to see.
pub(super) struct Bench {
    folder: tempfile::TempDir,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The suite's base image, made from Debian's packages if it isn't in the cache yet.
pub(super) fn base(suite: &str) -> PathBuf {
    let output =
        Command::new(root().join("scripts/base-image")).args(["--suite", suite]).stderr(Stdio::inherit()).output();
    let output = output.unwrap();
    assert!(output.status.success(), "scripts/base-image --suite {suite} failed");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

impl Bench {
    pub(super) fn new() -> Self {
        // Gigabytes: not in a /tmp that may be memory.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { folder }
    }

    /// In a place that every user may enter.
    pub(super) fn outside() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Self { folder }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub(super) fn kiln(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.current_dir(self.folder.path());
        command.env("KILN_CACHE_DIR", self.path("cache"));
        command
    }

    /// Runs kiln to success and gives what it printed on stdout.
    #[track_caller]
    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.kiln().args(arguments).output().unwrap();
        assert!(output.status.success(), "kiln {arguments:?}: {}\n{}", output.status, said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Boots `out/NAME` from an emulated drive as EC2 has it, and runs its tests; the disk must not change.
    #[track_caller]
    pub(super) fn boots(&self, name: &str, firmware: &str) {
        let folder = format!("out/{name}");
        let modified =
            |bench: &Self| std::fs::metadata(bench.path(&format!("{folder}/disk.raw"))).unwrap().modified().unwrap();
        let before = modified(self);
        let outcomes = self.ok(&["--format", "json", "test", &folder, "--firmware", firmware]);
        let outcomes: Value = serde_json::from_str(&outcomes).unwrap();
        assert_eq!(modified(self), before);
        assert_eq!(outcomes.as_array().unwrap().len(), 1);
        assert_eq!(
            (&outcomes[0]["firmware"], &outcomes[0]["failed_units"]),
            (&firmware.into(), &Value::Array(Vec::new()))
        );
    }

    pub(super) fn manifest(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(&format!("out/{name}/manifest.json"))).unwrap()).unwrap()
    }

    /// The root filesystem of a built disk, once e2fsck has found it clean.
    #[track_caller]
    pub(super) fn clean_root(&self, name: &str) -> Root {
        let partitions = self.manifest(name)["partitions"]["partitions"].clone();
        let root = partitions.as_array().unwrap().iter().find(|partition| partition["number"] == 1).unwrap().clone();
        let disk = self.path(&format!("out/{name}/disk.raw"));
        let root = Root::of(&disk, root["start"].as_u64().unwrap(), &self.path(&format!("{name}.ext4")));
        let check = run(Command::new("/sbin/e2fsck").arg("-fn").arg(&root.0));
        assert!(!check.contains("WARNING"), "{check}");
        root
    }
}

/// An ext4 filesystem to look into without mounting it.
pub(super) struct Root(PathBuf);

impl Root {
    /// The filesystem that begins at a byte of a disk, copied to `file`.
    pub(super) fn of(disk: &Path, start: u64, file: &Path) -> Self {
        run(Command::new("dd").arg(format!("if={}", disk.display())).arg(format!("of={}", file.display())).args([
            "bs=1M",
            "iflag=skip_bytes",
            "conv=sparse",
            "status=none",
            &format!("skip={start}"),
        ]));
        Self(file.to_owned())
    }

    fn debugfs(&self, request: &str) -> (String, String) {
        let output = Command::new("/sbin/debugfs").args(["-R", request]).arg(&self.0).output().unwrap();
        (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// A number of the superblock.
    fn number(&self, field: &str) -> u64 {
        let (text, _) = self.debugfs("show_super_stats -h");
        let value = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        value.trim().parse().unwrap()
    }

    /// How many blocks the filesystem has.
    pub(super) fn blocks(&self) -> u64 {
        self.number("Block count:")
    }

    /// Bytes in a block.
    pub(super) fn block_size(&self) -> u64 {
        self.number("Block size:")
    }

    pub(super) fn has(&self, path: &str) -> bool {
        !self.debugfs(&format!("stat \"{path}\"")).1.contains("File not found")
    }

    pub(super) fn read(&self, path: &str) -> String {
        assert!(self.has(path), "{path} is missing");
        self.debugfs(&format!("cat \"{path}\"")).0
    }

    pub(super) fn names(&self, folder: &str) -> Vec<String> {
        let (listing, _) = self.debugfs(&format!("ls -p \"{folder}\""));
        let name = |line: &str| line.split('/').nth(5).map(str::to_owned);
        let names = listing.lines().filter_map(name).filter(|name| !matches!(name.as_str(), "." | ".." | ""));
        names.collect()
    }
}

pub(super) fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[track_caller]
pub(super) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, said(&output));
    said(&output)
}
