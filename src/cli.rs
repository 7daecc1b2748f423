//! The command line: types only. What they mean is main's business.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Build bootable disk images offline and turn them into AMIs.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, about, max_term_width = 100, disable_help_subcommand = true)]
#[command(after_help = crate::manual::contents())]
pub struct Cli {
    /// Options for every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options for every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options for every command")]
pub struct Global {
    /// How results and events are written: json is one document on stdout, and a line per event on stderr
    #[arg(long, global = true, value_enum, default_value = "human")]
    pub format: Format,
    /// Say more
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub verbose: bool,
    /// Say only warnings and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Where bases and state are kept [default: the user's cache]
    #[arg(long, global = true, env = "KILN_CACHE_DIR", value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
}

/// How things are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Human,
    /// For programs
    Json,
}

/// Which accelerator to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM if it works, else software emulation
    Auto,
    /// KVM or nothing
    Kvm,
    /// Software emulation
    Tcg,
}

/// Firmware to start a disk with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Firmware {
    /// Every firmware that the disk can be started by
    All,
    /// `SeaBIOS`
    Bios,
    /// OVMF
    Uefi,
}

/// How a disk gets to AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Via {
    /// Uploaded to a bucket, and imported from there
    S3,
    /// Written block by block into a snapshot (EBS direct)
    Ebs,
    /// By EBS direct where that is permitted, else through the bucket
    Auto,
}

/// Whether an image can be deregistered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protection {
    /// It can
    Off,
    /// Not before that is turned off
    On,
    /// Not before that is turned off, nor in the day after
    Cooldown,
}

/// As which bytes a disk is uploaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DiskFormat {
    /// As it is; parts without data are copied inside S3
    Raw,
    /// Compressed, as a stream-optimised VMDK
    Vmdk,
}

/// How S3 encrypts an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sse {
    /// With a key of S3's own
    #[value(name = "AES256")]
    Aes256,
    /// With a key of KMS
    #[value(name = "aws:kms")]
    Kms,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a starter recipe that builds as it stands
    Init {
        /// Folder for it
        #[arg(default_value = ".")]
        dir: PathBuf,
    },
    /// Build recipes into DIR/NAME; several, or a folder of them, side by side
    Build(Build),
    /// Say what a build would do, and do nothing
    Plan {
        /// The recipe
        recipe: PathBuf,
        /// Set a key of the recipe, e.g. disk.size=8GiB
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Which accelerator the build would use
        #[arg(long, value_enum, default_value = "auto")]
        accel: Accel,
    },
    /// Boot a built disk by its own firmware and run the recipe's tests in it
    Test {
        /// The output folder of a build
        outdir: PathBuf,
        /// Which firmware
        #[arg(long, value_enum, default_value = "all")]
        firmware: Firmware,
        /// How long it may take to come up
        #[arg(long, value_name = "TIME", default_value = "10m")]
        timeout: String,
        /// Which accelerator to use
        #[arg(long, value_enum, default_value = "auto")]
        accel: Accel,
    },
    /// What is kept between builds: bases, and the state after each step
    #[command(subcommand)]
    Cache(Cache),
    /// Boot a built disk and talk to it on this terminal; the disk is not changed
    Run(Run),
    /// Open a shell in the build guest as it is after a step; leaving it changes nothing
    Shell(Shell),
    /// Upload a built disk, import it and register it as an AMI
    Publish(Publish),
    /// List the images that kiln has made in this account
    Images(Images),
    /// Let others launch an image: the newest of its name in each region
    Share(Share),
    /// Copy an image into other regions
    Copy(Copy),
    /// Deprecate and deregister old images of a name, and delete their snapshots
    Retire(Retire),
    /// Delete what interrupted publishes have left in AWS
    Sweep(Sweep),
    /// List the provisioners that come with kiln, with their inputs
    Provisioners,
    /// Say what this host offers for building, and what is missing
    Doctor,
    /// Explain a command, or a topic of the manual
    Help {
        /// The command, or the topic [default: lists both]
        #[arg(value_name = "COMMAND|TOPIC")]
        words: Vec<String>,
    },
    /// Write completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `kiln build`.
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[derive(Debug, Args)]
pub struct Build {
    /// The recipes, or folders whose *.toml they are
    #[arg(required = true, value_name = "RECIPE")]
    pub recipes: Vec<PathBuf>,
    /// Folder that the output folder is made in
    #[arg(long, default_value = "out")]
    pub out: PathBuf,
    /// Set a key of the recipe, e.g. disk.size=8GiB
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Which accelerator to use
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Accel,
    /// If a step fails, keep the guest's disk and say how to look at it
    #[arg(long)]
    pub keep_on_error: bool,
    /// Put the SHA-256 of the whole disk into the manifest, as sha256sum prints it
    #[arg(long)]
    pub sha256: bool,
    /// Read again what is known by its size and times: the base image, the base in the cache, the disk if it is built
    #[arg(long)]
    pub verify: bool,
    /// Take nothing from the cache; with a step's name or number, nothing from that step on
    #[arg(long, value_name = "STEP", num_args = 0..=1, require_equals = true)]
    pub no_cache: Option<Option<String>>,
    /// How many recipes are built at once [default: by processors and memory]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: Option<u16>,
    /// Of several recipes, stop the others when one fails
    #[arg(long)]
    pub fail_fast: bool,
}

/// `kiln cache`.
#[derive(Debug, Subcommand)]
pub enum Cache {
    /// What is there, the last used first: size, age, last use, and how much is built on it
    List,
    /// Remove what was used longest ago, and nothing that is in use [default: --keep 20GiB]
    Gc {
        /// How much may stay
        #[arg(long, value_name = "SIZE")]
        keep: Option<String>,
        /// How long something may stay unused
        #[arg(long, value_name = "TIME")]
        older: Option<String>,
    },
    /// Write what these recipes need to one file: for CI, which keeps it between runs
    Export {
        /// The recipes
        #[arg(required = true)]
        recipes: Vec<PathBuf>,
        /// The file
        #[arg(short, long, value_name = "FILE")]
        out: PathBuf,
        /// Set a key of the recipes, e.g. disk.size=8GiB
        #[arg(long, value_name = "KEY=VALUE")]
        set: Vec<String>,
        /// Which accelerator the builds use
        #[arg(long, value_enum, default_value = "auto")]
        accel: Accel,
    },
    /// Take what is in such a file
    Import {
        /// The file
        file: PathBuf,
    },
}

/// `kiln run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The output folder of a build
    pub outdir: PathBuf,
    /// Which firmware [default: the first that the disk can be started by]
    #[arg(long, value_enum)]
    pub firmware: Option<Firmware>,
    /// Public key that may log in by ssh
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// Loopback port for ssh [default: a free one]
    #[arg(long, value_name = "PORT", requires = "ssh_key")]
    pub ssh_port: Option<u16>,
    /// Which accelerator to use
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Accel,
}

/// `kiln shell`.
#[derive(Debug, Args)]
pub struct Shell {
    /// The recipe
    pub recipe: PathBuf,
    /// After which step, by name or number; 0 or base: before the first [default: the last that is kept]
    #[arg(long, value_name = "STEP")]
    pub at: Option<String>,
    /// Set a key of the recipe, e.g. disk.size=8GiB
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Which accelerator to use
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Accel,
}

/// `kiln publish`.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct Publish {
    /// The output folder of a build
    pub outdir: PathBuf,
    /// Region to publish to, may be given several times [default: the recipe's, then the SDK's]
    #[arg(long = "region", value_name = "REGION", value_delimiter = ',')]
    pub regions: Vec<String>,
    /// Bucket for the import, in one of the regions [default: the recipe's]
    #[arg(long)]
    pub bucket: Option<String>,
    /// How the disk gets to AWS: through a bucket, or block by block into a snapshot [default: the recipe's, then s3]
    #[arg(long, value_name = "WAY")]
    pub via: Option<Via>,
    /// The image's name, with {name} {date} {time} {digest:N} {version} [default: the recipe's]
    #[arg(long, value_name = "NAME")]
    pub image_name: Option<String>,
    /// Who may launch the image: an account, an organisation's or unit's ARN, or `all`; may be given several times
    #[arg(long, value_name = "WHO", value_delimiter = ',')]
    pub share: Vec<String>,
    /// Let the accounts make volumes of the image's snapshots too
    #[arg(long)]
    pub share_snapshots: bool,
    /// Deprecate the image after this time, like 90d, 12w or 2y [default: the recipe's]
    #[arg(long, value_name = "TIME")]
    pub deprecate_after: Option<String>,
    /// Protect the image from being deregistered [default: the recipe's, then off]
    #[arg(long, value_name = "WHETHER")]
    pub protection: Option<Protection>,
    /// The SSM parameter that is to name the image, in every region [default: the recipe's]
    #[arg(long, value_name = "NAME")]
    pub parameter: Option<String>,
    /// Replace an image of that name, once the new one is available
    #[arg(long)]
    pub force: bool,
    /// Stop all regions when one fails
    #[arg(long)]
    pub fail_fast: bool,
    /// Encrypt the snapshots, whatever the recipe says
    #[arg(long)]
    pub encrypted: bool,
    /// KMS key to encrypt them with, everywhere or in one region: an ARN, or unless by EBS direct an id or alias
    #[arg(long, value_name = "[REGION=]KEY")]
    pub kms_key: Vec<String>,
    /// How it is written block by block.
    #[command(flatten)]
    pub direct: Direct,
    /// How it goes through a bucket.
    #[command(flatten)]
    pub object: Object,
    /// How many parts are uploaded at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub parallel: u8,
    /// How long all of it may take
    #[arg(long, value_name = "TIME", default_value = "2h")]
    pub timeout: String,
    /// Only read, and print the requests that would be made, with what they need and cost by
    #[arg(long)]
    pub dry_run: bool,
    /// Only check name, region, bucket, role, parent, permissions and quotas
    #[arg(long, conflicts_with = "dry_run")]
    pub check: bool,
    /// Print the IAM policy that this publish needs, and nothing else; AWS is asked nothing
    #[arg(long, conflicts_with = "check")]
    pub iam_policy: bool,
}

/// Which regions of the account.
#[derive(Debug, Args)]
pub struct InRegions {
    /// Region to look in; may be given several times [default: the SDK's]
    #[arg(long, value_name = "REGION", value_delimiter = ',')]
    pub region: Vec<String>,
    /// Look in all regions that are enabled for the account
    #[arg(long, conflicts_with = "region")]
    pub all_regions: bool,
}

/// `kiln images`.
#[derive(Debug, Args)]
pub struct Images {
    /// Only those of this recipe, or with this name or id
    pub name: Option<String>,
    /// Which regions
    #[command(flatten)]
    pub regions: InRegions,
}

/// `kiln share`.
#[derive(Debug, Args)]
pub struct Share {
    /// The image's id or name, or its recipe's name
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// An account's 12 digits, the ARN of an organisation or unit, or all: everyone; may be given several times
    #[arg(long, value_name = "WHOM", required = true)]
    pub with: Vec<String>,
    /// Not any more
    #[arg(long)]
    pub remove: bool,
    /// Its snapshots too, so that they can copy it
    #[arg(long)]
    pub snapshots: bool,
    /// Which regions
    #[command(flatten)]
    pub regions: InRegions,
}

/// `kiln copy`.
#[derive(Debug, Args)]
pub struct Copy {
    /// The image's id or name, or its recipe's name: its newest image
    #[arg(value_name = "IMAGE")]
    pub name: String,
    /// Region to copy it to; may be given several times
    #[arg(long, value_name = "REGION", required = true)]
    pub to: Vec<String>,
    /// Region that it is in [default: the SDK's]
    #[arg(long, value_name = "REGION")]
    pub from: Option<String>,
    /// Encrypt the copies with this KMS key; REGION=KEY for one of them
    #[arg(long, value_name = "KEY")]
    pub kms_key: Vec<String>,
    /// The copies' name [default: the image's]
    #[arg(long, value_name = "NAME")]
    pub image_name: Option<String>,
    /// How long all of it may take
    #[arg(long, value_name = "TIME", default_value = "2h")]
    pub timeout: String,
}

/// `kiln retire`.
#[derive(Debug, Args)]
pub struct Retire {
    /// The recipe's name, or an image's name or id
    pub name: String,
    /// How many of the newest stay in each region [default: 1 of a recipe's images; an image that is named goes]
    #[arg(long, value_name = "N")]
    pub keep: Option<usize>,
    /// Only what is older, e.g. 30d
    #[arg(long, value_name = "TIME")]
    pub older: Option<String>,
    /// Deprecate them, and leave them there
    #[arg(long)]
    pub deprecate_only: bool,
    /// Which regions
    #[command(flatten)]
    pub regions: InRegions,
    /// Don't ask
    #[arg(long)]
    pub yes: bool,
    /// Only say what would go
    #[arg(long, conflicts_with = "yes")]
    pub dry_run: bool,
}

/// `kiln sweep`.
#[derive(Debug, Args)]
pub struct Sweep {
    /// Which regions
    #[command(flatten)]
    pub regions: InRegions,
    /// Look in this bucket too, wherever it is
    #[arg(long)]
    pub bucket: Option<String>,
    /// Only what is older: a publish that runs has such things too
    #[arg(long, value_name = "TIME", default_value = "1d")]
    pub older: String,
    /// Don't ask
    #[arg(long)]
    pub yes: bool,
    /// Only say what would go
    #[arg(long, conflicts_with = "yes")]
    pub dry_run: bool,
}

/// How a disk is written block by block (EBS direct).
#[derive(Debug, Args)]
pub struct Direct {
    /// By EBS direct: the snapshot to build on, everywhere or in one region, so that only blocks that differ are sent; `none`:
    /// on nothing [default: the recipe's last snapshot whose block map this host has kept]
    #[arg(long, value_name = "[REGION=]SNAPSHOT")]
    pub parent: Vec<String>,
    /// By EBS direct: block map of the disk that an earlier snapshot has, where this host hasn't kept it: `blocks` in that
    /// build's output folder; may be given several times
    #[arg(long, value_name = "FILE")]
    pub parent_blocks: Vec<PathBuf>,
    /// By EBS direct: leave what was never written out of encrypted snapshots too. It then reads as noise, not as zeros: only
    /// for disks on which nothing relies on zeros (swap, raw partitions, a base that was made sparse may)
    #[arg(long)]
    pub omit_holes: bool,
}

/// How a disk goes through a bucket.
#[derive(Debug, Args)]
pub struct Object {
    /// As which bytes the disk is uploaded [default: the recipe's, then raw]
    #[arg(long, value_name = "FORMAT")]
    pub disk_format: Option<DiskFormat>,
    /// How S3 encrypts the upload [default: the recipe's, then the bucket's]
    #[arg(long, value_name = "HOW")]
    pub sse: Option<Sse>,
    /// The KMS key for --sse aws:kms: id, ARN or alias [default: the recipe's, then the account's own for S3]
    #[arg(long, value_name = "KEY")]
    pub sse_kms_key: Option<String>,
    /// Leave the uploaded object in the bucket when it is imported
    #[arg(long)]
    pub keep_object: bool,
    /// End after the upload, and print where the object is; a later publish imports it
    #[arg(long)]
    pub upload_only: bool,
}
