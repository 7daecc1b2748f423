//! Layers on the way through a build: where it can begin, and what it leaves for the next one.
//!
//! After each step the disk is kept, and the guest's memory where taking it up again saves more than keeping it costs. A
//! build begins at the deepest layer that is there: in its memory, or in the memory of an earlier one whose steps since
//! then take less time than a boot, or by booting its disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::session::{Session, library};
use super::turns::Turn;
use super::{disk_failure, guest_failure};
use crate::disk::{Backing, Overlay};
use crate::error::{Error, Exit};
use crate::plan::{self, Part, Plan};
use crate::store::{CLAIM_LOOK, Claim, Layer, Lookup, Pending, Record, Store};
use crate::units::{hex, show_duration};
use crate::vm::guest::{AGENT, Guest};

/// A memory state is kept where the steps since the last one took at least this long: that is about what it costs.
const WORTH: Duration = Duration::from_millis(1000);
/// How many layers may be over each other for another to be added only for its memory. [`Overlay`] has a limit.
const DEEPEST: usize = 40;
/// How long a guest may take to write out its disk.
const SYNC_LIMIT: Duration = Duration::from_secs(300);

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

/// What is kept besides the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keep<'a> {
    /// Whether the guest's memory is; none: where that saves more than it costs.
    pub(super) memory: Option<bool>,
    /// What the step printed.
    pub(super) log: Option<&'a Path>,
}

/// The layers of one build.
pub(super) struct Layers<'a> {
    store: &'a Store,
    plan: &'a Plan,
    base: &'a str,
    recipe: &'a str,
    /// The key of memory states of this machine.
    machine: String,
    /// Held so that nothing removes them: what is behind the guest's disk, the nearest last.
    held: Vec<Layer>,
    /// The right to make the next layer.
    claim: Option<Claim>,
    /// How long the work since the last memory state took.
    since_memory: Duration,
    /// How many layers may be taken from the store; the others are made anew.
    limit: usize,
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
            held: Vec::new(),
            claim: None,
            since_memory: Duration::ZERO,
            limit: 0,
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
        self.limit = limit;
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
                return Ok(again);
            }
            start = again;
        }
    }

    /// Finds the layer with this index, or the deepest that is there, and holds it. Nothing is claimed: nothing will be
    /// kept.
    pub(super) fn visit(&mut self, index: Option<usize>, session: &Session<'_>) -> Option<Start> {
        let last = self.plan.layers.len().checked_sub(1)?;
        let mut wanted = index.map_or(0..=last, |index| index..=index).rev();
        let (index, held) = wanted.find_map(|index| Some((index, self.chain(&self.plan.layers[index], session)?)))?;
        self.held = held;
        let memory = self.held.last()?.memory(&self.machine);
        Some(Start::Layer { index, memory })
    }

    /// The guest as it was when the held layer was kept, in its memory or booted from its disk.
    pub(super) fn take_up(
        &self,
        index: usize,
        memory: Option<&Path>,
        session: &mut Session<'_>,
    ) -> Result<Guest, Error> {
        let name = &session.plan.layers[index].name;
        let behind = self.behind().unwrap_or_default();
        if let Some(memory) = memory {
            session.create_overlay(Backing::Overlay(&behind), &[])?;
            let network_up = self.network_up();
            let detail = format!("taking up the guest after `{name}`");
            let resumed =
                session.events.phase("resume", detail, |_| String::new(), || session.resume(memory, network_up));
            match resumed {
                Err(error) if !matches!(error.exit, Exit::Signal(_)) => {
                    session.events.warn(format!("the kept memory after `{name}` can't be taken up: {}", error.message));
                }
                resumed => return resumed,
            }
        }
        session.create_overlay(Backing::Overlay(&behind), &[])?;
        super::Job::boot(session)
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
        let found: Vec<_> = self.plan.layers[..limit].iter().map(|layer| self.chain(layer, session)).collect();
        let Some(top) = found.iter().rposition(Option::is_some) else { return Start::Base };
        let with_memory = |index: usize| found[index].as_ref()?.last()?.memory(&self.machine).map(|path| (index, path));
        let seconds = |index: usize| {
            let layer = found[index].as_ref().and_then(|chain| chain.last());
            layer.map_or(f64::INFINITY, |layer| layer.record().seconds)
        };
        let resumed = (0..=top).rev().find_map(with_memory);
        let (index, memory) = match resumed {
            Some((index, path)) if (index + 1..=top).map(seconds).sum::<f64>() < seconds(0).min(f64::MAX) => {
                (index, Some(path))
            }
            _ => (top, None),
        };
        self.held = found.into_iter().nth(index).flatten().unwrap_or_default();
        Start::Layer { index, memory }
    }

    /// The disk that a new overlay goes over, as the overlay names it.
    pub(super) fn behind(&self) -> Option<PathBuf> {
        self.held.last().map(|layer| relative(&layer.id()))
    }

    /// The overlays behind the guest's disk, the nearest last.
    pub(super) fn disks(&self) -> Vec<PathBuf> {
        self.held.iter().map(Layer::disk).collect()
    }

    /// Brings what a kept step printed to `log`; `false` if that is not known any more.
    pub(super) fn bring_log(&self, index: usize, log: &Path) -> bool {
        match self.store.layer(&self.plan.layers[index].key) {
            Lookup::Hit(layer) => std::fs::copy(layer.log(), log).is_ok(),
            Lookup::Miss | Lookup::Damaged(_) => false,
        }
    }

    /// Whether the guest of the layer where the build begins has its network.
    pub(super) fn network_up(&self) -> bool {
        self.held.last().is_some_and(|layer| layer.record().network_up)
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
        let layer = &self.plan.layers[index];
        if !layer.cached {
            return Ok(());
        }
        let with_memory = guest.savable && what.memory.unwrap_or(self.since_memory >= WORTH);
        // One whose disk was booted, because its memory is another machine's, is kept again with this one's.
        if index < self.limit
            && let Lookup::Hit(kept) = self.store.layer_for(&layer.key, &self.machine)
            && (!with_memory || kept.memory(&self.machine).is_some())
        {
            self.claim = self.claim(index + 1, session, None)?;
            return Ok(());
        }
        let record = self.record(layer, took, session.network_up);
        self.write(index, record, with_memory, what.log, session, guest)?;
        // The next one is claimed before this one can be found, so that nobody comes in between.
        self.claim = self.claim(index + 1, session, None)?;
        Ok(())
    }

    /// Keeps the layer where the build began once more, with the memory of this machine, which had to boot its disk.
    pub(super) fn keep_booted(
        &mut self,
        index: usize,
        session: &mut Session<'_>,
        guest: &mut Guest,
    ) -> Result<(), Error> {
        let few = self.held.len() < DEEPEST;
        let Some(held) = self.held.last().filter(|_| guest.savable && few) else { return Ok(()) };
        let log = held.log();
        let record = Record { backing: Some(held.id()), network_up: session.network_up, ..held.record().clone() };
        self.write(index, record, true, log.exists().then_some(log.as_path()), session, guest)
    }

    fn write(
        &mut self,
        index: usize,
        record: Record,
        with_memory: bool,
        log: Option<&Path>,
        session: &mut Session<'_>,
        guest: &mut Guest,
    ) -> Result<(), Error> {
        let layer = &self.plan.layers[index];
        let pending = Pending::begin(session.scratch, &layer.key)?;
        guest.sync(SYNC_LIMIT).map_err(guest_failure)?;
        let (old, fresh) = session.next_overlay();
        Overlay::create(&fresh, self.plan.disk_size.bytes(), Backing::Overlay(&relative(pending.id())), &[])
            .map_err(disk_failure)?;
        let memory = with_memory.then(|| pending.memory(&self.machine));
        let saved =
            guest.checkpoint(session.nodes(), &fresh, memory.as_deref(), session.scratch).map_err(guest_failure)?;
        std::fs::rename(&old, pending.disk()).map_err(|error| Error::io("cannot keep a layer", &error))?;
        if let Some(log) = log {
            std::fs::copy(log, pending.log()).map_err(|error| Error::io("cannot keep a step's log", &error))?;
        }
        let machines: Vec<_> = memory.iter().map(|_| self.machine.clone()).collect();
        let kept = pending.commit(self.store, record, &machines)?;
        session.events.detail(format!(
            "kept `{}`{}: the guest stood still for {}",
            layer.name,
            if with_memory { " with its memory" } else { "" },
            show_duration(saved.took)
        ));
        self.held.push(*kept);
        if with_memory {
            self.since_memory = Duration::ZERO;
        }
        Ok(())
    }

    /// The layers that a layer consists of, itself last; none if it, or one of them, isn't there or isn't whole.
    fn chain(&self, layer: &plan::Layer, session: &Session<'_>) -> Option<Vec<Layer>> {
        if !layer.cached {
            return None;
        }
        self.store.chain(&layer.key, Some(&self.machine)).unwrap_or_else(|why| {
            session.events.warn(format!("the cached layer of `{}` can't be used: {why}", layer.name));
            None
        })
    }

    fn record(&self, layer: &plan::Layer, took: Duration, network_up: bool) -> Record {
        Record {
            format: 0,
            key: layer.key.clone(),
            parent: layer.parts.value(Part::Parent).map(str::to_owned),
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

/// What a build will do about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outlook {
    /// It is there, and is taken.
    Kept,
    /// It is made anew, for these reasons.
    Made(Vec<String>),
}

/// For each layer of the plan, whether it is there; and if it isn't, how it differs from the one that was made last in
/// its place.
#[must_use]
pub fn outlook(plan: &Plan, store: &Store) -> Vec<Outlook> {
    let mut changed = false;
    let mut outlooks = Vec::new();
    for layer in &plan.layers {
        let made = |why: String| Outlook::Made(vec![why]);
        let outlook = match store.layer(&layer.key) {
            _ if !layer.cached => made("it always runs, or follows a step that does".to_owned()),
            Lookup::Hit(_) => Outlook::Kept,
            Lookup::Damaged(why) => made(format!("what was kept can't be used: {why}")),
            Lookup::Miss if changed => made("it follows a step that is made anew".to_owned()),
            Lookup::Miss => {
                let parent = layer.parts.value(Part::Parent);
                Outlook::Made(match store.children(parent, plan.base()).into_iter().next() {
                    Some(last) => plan::differences(&last.parts, &layer.parts),
                    None => vec!["nothing was kept in its place".to_owned()],
                })
            }
        };
        changed |= outlook != Outlook::Kept;
        outlooks.push(outlook);
    }
    outlooks
}

/// A layer's disk, as seen from a scratch folder and from another layer.
fn relative(id: &str) -> PathBuf {
    Path::new("../../layers").join(id).join(crate::store::LAYER_DISK)
}

/// What memory states of a machine are kept under: everything that must be alike for QEMU to take one.
pub(super) fn machine_key(session: &Session<'_>, shape: &str) -> String {
    let host = session.host;
    let processor = match session.accelerator {
        crate::vm::spec::Accelerator::Kvm => std::fs::read_to_string("/proc/cpuinfo")
            .unwrap_or_default()
            .lines()
            .filter(|line| ["model name", "flags", "microcode"].iter().any(|start| line.starts_with(start)))
            .take(3)
            .collect(),
        crate::vm::spec::Accelerator::Tcg => String::new(),
    };
    // What the agent has read is in the memory.
    let agent = [AGENT, &library()].concat();
    let text = [host.qemu_version.as_str(), &host.qemu.display().to_string(), &processor, shape, &agent].join("\0");
    hex(&Sha256::digest(text))[..16].to_owned()
}
