//! A recipe becomes an output folder. [`build`] is the story, top to bottom.

mod archive;
mod export;
mod facts;
mod failure;
mod finished;
mod found;
mod guest_code;
mod inputs;
mod layers;
mod log;
pub mod manifest;
pub mod many;
mod output;
mod packages;
mod record;
pub(crate) mod session;
mod shell;
mod steps;
pub(crate) mod testing;
mod turns;
mod uefi_data;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::cancel::Cancel;
use crate::disk::{BLOCK, Backing, Image};
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::plan::{BootPath, Plan};
use crate::recipe::{self, Recipe};
use crate::store::{self, Imported, Store};
use crate::units::{MIB, Size};
use crate::vm;
use crate::vm::accelerator::{self, Kvm, Wanted};
use crate::vm::guest::{Guest, Rest};
use crate::vm::host::Host;
use crate::vm::spec::Accelerator;
use export::{Early, Export};
use facts::{Growth, acceleration, make_plan, processor};
pub use facts::{Planned, plan};
pub(crate) use failure::{disk_failure, guest_failure};
use finished::{artifact_key, finished};
pub use found::{Outlook, kept, outlook};
use guest_code::guest_code;
use inputs::Inputs;
pub use layers::Fresh;
use layers::{Keep, Layers, Start};
use manifest::{DISK, GuestFacts, Manifest, PublishFacts, SCHEMA, StepFacts, TestFacts};
use many::Beside;
use output::Pending;
use record::Recorder;
use session::Session;
pub use shell::{ShellRequest, Visitor, shell};
use steps::Logs;
use turns::Turn;
pub use verify::check_disk;

/// Room that a build takes beside the base's own data: the overlay's growth and the logs.
const ROOM: u64 = 512 * MIB;

/// What the user asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// `--set KEY=VALUE`, in order.
    pub set: Vec<String>,
    /// The folder that output folders are made in.
    pub out: PathBuf,
    /// Which accelerator to use.
    pub accelerator: Wanted,
    /// `KILN_QEMU`.
    pub qemu: Option<PathBuf>,
    /// `KILN_QEMU_IMG`.
    pub qemu_img: Option<PathBuf>,
    /// `SOURCE_DATE_EPOCH`.
    pub source_date_epoch: Option<u64>,
    /// Keep the failed guest's disk.
    pub keep_on_error: bool,
    /// What must not be taken from the store.
    pub fresh: Fresh,
    /// The manifest shall have the disk's plain SHA-256.
    pub sha256: bool,
    /// What is known by its size and times is read again.
    pub verify: bool,
}

/// A finished output folder.
#[derive(Debug, Clone)]
pub struct Artifact {
    /// Where it is.
    pub folder: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// Builds the recipe.
///
/// # Errors
/// The first thing that went wrong. QEMU has ended, nothing half-made is left; logs are in `OUT/NAME.failed`.
pub fn build(request: &Request, store: &Store, events: &Events, cancel: &Cancel) -> Result<Artifact, Error> {
    let recipe = read_recipe(&request.recipe, &request.set)?;
    warn(&recipe, events);
    let inputs = inputs::read(&recipe, request.source_date_epoch, cancel)?;
    build_recipe(&recipe, &inputs, request, None, store, events, cancel)
}

fn warn(recipe: &Recipe, events: &Events) {
    for warning in &recipe.warnings {
        events.emit(Event::Warning { message: warning.message.clone(), help: Some(warning.help.clone()) });
    }
}

fn build_recipe(
    recipe: &Recipe,
    inputs: &[Inputs],
    request: &Request,
    beside: Option<Beside<'_>>,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Artifact, Error> {
    if request.verify {
        verify::base(recipe, store, events, cancel)?;
    }
    let publish = PublishFacts::read(recipe)?;
    if let Some(artifact) = finished(recipe, inputs, &publish, request, store, events, cancel)? {
        return Ok(artifact);
    }
    let (host, accelerator) = match &beside {
        Some(beside) => (beside.host.clone(), beside.accelerator),
        None => find_host(request.accelerator, (&request.qemu, &request.qemu_img), store, events, cancel)?,
    };
    let base = import_base(recipe, &host, store, events, cancel)?;
    let (plan, root, growth) = make_plan(recipe, &base, inputs, &acceleration(accelerator))?;
    if let BootPath::Firmware { reason } = &plan.boot {
        events.note(format!("booting by firmware: {reason}"));
    }
    check_room(&base, request, store)?;

    let scratch = store.scratch()?;
    let pending = Pending::begin(&request.out, &recipe.name)?;
    let recorder = Recorder::begin(events, &pending)?;
    let session = Session {
        recipe,
        plan: &plan,
        root: &root,
        host: &host,
        accelerator,
        scratch: scratch.path(),
        console_log: pending.path().join("console.log"),
        events: &recorder.events,
        cancel,
        boots: 0,
        overlays: 0,
        first_overlay: 0,
        network_up: false,
        keyboard: false,
    };
    let job = Job { request, base: &base, store, growth, inputs, publish, recorder: &recorder };
    let alone = beside.is_none();
    match job.run(session, &pending, beside) {
        Ok(manifest) => {
            let folder = pending.commit()?;
            store.know_disk(&folder.join(DISK), &manifest.digest);
            if alone {
                tidy(store, events);
            }
            Ok(Artifact { folder, manifest })
        }
        Err(error) => Err(failure::keep(error, request, pending, &scratch)),
    }
}

/// QEMU and qemu-img, which the user may have named, and what the host accelerates.
fn find_host(
    wanted: Wanted,
    (qemu, qemu_img): (&Option<PathBuf>, &Option<PathBuf>),
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<(Host, Accelerator), Error> {
    let host = Host::find(qemu.clone(), qemu_img.clone(), cancel)?;
    let accelerator = choose_accelerator(wanted, &host, store, events, cancel)?;
    Ok((host, accelerator))
}

/// Keeps the store within its limits. The build is done: nothing of this fails it.
fn tidy(store: &Store, events: &Events) {
    match store.collect(store.default_limits()) {
        Ok(removed) => {
            for gone in removed {
                events.detail(format!("removed from the cache, which was full: {}", gone.name));
            }
        }
        Err(error) => events.warn(format!("the cache could not be tidied up: {}", error.message)),
    }
}

/// Reads and parses a recipe.
///
/// # Errors
/// When it can't be read or is wrong.
pub fn read_recipe(path: &Path, set: &[String]) -> Result<Recipe, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let shown = path.display();
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => format!("the recipe `{shown}` does not exist"),
            std::io::ErrorKind::InvalidData => format!("the recipe `{shown}` is not UTF-8 text"),
            std::io::ErrorKind::IsADirectory => format!("the recipe `{shown}` is a folder"),
            _ => format!("cannot read the recipe `{shown}`: {error}"),
        };
        Error::new(Exit::Input, message).help("`kiln init` writes a recipe to start from")
    })?;
    recipe::parse(path, &text, set)
}

/// Finds out what the host accelerates, and says so where it is not what one would wish.
///
/// # Errors
/// When KVM is insisted on and doesn't work.
pub fn choose_accelerator(
    wanted: Wanted,
    host: &Host,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Accelerator, Error> {
    let kvm = match wanted {
        Wanted::Tcg => Kvm::Absent,
        Wanted::Auto | Wanted::Kvm => accelerator::probe(&host.qemu, &store.accelerator_memory(), cancel)?,
    };
    match accelerator::choose(wanted, &kvm) {
        Ok((accelerator, None)) => Ok(accelerator),
        Ok((accelerator, Some(cause))) => {
            let message = format!("using software emulation (TCG), which is several times slower: {cause}");
            events.emit(Event::Warning { message, help: Some(kvm.remedy().to_owned()) });
            Ok(accelerator)
        }
        Err(kvm) => Err(Error::new(Exit::Host, format!("--accel kvm: {}", kvm.cause())).help(kvm.remedy())),
    }
}

fn import_base(
    recipe: &Recipe,
    host: &Host,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Imported, Error> {
    let base = &recipe.base;
    let path = match &base.image {
        recipe::Image::Path(path) => &from_home(path),
        recipe::Image::Url(url) => {
            return Err(Error::new(Exit::Input, format!("kiln can't download `{url}` yet"))
                .at(recipe.place(&base.span))
                .help("download it and name the file: image = \"FILE\""));
        }
    };
    let imported = store.import_base(path, base.digest.as_ref(), &host.qemu_img, events, cancel);
    imported.map_err(|error| at_base(recipe, error))
}

/// A failure of the base, with its place in the recipe.
fn at_base(recipe: &Recipe, error: Error) -> Error {
    if error.exit != Exit::Input || error.place.is_some() {
        return error;
    }
    let digest = recipe.base.digest_span.as_ref().filter(|_| !error.notes.is_empty());
    let place = recipe.place(digest.unwrap_or(&recipe.base.span));
    error.at(place)
}

/// A path that begins with `~/` is in the user's home.
fn from_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => path.to_owned(),
    }
}

fn check_room(base: &Imported, request: &Request, store: &Store) -> Result<(), Error> {
    let data = store::allocated(&base.disk).unwrap_or(0);
    let mut out = request.out.clone();
    while !out.exists() && out.pop() {}
    let out = if out.as_os_str().is_empty() { PathBuf::from(".") } else { out };
    for (place, need, help) in [
        (store.path(), ROOM, "free some space, or choose another place with --cache-dir"),
        (out.as_path(), data + ROOM, "free some space, or choose another place with --out"),
    ] {
        let free = store::free_space(place).unwrap_or(u64::MAX);
        if free < need {
            let (shown, free, need) = (place.display(), Size(free), Size(need));
            let message = format!("the filesystem of `{shown}` has {free} free, and this build needs about {need}");
            return Err(Error::new(Exit::Host, message).help(help));
        }
    }
    Ok(())
}

/// What the build needs beside its guest.
struct Job<'a> {
    request: &'a Request,
    base: &'a Imported,
    store: &'a Store,
    growth: Growth,
    inputs: &'a [Inputs],
    publish: PublishFacts,
    recorder: &'a Recorder,
}

impl Job<'_> {
    fn run(
        &self,
        mut session: Session<'_>,
        pending: &Pending,
        mut beside: Option<Beside<'_>>,
    ) -> Result<Manifest, Error> {
        let events = session.events;
        let machine =
            layers::machine_key(session.recipe, session.plan, session.root, session.accelerator, session.host);
        let mut layers = Layers::new(self.store, &session, &self.base.sha256, machine);
        let turn = beside.as_mut().map(|beside| &mut beside.turn);
        let (mut guest, start) = self.begin(&mut session, &mut layers, turn)?;
        let behind = [vec![self.base.disk.clone()], layers.disks()].concat();
        // Not before: a guest that boots has use for all processors, one that runs steps rarely.
        let early = Early::begin(behind, session.plan.disk_size.bytes(), pending);
        session.give_network(&mut guest)?;

        let mut done = self.cached_steps(&session, &layers, start.done(), pending);
        let time = self.request.source_date_epoch.unwrap_or_else(now);
        let logs = Logs { folder: pending.path(), after_failure: Some(pending.after_failure()) };
        for index in done.len()..session.recipe.steps.len() {
            let started = Instant::now();
            let step = steps::run(&session, &mut guest, index, &self.inputs[index], &logs, time);
            done.push(step.map_err(|error| {
                if self.request.keep_on_error && error.exit == Exit::Step {
                    // What the step wrote is still in the guest's memory. If it can't be had, its disk is as it is.
                    let _ = guest.sync(Duration::from_secs(60));
                }
                failure::with_shell(error, self.request, session.plan, index)
            })?);
            let rebooted = session.recipe.steps[index].reboot;
            if rebooted {
                guest = reboot(&mut session, guest)?;
                session.give_network(&mut guest)?;
            }
            let step = &session.recipe.steps[index];
            let log = pending.path().join(steps::log_name(index, step));
            let shared = beside.as_ref().is_some_and(|beside| beside.go_on_from(&session.plan.layers[index + 1].key));
            let (memory, sets_kernel) = (step.checkpoint.or(shared.then_some(true)), self.inputs[index].sets_kernel);
            let keep = Keep { memory, log: Some(&log), sets_kernel, rebooted };
            layers.keep(index + 1, started.elapsed(), keep, &mut session, &mut guest)?;
        }
        let packages = events.phase("seal", "sealing the disk", |_| String::new(), || seal(&mut session, guest))?;
        let exported = export::export(&session, early, pending)?;
        let sha256 = verify::wants_sum(session.recipe, self.request).then(|| {
            let image = Image::raw(&pending.path().join(DISK)).map_err(disk_failure)?;
            verify::sum(&image, events, session.cancel)
        });
        let sha256 = sha256.transpose()?;
        let manifest = Manifest { sha256, ..self.manifest(&session, &exported, &layers, done, packages)? };
        manifest.write(&pending.path())?;
        Ok(manifest)
    }

    /// The guest where the build begins: at the base, which is booted and grown, or at a layer.
    fn begin(
        &self,
        session: &mut Session<'_>,
        layers: &mut Layers<'_>,
        mut turn: Option<&mut Turn<'_>>,
    ) -> Result<(Guest, Start), Error> {
        let limit = fresh_from(&self.request.fresh, session.plan)?;
        loop {
            let start = layers.start(limit, session, turn.as_deref_mut())?;
            let Start::Layer { index, memory } = &start else { return Ok((self.begin_anew(session, layers)?, start)) };
            let Some(mut guest) = layers.take_up(*index, memory.as_deref(), session)? else { continue };
            let wanted = index.checked_sub(1).and_then(|step| session.recipe.steps[step].checkpoint);
            if memory.is_none() && wanted != Some(false) {
                session.give_network(&mut guest)?;
                layers.keep_booted(*index, session, &mut guest)?;
            }
            return Ok((guest, start));
        }
    }

    /// The guest of the base, which is kept.
    fn begin_anew(&self, session: &mut Session<'_>, layers: &mut Layers<'_>) -> Result<Guest, Error> {
        let started = Instant::now();
        let mut guest = begin_at_base(session, &self.base.sha256, &self.growth)?;
        // Nothing is worth keeping more than a boot.
        let keep = Keep { memory: Some(true), log: None, sets_kernel: false, rebooted: true };
        layers.keep(0, started.elapsed(), keep, session, &mut guest)?;
        Ok(guest)
    }

    /// What is known of the steps that need not run.
    fn cached_steps(
        &self,
        session: &Session<'_>,
        layers: &Layers<'_>,
        done: usize,
        pending: &Pending,
    ) -> Vec<StepFacts> {
        let steps = session.recipe.steps.iter().zip(self.inputs).take(done.saturating_sub(1));
        let facts = |(index, (step, inputs)): (usize, (&recipe::Step, &Inputs))| {
            session.events.emit(Event::StepCached { index: index + 1, name: step.name.clone() });
            let log = steps::log_name(index, step);
            let known = layers.bring_log(index + 1, &pending.path().join(&log));
            StepFacts {
                name: step.name.clone(),
                sha256: crate::plan::digest(&inputs.parts),
                seconds: 0.0,
                cached: true,
                log: if known { log } else { String::new() },
            }
        };
        steps.enumerate().map(facts).collect()
    }

    fn manifest(
        &self,
        session: &Session<'_>,
        export: &Export,
        layers: &Layers<'_>,
        steps: Vec<StepFacts>,
        packages: Vec<String>,
    ) -> Result<Manifest, Error> {
        let recipe = session.recipe;
        let bug = |error: serde_json::Error| Error::new(Exit::Bug, format!("cannot write the manifest: {error}"));
        let modes = [("legacy-bios", export.modes.legacy_bios), ("uefi", !export.modes.uefi.is_empty())];
        let boot_modes = modes.into_iter().filter(|(_, has)| *has).map(|(mode, _)| mode.to_owned()).collect();
        let recipe::Image::Path(base) = &recipe.base.image else {
            return Err(Error::new(Exit::Bug, "a base without a file was built"));
        };
        Ok(Manifest {
            schema: SCHEMA,
            artifact: artifact_key(recipe, session.plan, &self.publish),
            name: recipe.name.clone(),
            description: recipe.description.clone(),
            arch: recipe.base.arch.as_str().to_owned(),
            digest: export.exported.block_map.digest().to_string(),
            sha256: None,
            size: export.exported.block_map.size(),
            data_bytes: export.exported.block_map.data_bytes(),
            block_size: BLOCK,
            boot_modes,
            partitions: serde_json::to_value(&export.table).map_err(bug)?,
            inputs: manifest::Inputs::of(recipe, base, self.base, &self.request.set),
            tools: BTreeMap::from([
                ("kiln".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("qemu".to_owned(), session.host.qemu_version.clone()),
                ("qemu-img".to_owned(), session.host.qemu_img_version.clone()),
            ]),
            guest: GuestFacts {
                acceleration: acceleration(session.accelerator),
                processor: processor(recipe),
                boot: session.plan.boot.as_str().to_owned(),
                cpus: recipe.machine.cpus,
                memory: recipe.machine.memory.bytes(),
                network: recipe.machine.network.as_str().to_owned(),
            },
            lineage: layers.lineage().to_vec(),
            steps,
            phases: self.recorder.phases(),
            packages: export.packages.clone().unwrap_or(packages),
            tests: TestFacts::of(recipe),
            publish: self.publish.clone(),
        })
    }
}

/// The guest of the base, with the size and the network that the recipe wants.
fn begin_at_base(session: &mut Session<'_>, base: &str, growth: &Growth) -> Result<Guest, Error> {
    session.create_overlay(Backing::Raw(&store::base_from_work(base)), &growth.patches)?;
    let mut guest = boot(session)?;
    if growth.grows {
        session.own(&mut guest, "the larger root filesystem", &["kiln_grow"], &BTreeMap::new())?;
    }
    // Before the layer is kept, so that it is there when the guest is taken up.
    session.give_network(&mut guest)?;
    Ok(guest)
}

/// Starts the guest by the way that the plan has chosen.
fn boot(session: &mut Session<'_>) -> Result<Guest, Error> {
    let way = session.plan.boot.as_str();
    let how = format!("booting the guest ({way}, {})", session.accelerator.as_str());
    let outcome = format!("{way}, {}", session.accelerator.as_str());
    session.events.phase("boot", how, |_| outcome, || session.boot())
}

/// Shuts the guest down in order and starts it again.
fn reboot(session: &mut Session<'_>, mut guest: Guest) -> Result<Guest, Error> {
    let events = session.events;
    events.phase(
        "halt",
        "shutting the guest down for a reboot",
        |()| String::new(),
        || {
            session.network_down(&mut guest)?;
            guest.halt(Duration::from_secs(180)).map_err(guest_failure)
        },
    )?;
    boot(session)
}

/// Takes away what the build left and what instances must not share, then stops the guest with its disk clean. The
/// packages that are installed, unless kiln reads them from the disk.
fn seal(session: &mut Session<'_>, mut guest: Guest) -> Result<Vec<String>, Error> {
    let limit = Duration::from_secs(120);
    let refused = |error| match error {
        vm::Error::Refused(why) => Error::new(Exit::Step, format!("the guest's disk can't be unmounted: {why}"))
            .help("end what uses it in the last step"),
        error => guest_failure(error),
    };
    let packages = session.end(&mut guest, false)?;
    if guest.freeze(false, limit).map_err(refused)? == Rest::Busy {
        session.events.detail("the disk is busy: ending all that runs");
        session.end(&mut guest, true)?;
        guest.freeze(true, limit).map_err(refused)?;
    }
    guest.quit().map_err(guest_failure)?;
    Ok(packages)
}

/// How many layers may be looked for in the store.
fn fresh_from(fresh: &Fresh, plan: &Plan) -> Result<usize, Error> {
    let all = plan.layers.len();
    let step = match fresh {
        Fresh::Nothing => return Ok(all),
        Fresh::All => return Ok(0),
        Fresh::From(step) => step,
    };
    let named = plan.layers.iter().skip(1).position(|layer| layer.name == *step);
    let numbered = step.parse::<usize>().ok().filter(|number| (1..all).contains(number)).map(|number| number - 1);
    match named.or(numbered) {
        // The layers before the step's own.
        Some(index) => Ok(index + 1),
        None => Err(Error::new(Exit::Usage, format!("--no-cache: the recipe has no step `{step}`"))
            .help("name a step, or give its number; `kiln plan` lists them")),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
