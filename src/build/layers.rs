//! Layers on the way through a build: where it can begin, and what it leaves for the next one.
//!
//! After each step the disk is kept, and the guest's memory where taking it up again saves more than keeping it costs. A
//! build begins at the deepest layer that counts ([`super::found`]): in its memory, or in the memory of an earlier one
//! whose steps since then take less time than a boot, or by booting its disk. A disk is booted only if the guest had
//! nothing outside it that a boot would not bring back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::found::{Found, found, is_expired};
use super::session::{Session, library, shape};
use super::turns::Turn;
use super::{disk_failure, guest_failure, now};
use crate::disk::{Backing, Overlay};
use crate::error::{Error, Exit};
use crate::plan::{self, Part, Plan};
use crate::recipe::Recipe;
use crate::store::{CLAIM_LOOK, Claim, Layer, Making, Pending, Placed, Record, Store};
use crate::units::{hex, show_duration};
use crate::vm::guest::{AGENT, Guest};
use crate::vm::host::Host;
use crate::vm::spec::Accelerator;

/// A memory state is kept where the steps since the last one took at least this long: that is about what it costs.
const WORTH: Duration = Duration::from_millis(1000);
/// How many overlays may be over the base before they are merged into one: each costs time where a guest reads what none
/// of them has, and the names of backing files are joined to one path by QEMU.
const DEEPEST: usize = 16;
/// How long a guest may take to write out its disk.
const SYNC_LIMIT: Duration = Duration::from_secs(300);
/// What is outside the disk after a step that may have changed the kernel's settings.
const KERNEL_SETTINGS: &str = "settings of the kernel";

/// From where on nothing is taken from the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Fresh {
    /// Everything may be taken.
    #[default]
    Nothing,
    /// Nothing may, not even the booted base.
    All,
    /// Nothing from this step on: its name, or its number from 1.
    From(String),
}

/// Where a build begins.
#[derive(Debug)]
pub(super) enum Start {
    /// At the base: it boots, and grows.
    Base,
    /// At the layer with this index, with its memory or by booting its disk.
    Layer { index: usize, memory: Option<PathBuf> },
}

impl Start {
    /// How many layers are there already.
    pub(super) fn done(&self) -> usize {
        match self {
            Self::Base => 0,
            Self::Layer { index, .. } => index + 1,
        }
    }
}

/// What a step left besides its disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keep<'a> {
    /// Whether the guest's memory is kept; none: where that saves more than it costs.
    pub(super) memory: Option<bool>,
    /// What the step printed.
    pub(super) log: Option<&'a Path>,
    /// Whether it may have changed settings of the kernel.
    pub(super) sets_kernel: bool,
    /// Whether the guest was booted after it.
    pub(super) rebooted: bool,
}

/// The layers of one build.
pub(super) struct Layers<'a> {
    store: &'a Store,
    plan: &'a Plan,
    base: &'a str,
    recipe: &'a str,
    /// The key of memory states of this machine.
    machine: String,
    /// What the store has of the plan's layers, as far as it counts.
    found: Found,
    /// What the guest's disk is over, the nearest last. Held so that nothing removes them.
    held: Vec<Layer>,
    /// What was behind it before overlays were merged: it may still be read.
    merged: Vec<Layer>,
    /// Folders that an overlay of this build is over and that could not be made layers.
    placed: Vec<Placed>,
    /// What the guest is made of so far.
    lineage: Vec<Making>,
    /// Whether a step since the last boot may have changed settings of the kernel.
    kernel_set: bool,
    /// How many layers may be taken from the store; the others are made anew.
    limit: usize,
    /// The warnings that were given.
    told: BTreeSet<String>,
    /// Whether QEMU has refused a memory that should have been this machine's.
    refused: bool,
    /// Whether the store takes no more layers.
    full: bool,
    /// The right to make the next layer.
    claim: Option<Claim>,
    /// How long the work since the last memory state took.
    since_memory: Duration,
}

impl<'a> Layers<'a> {
    pub(super) fn new(store: &'a Store, session: &Session<'a>, base: &'a str, machine: String) -> Self {
        let (plan, recipe) = (session.plan, session.recipe.name.as_str());
        Self {
            store,
            plan,
            base,
            recipe,
            machine,
            found: Found::default(),
            held: Vec::new(),
            merged: Vec::new(),
            placed: Vec::new(),
            lineage: Vec::new(),
            kernel_set: false,
            limit: 0,
            told: BTreeSet::new(),
            refused: false,
            full: false,
            claim: None,
            since_memory: Duration::ZERO,
        }
    }

    /// Finds where to begin, and holds what is behind it. The layer that comes next is claimed; if another kiln makes it,
    /// that is waited for, and the build begins there. A build that runs beside others has its turn then.
    pub(super) fn start(
        &mut self,
        limit: usize,
        session: &Session<'_>,
        mut turn: Option<&mut Turn<'_>>,
    ) -> Result<Start, Error> {
        let mut start = self.look(limit, session);
        loop {
            self.claim = None;
            self.claim = self.claim(start.done(), session, turn.as_deref_mut())?;
            let again = self.look(limit, session);
            // Each turn begins deeper than the last; or, should a layer have been removed meanwhile, it ends here.
            if again.done() <= start.done() {
                if again.done() < start.done() {
                    self.claim = None;
                    self.claim = self.claim(again.done(), session, turn)?;
                }
                self.tell(&again, session);
                return Ok(again);
            }
            start = again;
        }
    }

    /// Finds where to begin for the guest as it is after the layer with this index. Nothing is claimed: nothing will be
    /// kept. None if that layer is not there.
    pub(super) fn visit(&mut self, index: usize, session: &Session<'_>) -> Option<Start> {
        let start = self.look(index + 1, session);
        (start.done() > index || self.found.layers(index).next().is_some()).then_some(start)
    }

    /// The index of the deepest layer that is there.
    pub(super) fn deepest(&self) -> Option<usize> {
        found(self.store, self.plan, self.plan.layers.len()).deepest()
    }

    /// The guest as it was when the held layer was kept, in its memory or booted from its disk. None if its memory can't be
    /// taken up: then no other can, and the build begins elsewhere.
    pub(super) fn take_up(
        &mut self,
        index: usize,
        memory: Option<&Path>,
        session: &mut Session<'_>,
    ) -> Result<Option<Guest>, Error> {
        let name = &session.plan.layers[index].name;
        let behind = self.behind().unwrap_or_default();
        session.create_overlay(Backing::Overlay(&behind), &[])?;
        let Some(memory) = memory else { return super::boot(session).map(Some) };
        let network_up = self.network_up();
        let detail = format!("taking up the guest after `{name}`");
        match session.events.phase("resume", detail, |_| String::new(), || session.resume(memory, network_up)) {
            Err(error) if !matches!(error.exit, Exit::Signal(_)) => {
                session.events.warn(format!("the kept memory after `{name}` can't be taken up: {}", error.message));
                self.refused = true;
                Ok(None)
            }
            resumed => resumed.map(Some),
        }
    }

    /// Claims the making of the layer with this index, if it can be kept. Another kiln or build that makes it is waited
    /// for, by a build that runs beside others without its turn.
    fn claim(
        &self,
        index: usize,
        session: &Session<'_>,
        mut turn: Option<&mut Turn<'_>>,
    ) -> Result<Option<Claim>, Error> {
        let next = self.plan.layers.get(index).filter(|layer| layer.cached);
        let mut told = false;
        loop {
            match turn.as_deref_mut() {
                Some(turn) => turn.take(session.cancel)?,
                None => session.cancel.check()?,
            }
            let Some(layer) = next else { return Ok(None) };
            if let Some(claim) = self.store.try_claim(&layer.key)? {
                return Ok(Some(claim));
            }
            let other = match turn.as_deref_mut() {
                Some(turn) => {
                    turn.leave();
                    format!("another build is making `{}`", layer.name)
                }
                None => "another kiln is making this layer".to_owned(),
            };
            if !std::mem::replace(&mut told, true) {
                session.events.note(format!("{other}: waiting for it"));
            }
            // There is no lock to wait for with a signal in mind; a tenth of a second is nothing beside a step.
            std::thread::sleep(CLAIM_LOOK);
        }
    }

    fn look(&mut self, limit: usize, session: &Session<'_>) -> Start {
        self.limit = limit;
        self.found = found(self.store, self.plan, limit);
        for why in self.found.damage() {
            if self.told.insert(why.clone()) {
                session.events.warn(why);
            }
        }
        loop {
            let Some((index, chosen)) = self.found.start(self.taken()) else {
                (self.held, self.lineage, self.kernel_set) = (Vec::new(), Vec::new(), false);
                return Start::Base;
            };
            let layer = self.found.take(index, chosen);
            match self.store.backing(&layer) {
                Ok(_) if !self.boots(&layer, session) => {
                    let name = &self.plan.layers[index].name;
                    session.events.detail(format!("the disk after `{name}` has no kernel to boot it with"));
                }
                Ok(backing) => {
                    let memory = self.taken().and_then(|machine| layer.memory(machine));
                    self.lineage.clone_from(&layer.record().lineage);
                    self.kernel_set = memory.is_some() && layer.record().volatile.starts_with(KERNEL_SETTINGS);
                    self.held = backing;
                    self.held.push(layer);
                    return Start::Layer { index, memory };
                }
                Err(why) => {
                    let name = &self.plan.layers[index].name;
                    session.events.warn(format!("the cached layer of `{name}` can't be used: {why}"));
                }
            }
        }
    }

    /// The key of memory states that can be taken up.
    fn taken(&self) -> Option<&str> {
        (!self.refused).then_some(self.machine.as_str())
    }

    /// Whether a layer can be taken up: in its memory, or by a kernel that is still on its disk.
    fn boots(&self, layer: &Layer, session: &Session<'_>) -> bool {
        let has_memory = self.taken().is_some_and(|machine| layer.memory(machine).is_some());
        has_memory || session.has_kernel(&layer.disk())
    }

    /// Says why the build goes back to an earlier layer than the last that is there, where that takes long.
    fn tell(&self, start: &Start, session: &Session<'_>) {
        let Some(deepest) = self.found.deepest() else { return };
        let Some(layer) = self.found.layers(deepest).next() else { return };
        if start.done() > deepest
            || layer.record().volatile.is_empty()
            || self.found.seconds(start.done(), deepest) < WORTH.as_secs_f64()
        {
            return;
        }
        let (name, volatile) = (&self.plan.layers[deepest].name, &layer.record().volatile);
        let back = match start {
            Start::Base => "the base".to_owned(),
            Start::Layer { index, .. } => format!("`{}`", self.plan.layers[*index].name),
        };
        session.events.note(format!(
            "going back to {back}: what `{name}` left outside the disk ({volatile}) is in no memory that this machine can take"
        ));
    }

    /// The disk that a new overlay goes over, as the overlay names it.
    pub(super) fn behind(&self) -> Option<PathBuf> {
        self.held.last().map(|layer| relative(&layer.id()))
    }

    /// The overlays behind the guest's disk, the nearest last.
    pub(super) fn disks(&self) -> Vec<PathBuf> {
        self.held.iter().map(Layer::disk).collect()
    }

    /// What the guest is made of.
    pub(super) fn lineage(&self) -> &[Making] {
        &self.lineage
    }

    /// Brings what a kept step printed to `log`; `false` if that is not known any more.
    pub(super) fn bring_log(&self, index: usize, log: &Path) -> bool {
        let held = self.held.iter().filter(|layer| layer.record().key == self.plan.layers[index].key);
        let same = |layer: &&Layer| layer.making() == self.lineage.get(index);
        let layers = held.chain(self.found.layers(index)).filter(same);
        layers.into_iter().any(|layer| std::fs::copy(layer.log(), log).is_ok())
    }

    /// Whether the guest of the layer where the build begins has its network.
    pub(super) fn network_up(&self) -> bool {
        self.held.last().is_some_and(|layer| layer.record().network_up)
    }

    /// What the store has by now of this level that is of the guest's own making so far, and may be taken.
    fn kept(&self, index: usize) -> Vec<Layer> {
        let layer = &self.plan.layers[index];
        let shelf = if index < self.limit { self.store.shelves(&[&layer.key]).pop() } else { None };
        let same = |kept: &Layer| {
            let parent = kept.record().lineage.split_last();
            parent.is_some_and(|(own, rest)| rest == self.lineage && !is_expired(own, layer, now()))
        };
        shelf.unwrap_or_default().layers.into_iter().filter(same).collect()
    }

    /// Keeps the layer with this index, which took so long: the guest goes on in a new overlay.
    pub(super) fn keep(
        &mut self,
        index: usize,
        took: Duration,
        what: Keep<'_>,
        session: &mut Session<'_>,
        guest: &mut Guest,
    ) -> Result<(), Error> {
        self.since_memory += took;
        self.kernel_set = !what.rebooted && (self.kernel_set || what.sets_kernel);
        let layer = &self.plan.layers[index];
        if !layer.cached {
            return Ok(());
        }
        let with_memory = guest.savable && what.memory.unwrap_or(self.since_memory >= WORTH);
        // A step that ran because it takes less time than what could be taken instead is no new making of its layer. One
        // whose memory is another machine's is kept again with this one's.
        let kept = self.kept(index);
        let (serial, making) = match kept.first() {
            Some(kept) => (kept.record().serial, kept.making().cloned()),
            None => (0, None),
        };
        let has_memory = |kept: &Layer| self.taken().is_some_and(|machine| kept.memory(machine).is_some());
        let is_kept = kept.iter().any(|kept| !with_memory || has_memory(kept));
        self.lineage.push(match making {
            Some(making) => making,
            None => Making { id: random_id()?, made: now() },
        });
        // The next one is claimed before this one can be found, so that no other build comes in between.
        let next = self.claim(index + 1, session, None)?;
        if !is_kept {
            let record = self.record(layer, serial, took, session.network_up);
            self.write(index, record, with_memory, what.log, session, guest)?;
        }
        self.claim = next;
        Ok(())
    }

    /// Keeps the layer where the build began once more, with the memory of this machine, which had to boot its disk.
    pub(super) fn keep_booted(
        &mut self,
        index: usize,
        session: &mut Session<'_>,
        guest: &mut Guest,
    ) -> Result<(), Error> {
        let Some(held) = self.held.last().filter(|_| guest.savable) else { return Ok(()) };
        let log = held.log();
        let record = Record { backing: Some(held.id()), network_up: session.network_up, ..held.record().clone() };
        self.write(index, record, true, log.exists().then_some(log.as_path()), session, guest)
    }

    /// Writes a layer. That the store has no room for it costs the layer, not the build.
    fn write(
        &mut self,
        index: usize,
        record: Record,
        with_memory: bool,
        log: Option<&Path>,
        session: &mut Session<'_>,
        guest: &mut Guest,
    ) -> Result<(), Error> {
        if self.full {
            return Ok(());
        }
        let layer = &self.plan.layers[index];
        let volatile = self.volatile(guest)?;
        let pending = match self.begin(&layer.key, session) {
            Ok(pending) => pending,
            Err(error) => {
                self.not_kept(&layer.name, &error, session);
                return Ok(());
            }
        };
        let (old, fresh) = session.next_overlay();
        let memory = with_memory.then(|| pending.memory(&self.machine));
        let saved =
            guest.checkpoint(session.nodes(), &fresh, memory.as_deref(), session.scratch).map_err(guest_failure)?;
        let is_merged = self.bring_disk(&old, &pending, session)?;
        let backing = record.backing.filter(|_| !is_merged);
        let record = Record { volatile, backing, ..record };
        let filled = log.map_or(Ok(0), |log| std::fs::copy(log, pending.log())).and(saved.memory);
        if filled.is_err() {
            // Room for what the guest is going to write.
            let _ = memory.as_deref().map(std::fs::remove_file);
        }
        let placed = pending.place(self.store)?;
        let machines: Vec<_> = memory.iter().map(|_| self.machine.clone()).collect();
        let committed = match filled {
            Ok(_) => placed.commit(self.store, record, &machines),
            Err(error) => Err((Error::io("cannot write to the cache", &error), placed)),
        };
        let kept = match committed {
            Ok(kept) => kept,
            Err((error, placed)) => {
                self.not_kept(&layer.name, &error, session);
                self.placed.push(placed);
                return Ok(());
            }
        };
        tell_kept(&kept, with_memory, saved.took, session);
        if is_merged {
            self.merged.append(&mut self.held);
        }
        self.held.push(kept);
        if with_memory {
            self.since_memory = Duration::ZERO;
        }
        Ok(())
    }

    /// Has the guest write out its disk. What it has besides that a boot would not bring back, as text for people.
    fn volatile(&self, guest: &mut Guest) -> Result<String, Error> {
        let left = guest.sync(SYNC_LIMIT).map_err(guest_failure)?;
        let kernel = self.kernel_set.then(|| KERNEL_SETTINGS.to_owned());
        let all: Vec<_> = kernel.into_iter().chain((!left.is_empty()).then_some(left)).collect();
        Ok(all.join("; "))
    }

    /// Begins a layer, and the overlay that the guest will go on in, which names the layer's disk.
    fn begin(&self, key: &str, session: &Session<'_>) -> Result<Pending, Error> {
        let pending =
            Pending::begin(session.scratch, key).map_err(|error| Error::io("cannot write to the cache", &error))?;
        let (backing, size) = (relative(pending.id()), self.plan.disk_size.bytes());
        Overlay::create(&session.following_overlay(), size, Backing::Overlay(&backing), &[]).map_err(disk_failure)?;
        Ok(pending)
    }

    /// Moves the disk that the guest has left to its layer; merged with what it is over, if that is much. Then it is
    /// over the base alone. QEMU still reads the file that it has open, which is the same disk.
    fn bring_disk(&self, old: &Path, pending: &Pending, session: &Session<'_>) -> Result<bool, Error> {
        if self.held.len() + 1 >= DEEPEST {
            let base = crate::store::base_from_work(self.base);
            let merged = crate::store::pass("merge", session.events, session.cancel, |work| {
                Overlay::merge(old, &pending.disk(), &base, work)
            })?;
            match merged {
                Ok(()) => return Ok(true),
                Err(error) => {
                    session.events.detail(format!("overlays are not merged: {}", disk_failure(error).message));
                }
            }
        }
        std::fs::rename(old, pending.disk()).map_err(|error| Error::io("cannot keep a layer", &error))?;
        Ok(false)
    }

    fn not_kept(&mut self, name: &str, error: &Error, session: &Session<'_>) {
        self.full = true;
        session.events.warn(format!("`{name}` and what follows is not kept: {}", error.message));
    }

    fn record(&self, layer: &plan::Layer, serial: u64, took: Duration, network_up: bool) -> Record {
        Record {
            format: 0,
            key: layer.key.clone(),
            parent: layer.parts.value(Part::Parent).map(str::to_owned),
            serial,
            lineage: self.lineage.clone(),
            volatile: String::new(),
            backing: self.held.last().map(Layer::id),
            base: self.base.to_owned(),
            name: layer.name.clone(),
            recipe: self.recipe.to_owned(),
            parts: (*layer.parts).clone(),
            seconds: took.as_secs_f64(),
            network_up,
        }
    }
}

fn tell_kept(kept: &Layer, with_memory: bool, took: Duration, session: &Session<'_>) {
    let Record { name, volatile, .. } = kept.record();
    let memory = if with_memory { " with its memory" } else { "" };
    let outside = if volatile.is_empty() { String::new() } else { format!("; outside its disk: {volatile}") };
    let took = show_duration(took);
    session.events.detail(format!("kept `{name}`{memory}: the guest stood still for {took}{outside}"));
}

fn random_id() -> Result<String, Error> {
    crate::vm::guest::random_id().map_err(guest_failure)
}

/// A layer's disk, as seen from a scratch folder and from another layer.
fn relative(id: &str) -> PathBuf {
    Path::new("../../layers").join(id).join(crate::store::LAYER_DISK)
}

/// What memory states of a machine are kept under: everything that must be alike for QEMU to take one. `root` is the
/// kernel's `root=` on the base.
pub(super) fn machine_key(recipe: &Recipe, plan: &Plan, root: &str, accelerator: Accelerator, host: &Host) -> String {
    let processor = match accelerator {
        Accelerator::Kvm => std::fs::read_to_string("/proc/cpuinfo")
            .unwrap_or_default()
            .lines()
            .filter(|line| ["model name", "flags", "microcode"].iter().any(|start| line.starts_with(start)))
            .take(3)
            .collect(),
        Accelerator::Tcg => String::new(),
    };
    let shape = shape(recipe, plan, root, accelerator);
    // What the agent has read is in the memory.
    let agent = [AGENT, &library()].concat();
    let text = [host.qemu_version.as_str(), &host.qemu.display().to_string(), &processor, &shape, &agent].join("\0");
    hex(&Sha256::digest(text))[..16].to_owned()
}
