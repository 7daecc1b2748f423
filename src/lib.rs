//! kiln builds bootable disk images offline and turns them into AMIs.
//!
//! It boots a base cloud image under QEMU, runs the recipe's steps in it, seals it, exports a raw disk, rehearses it,
//! uploads it to S3 and registers it through `ImportSnapshot` and `RegisterImage`. This text says how the code is laid
//! out and what must stay true; `README.md` says how kiln is used.
//!
//! # A build, from above
//! [`recipe::parse`] makes a [`recipe::Recipe`] of a file's text. [`build::build`] gathers facts of host and base, and
//! [`plan::Plan::new`] decides with them what will be done. The build then makes a qcow2 overlay over the base in the
//! [`store`], grown to the recipe's size by rewriting the partition table in it, and starts a guest on it. The agent in
//! the guest runs the steps. The seal takes away what instances must not share, the guest freezes its filesystems, and
//! the raw disk and its block map are finished: what was behind the guest's overlays was written and hashed while it
//! worked ([`disk::Draft`]). The output folder appears under its name when it is whole.
//!
//! Many recipes are built side by side (`build/many.rs`): all are read and planned first, then each is built by a thread
//! of its own, as by a kiln of its own. They share what the store shares.
//!
//! # The modules
//! | module | holds |
//! |---|---|
//! | `main`, `commands`, [`cli`] | the program: signals, the command line's types, one function for each command |
//! | [`recipe`], [`provisioners`] | TOML to typed recipe, with the place of every mistake; what ships with kiln |
//! | [`plan`] | recipe and facts to a plan with the keys of its layers |
//! | [`build`] | the story of a build; its guest scripts stand in `build/guest` |
//! | [`store`] | imported bases, layers, known digests and scratch folders in the user's cache |
//! | [`vm`] | machine specs, QEMU and its monitor, the agent's protocol, the accelerator's probe, the network's filter |
//! | [`disk`] | partition tables, filesystems, overlays, block maps: disks as bytes |
//! | [`rehearse`] | booting a built disk as an instance would |
//! | [`publish`] | S3 and EC2, with an undo for everything that is made; [`publish::life`]: images after they were published |
//! | [`manual`] | the topics of `kiln help` |
//! | [`event`], [`ui`] | what happened; how it is shown |
//! | [`exec`], [`cancel`], [`error`], [`units`] | processes, stopping, failures, sizes and durations |
//!
//! # Invariants
//! The tests in `tests/tidy.rs` hold the code to the first six.
//!
//! - `recipe` and `plan` touch no file, clock, environment or process. Facts are gathered by `build` and passed in.
//! - `vm` and `disk` don't know each other; `build` and `rehearse` join them.
//! - Only `publish` is async, and only it knows AWS.
//! - Only `ui` and `commands` print. Everything else emits events. Results go to stdout, all else to stderr.
//! - Only `exec` starts processes, without a shell. Every child is tethered: it dies when kiln dies, however that is.
//! - Nothing below `main` and `commands` knows `cli` or `ui`.
//! - Every wait for a guest also sees QEMU's death, a kernel's panic, a full host disk, a deadline and the user's
//!   signal: they all arrive on one channel (`vm::process`).
//! - What exists under its own name is whole: bases and output folders are written under another name and renamed.
//! - The disks and memories of bases and layers are on the host's disk before they have their names. Output is not waited
//!   for, which would take longer than a small build: a publish waits until the disk is there, and unless the disk is known
//!   to be what this boot of the host has built, a build that has nothing to do and a publish compare it with its block map.
//! - A file counts as unchanged only while its device, inode, size, mtime and ctime do; `--verify` reads bases and output
//!   again all the same.
//! - A scratch or half-made folder holds a lock for as long as its kiln lives; the next kiln removes what nobody holds.
//! - The guest is not trusted: it can't forge the end of a step, reach the host's loopback, fill kiln's memory, or
//!   steer the user's terminal, unless the user gives it the terminal (`kiln run`, `kiln shell`).
//!
//! # The guest
//! The agent (`vm/agent.sh`) is a POSIX sh script on a read-only raw drive. With direct boot the disk's own kernel,
//! read from its filesystem without a mount, starts it by `systemd.run=`. With firmware boot cloud-init starts it from a
//! `NoCloud` drive on which all other modules are turned off. Both ways end in the same protocol. The drive also brings
//! kiln's own scripts (`build/guest`) as functions: a guest that is taken up has read them long ago.
//!
//! Build guests load every program at the same addresses (`norandmaps`): under software emulation starting a program
//! costs a third of what it does otherwise, because QEMU finds what it has translated by virtual address. Guests that boot
//! by their own boot loader, those of rehearsals too, have it from `SMBIOS`, and only under software emulation.
//!
//! Inputs travel as tar streams over a virtio-serial port, not on drives: nothing is hot-plugged, nothing stays in the
//! guest's page cache, a stream has no size limit but the guest's disk, and secrets are on no drive. Commands and
//! answers have a port of their own, and output has one; a mark with the command's nonce ends a step's output, so that
//! a daemon which keeps the port open holds nothing up.
//!
//! The guest does not shut down at the end of a build. What steps started is stopped, then its filesystems are
//! unmounted or made read-only, which leaves them clean, and QEMU is told to quit. Daemons of the system that write
//! nothing to the disk (`build/guest/settle.sh` names them) go on until then. Should the disk be busy all the same, as
//! after a step replaced a library that they use, everything ends or starts again, and in the worst case the root is
//! frozen as it is.
//!
//! # Layers
//! After the boot of the base and after each step the build leaves a *layer* in the [`store`]: the overlay that the
//! guest wrote, and, where taking it up again saves more than keeping it costs, the guest ([`vm::checkpoint`]) with its
//! memory ([`vm::memory`]). The guest goes on in a new overlay meanwhile. A layer's key ([`plan::Plan`]) is the digest
//! of everything that can change its content, its parent's key included; a later build begins at the deepest layer that
//! is there (`build/layers.rs`).
//!
//! - What is in a key is a [`plan::Part`], each with its reason; kiln's own guest code is one of them, by its digest
//!   (`build/guest_code.rs`). `kiln help cache` explains them all.
//! - A memory state is taken only by the machine that it came from: QEMU, its arguments, the processor. Any other boots
//!   the layer's disk, which was written out before it was kept, and keeps the layer once more with its own memory.
//! - A guest that is taken up has its clock set and draws new random numbers before a step runs in it; one that can't is
//!   never kept.
//! - A layer is whole or not there. One whose files are not what its record says is a miss with a warning.
//! - A layer is never replaced: made again it gets a folder of its own, and what was built on the first stays on that.
//! - Whoever makes a layer holds its claim; others wait for it, and then use it. What is in use is never removed.
//! - Of builds side by side only so many work at once (`build/turns.rs`). A build that waits for a layer before it has a
//!   guest leaves its turn to others; who holds a claim has a turn, so that whatever is waited for gets on.
//!
//! # A shell
//! `kiln shell` takes up a layer as a build does (`build/shell.rs`), claims nothing, keeps nothing, and holds what is
//! behind the guest until it ends. For the agent the shell is a step like any other, so that every kept memory has what
//! it takes: its script makes the serial console the shell's controlling terminal (`build/guest/shell.sh`), and kiln
//! joins the console to the user's terminal. Commands from standard input need no console.
//!
//! # A publish
//! Each region is published to by a thread of its own (`publish/regions.rs`), as by a kiln of its own. The disk goes through
//! a bucket or, by EBS direct, straight into a snapshot; the snapshot becomes an image; what an image gets once it can be
//! launched comes then (`publish/finish.rs`). By S3 it is sent once, to the bucket's region, and the other regions copy the
//! image (`publish/copy.rs`); by EBS direct it is written to each.
//!
//! - All regions have been looked at before anything is made in one of them; their SSM parameters are set when every region
//!   has its image, or has failed.
//! - Whatever is made is noted before it is asked for, and carries tags by which it is found again: the disk's digest, the
//!   recipe's name, a digest of all that an image is registered with, the run. What is found is used; nothing is made twice.
//! - How the disk is cut for S3 follows from its block map and nothing else (`publish/cut.rs`), and so does what is written by
//!   EBS direct, with the map of the snapshot that it is built on (`publish/parent.rs`).
//! - What S3 can copy inside itself is not sent: zeros, and data too short for a part, which comes with zeros beside it from a
//!   scratch object (`publish/scratch.rs`). Where that can't be made or copied from, the same parts are sent.
//! - What a dry run tells (`publish/plan.rs`) each module says beside where it does it. A test publishes and compares.
//! - What a kiln that was killed has left is gone on with, or deleted, by the next publish of the disk; `kiln sweep` finds
//!   the rest.
//! - Only what kiln's tags say is kiln's is ever changed or deleted.
//!
//! # The network
//! `network = "open"` is QEMU's user networking, which would let the guest reach the host's loopback. So the frames
//! that the guest sends pass through kiln (`filter-redirector`), which drops those: see [`vm::filter`].

pub mod build;
pub mod cancel;
pub mod cli;
pub mod disk;
pub mod error;
pub mod event;
pub mod exec;
pub mod manual;
pub mod plan;
pub mod provisioners;
pub mod publish;
pub mod recipe;
pub mod rehearse;
pub mod store;
pub mod ui;
pub mod units;
pub mod vm;
