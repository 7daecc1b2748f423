//! A workbench for one test: a folder with a base, a recipe and a cache, kiln run in it, and a look at what is left.

mod aws;
mod base;
mod guest;
mod proxy;
mod small;
mod terminal;

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kiln::disk::Digest;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

pub(crate) use aws::Aws;
pub(crate) use base::{Base, append_data, append_hole, append_noise, tool, write_base};
pub(crate) use guest::{guest, guest_state};
pub(crate) use proxy::{Deed, Harm, Proxy, Way};
pub(crate) use small::SmallFilesystem;
pub(crate) use terminal::Terminal;

/// Nothing here takes longer unless it hangs.
const HANG: Duration = Duration::from_secs(60);

pub(crate) struct Bench {
    folder: tempfile::TempDir,
}

/// What came of a run of kiln.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A kiln to be started.
pub(crate) struct Kiln {
    command: Command,
}

/// A kiln that runs.
pub(crate) struct Running {
    child: Child,
    readers: [std::thread::JoinHandle<Vec<u8>>; 2],
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

impl Bench {
    /// With a base that boots directly.
    pub(crate) fn new() -> Self {
        let bench = Self::empty();
        write_base(&bench.path("base.raw"), Base::Direct);
        bench
    }

    /// Without a base.
    pub(crate) fn empty() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        for name in ["home", "traces"] {
            std::fs::create_dir(bench.path(name)).unwrap();
        }
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path(name)).unwrap()).into_owned()
    }

    /// Changes the manifest of `out/web`.
    pub(crate) fn manifest(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = serde_json::from_str(&self.read("out/web/manifest.json")).unwrap();
        change(&mut manifest);
        self.write("out/web/manifest.json", manifest.to_string());
    }

    /// As [`Self::manifest`], as if kiln had written the manifest so: with the digest that it then has.
    pub(crate) fn signed_manifest(&self, change: impl FnOnce(&mut Value)) {
        self.manifest(|manifest| {
            change(manifest);
            manifest.as_object_mut().unwrap().remove("manifest_sha256");
            manifest["manifest_sha256"] = json!(Digest::of(manifest.to_string().as_bytes()));
        });
    }

    /// Writes `web.toml`: this base, no network unless `more` says otherwise, and `more`.
    pub(crate) fn recipe(&self, more: &str) {
        let machine = if more.contains("[machine]") { "" } else { "[machine]\nnetwork = \"none\"\n" };
        self.write("web.toml", format!("name = \"web\"\n[base]\nimage = \"base.raw\"\n{machine}{more}"));
    }

    /// A recipe with one step, `hello`.
    pub(crate) fn one_step(&self) {
        self.recipe("[[provision]]\nname = \"hello\"\ninline = \"echo hello\"\n");
    }

    /// kiln in this folder, in an environment of nothing but what it needs, with the fake QEMU.
    pub(crate) fn kiln<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Kiln {
        self.program(Path::new(env!("CARGO_BIN_EXE_kiln")), arguments)
    }

    /// Another program in kiln's place, in the same environment.
    pub(crate) fn program<S: AsRef<OsStr>>(&self, program: &Path, arguments: impl IntoIterator<Item = S>) -> Kiln {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.folder.path()).env_clear();
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("/usr/sbin:/usr/bin:/sbin:/bin:{path}"));
        command.env("HOME", self.path("home")).env("TMPDIR", self.path("home"));
        command.env("KILN_CACHE_DIR", self.path("cache"));
        command.env("KILN_QEMU", fixtures().join("fake-qemu/qemu-system-x86_64"));
        command.env("FAKE_QEMU_DIR", self.path("traces"));
        Kiln { command }
    }

    /// `kiln -q build web.toml` without the accelerator probe, with a scenario for the fake QEMU.
    pub(crate) fn build(&self, scenario: &Value) -> Kiln {
        self.kiln(["-q", "build", "web.toml", "--accel", "tcg"]).scenario(scenario)
    }

    /// An output that an earlier build left.
    pub(crate) fn earlier_output(&self) {
        self.write("out/web/disk.raw", "good");
        self.write("out/web/manifest.json", "{}");
    }

    /// It is as it was.
    #[track_caller]
    pub(crate) fn assert_earlier_output(&self) {
        assert_eq!(self.read("out/web/disk.raw"), "good");
        assert_eq!(self.names("out/web"), ["disk.raw", "manifest.json"]);
    }

    /// Waits until the fake QEMU has come to a moment (or whatever has left a file of that name in the traces).
    pub(crate) fn wait_for(&self, trace: &str) {
        let path = self.path("traces").join(trace);
        wait_until(&format!("{trace} in the traces"), || path.exists());
    }

    /// What is in a folder, hidden names too, in order; none if there is no such folder.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// What the fake QEMU left, in order, of a kind.
    pub(crate) fn traces(&self, prefix: &str) -> Vec<String> {
        let names = self.names("traces").into_iter();
        names.filter(|name| name.starts_with(prefix) && !name.contains(".new")).collect()
    }

    /// The commands that the fake QEMU got.
    pub(crate) fn commands(&self) -> Vec<Value> {
        let read = |name: &String| serde_json::from_str(&self.read(&format!("traces/{name}"))).unwrap();
        self.traces("command-").iter().map(read).collect()
    }

    /// The process ids of every fake QEMU that ran here.
    pub(crate) fn qemus(&self) -> Vec<i32> {
        self.traces("pid-").iter().map(|name| name.rsplit('-').next().unwrap().parse().unwrap()).collect()
    }

    /// No process, no scratch, nothing half-made: `out` holds just these names.
    #[track_caller]
    pub(crate) fn assert_tidy(&self, out: &[&str]) {
        assert_eq!(self.names("out"), out, "what is in the out folder");
        assert_eq!(self.names("cache/work"), [""; 0], "what is in the cache's scratch");
        let left: Vec<_> = self.names("home").into_iter().filter(|name| name.starts_with(".tmp")).collect();
        assert_eq!(left, [""; 0], "what is in the temporary folder");
        self.assert_no_qemu();
    }

    /// Whether a fake QEMU that has left a trace still runs.
    pub(crate) fn any_qemu(&self) -> bool {
        self.qemus().into_iter().any(is_fake_qemu)
    }

    /// Whether any fake QEMU has left a trace of this kind.
    pub(crate) fn any_trace(&self, prefix: &str) -> bool {
        !self.traces(prefix).is_empty()
    }

    /// Removes what the fake QEMUs left; none may run.
    pub(crate) fn forget(&self) {
        for name in self.names("traces") {
            std::fs::remove_file(self.path("traces").join(name)).unwrap();
        }
    }

    #[track_caller]
    pub(crate) fn assert_no_qemu(&self) {
        for pid in self.qemus() {
            assert!(!is_fake_qemu(pid), "QEMU {pid} still runs");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for pid in self.qemus().into_iter().filter(|pid| is_fake_qemu(*pid)) {
            let _ = rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

fn is_fake_qemu(pid: i32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains("fake-qemu")
}

/// Waits, but not for ever.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG;
    while !done() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Kiln {
    pub(crate) fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// In another folder than the bench's.
    pub(crate) fn within(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.command.env_remove(key);
        self
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    pub(crate) fn scenario(self, scenario: &Value) -> Self {
        self.env("FAKE_QEMU", scenario.to_string())
    }

    /// Starts it in a process group of its own, as a shell does with a job.
    pub(crate) fn start(mut self) -> Running {
        use std::os::unix::process::CommandExt;
        let command = self.command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Running { child, readers: [read_all(out), read_all(errors)] }
    }

    pub(crate) fn run(self) -> Ran {
        self.start().end()
    }

    /// As [`Self::start`], with standard input for the test to write to.
    pub(crate) fn start_with_stdin(mut self) -> (Running, std::process::ChildStdin) {
        use std::os::unix::process::CommandExt;
        let command = self.command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let input = child.stdin.take().unwrap();
        (Running { child, readers: [read_all(out), read_all(errors)] }, input)
    }

    /// As [`Self::start`], with the terminal as its standard input.
    pub(crate) fn start_at(mut self, terminal: &Terminal) -> Running {
        use std::os::unix::process::CommandExt;
        let command = self.command.process_group(0).stdin(terminal.far_end());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (out, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Running { child, readers: [read_all(out), read_all(errors)] }
    }

    /// As [`Self::start`], with standard error for the test to read.
    pub(crate) fn start_with_stderr(mut self) -> (Running, std::process::ChildStderr) {
        use std::os::unix::process::CommandExt;
        let command = self.command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        (Running { child, readers: [read_all(out), read_all(std::io::empty())] }, errors)
    }
}

fn read_all(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

impl Running {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// As Ctrl-C does at a terminal: to every process of the job.
    pub(crate) fn signal_job(&self, signal: Signal) {
        rustix::process::kill_process_group(self.pid(), signal).unwrap();
    }

    /// Waits for its end, and panics if it does not come.
    #[track_caller]
    pub(crate) fn end(self) -> Ran {
        self.end_within(HANG)
    }

    #[track_caller]
    fn end_within(mut self, limit: Duration) -> Ran {
        let status = self.wait(limit);
        let [stdout, stderr] = self.readers.map(|reader| reader.join().unwrap());
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("kiln prints UTF-8");
        let ran = Ran { code: status.code(), stdout: text(stdout), stderr: text(stderr) };
        ran.assert_polite();
        ran
    }

    /// As [`Self::end`], with the most memory that kiln itself took at any time, in KiB: not that of its children. It may
    /// have much to do.
    #[track_caller]
    pub(crate) fn end_with_peak(self) -> (Ran, u64) {
        let status = format!("/proc/{}/status", self.child.id());
        let watcher = std::thread::spawn(move || {
            let mut peak = 0;
            // A process that has ended has no memory.
            while let Some(now) = std::fs::read_to_string(&status).ok().and_then(|text| peak_in(&text)) {
                peak = now;
                std::thread::sleep(Duration::from_millis(1));
            }
            peak
        });
        (self.end_within(4 * HANG), watcher.join().unwrap())
    }

    #[track_caller]
    fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                panic!("kiln hangs");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The peak of resident memory in a `/proc/PID/status`, in KiB.
fn peak_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}

impl Ran {
    /// Nobody who types something ever sees how kiln is made.
    #[track_caller]
    fn assert_polite(&self) {
        for rude in ["panicked at", "RUST_BACKTRACE", "Error {", "Os {", "Some(", "Err(", "src/"] {
            assert!(!self.stderr.contains(rude), "{rude}: {}", self.stderr);
        }
    }

    /// It failed like this, and printed no result.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert_eq!(self.stdout, "");
        self.stderr
    }

    /// It went well: its result.
    #[track_caller]
    pub(crate) fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// The events on standard error, which must all be JSON.
    pub(crate) fn events(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.stderr.lines().map(parse).collect()
    }
}

/// A scenario in which the step `hello` does this.
pub(crate) fn step(actions: Value) -> Value {
    json!({ "step hello": actions })
}
