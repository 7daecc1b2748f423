//! A small filesystem of its own, which a test fills up, and which several processes use.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A tmpfs in a mount namespace that a process of its own holds. Dropped, it is gone.
pub(crate) struct SmallFilesystem {
    holder: Child,
    place: PathBuf,
    enter: Vec<String>,
}

impl SmallFilesystem {
    /// Mounts it on `place`, with tmpfs(5)'s size.
    ///
    /// # Errors
    /// Why no mount namespace can be had: it takes root, or a user namespace.
    pub(crate) fn mount(place: &Path, size: &str) -> Result<Self, String> {
        let ways: [(&[&str], &[&str]); 2] =
            [(&["-m"], &["-m"]), (&["-r", "-m"], &["-U", "-m", "--preserve-credentials"])];
        let mut said = String::new();
        for (unshare, enter) in ways {
            let script = "mount -t tmpfs -o \"mode=1777,size=$1\" small \"$0\" && echo ready && exec cat";
            let mut command = Command::new("unshare");
            command.args(unshare).args(["sh", "-c", script]).arg(place).arg(size);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut holder = command.spawn().map_err(|error| format!("unshare: {error}"))?;
            let mut line = String::new();
            BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            if line == "ready\n" {
                let pid = holder.id().to_string();
                let enter = [&["nsenter", "-t", pid.as_str()], enter, &["--"]].concat();
                let enter = enter.into_iter().map(str::to_owned).collect();
                return Ok(Self { enter, holder, place: place.to_owned() });
            }
            holder.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
            holder.wait().unwrap();
        }
        Err(said)
    }

    /// The words before a command that is to run in there. Its paths must be absolute.
    pub(crate) fn enter(&self) -> &[String] {
        &self.enter
    }

    /// How a process outside gets at a path in there.
    pub(crate) fn outside(&self, path: &Path) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(path.strip_prefix("/").unwrap())
    }

    /// Leaves this much room, in KiB.
    pub(crate) fn fill(&self, leave: usize) {
        let used = "$(df -k --output=used \"$0\" | tail -1)";
        self.remount(&format!("$(({used} + {leave}))k"));
    }

    /// Gives it another size.
    pub(crate) fn remount(&self, size: &str) {
        let script = format!("mount -o remount,size={size} \"$0\"");
        let mut command = Command::new(&self.enter[0]);
        command.args(&self.enter[1..]).args(["sh", "-c", &script]).arg(&self.place);
        // What is written meanwhile may be more than is left then, and the kernel refuses.
        command.stderr(Stdio::null()).status().unwrap();
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
