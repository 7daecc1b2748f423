//! The volumes of an image's instances, and what EBS takes of their settings.
//!
//! Source: "`EbsBlockDevice`" in the EC2 API Reference for sizes and ranges, "Amazon EBS volume types" in the EBS User
//! Guide for ratios, "Device names for volumes on Amazon EC2 instances" in the EC2 User Guide.

use std::ops::{Range, RangeInclusive};

use serde::{Deserialize, Serialize};

use super::aws::Refusal;
use super::words;

words! {
    /// The type of a volume.
    #[derive(Default, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase")]
    VolumeType {
        /// General purpose, third generation.
        #[default]
        Gp3 = "gp3",
        /// General purpose, second generation.
        Gp2 = "gp2",
        /// Provisioned IOPS, second generation.
        Io2 = "io2",
        /// Provisioned IOPS.
        Io1 = "io1",
        /// Hard disks for throughput; not to boot from.
        St1 = "st1",
        /// Hard disks for what is seldom read; not to boot from.
        Sc1 = "sc1",
        /// Magnetic.
        Standard = "standard",
    }
}

/// How an EBS volume is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ebs {
    /// Its type.
    #[serde(default)]
    pub volume_type: VolumeType,
    /// In GiB; none: as large as its snapshot.
    #[serde(default, rename = "volume_size", skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// I/O operations in a second; none: EBS's default for the type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u32>,
    /// In MiB/s; none: EBS's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<u32>,
    /// Whether it goes with its instance.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub delete_on_termination: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_yes(value: &bool) -> bool {
    *value
}

impl Default for Ebs {
    fn default() -> Self {
        Self {
            volume_type: VolumeType::default(),
            size: None,
            iops: None,
            throughput: None,
            delete_on_termination: true,
        }
    }
}

/// A volume besides the root volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its device's name, e.g. `/dev/sdf`.
    pub device: String,
    /// What it is.
    #[serde(flatten)]
    pub kind: VolumeKind,
}

/// What a volume besides the root volume is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum VolumeKind {
    /// A new EBS volume with nothing in it.
    Empty {
        /// Whether it is encrypted; none: as the image is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encrypted: Option<bool>,
        /// How it is made.
        #[serde(flatten)]
        ebs: Ebs,
    },
    /// An EBS volume with what a snapshot has. It is encrypted if the snapshot is.
    Snapshot {
        /// The snapshot's id.
        snapshot: String,
        /// How it is made.
        #[serde(flatten)]
        ebs: Ebs,
    },
    /// One of the instance's own disks.
    InstanceStore {
        /// Its name: `ephemeral0` to `ephemeral23`.
        name: String,
    },
}

/// A setting of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Its type.
    Type,
    /// Its size.
    Size,
    /// Its IOPS.
    Iops,
    /// Its throughput.
    Throughput,
}

/// Where a recipe has a volume's settings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EbsSpans {
    /// Of the value of its type.
    pub volume_type: Option<Range<usize>>,
    /// Of the value of its size.
    pub size: Option<Range<usize>>,
    /// Of the value of its IOPS.
    pub iops: Option<Range<usize>>,
    /// Of the value of its throughput.
    pub throughput: Option<Range<usize>>,
}

impl EbsSpans {
    /// Where the setting is, or else the volume's type.
    #[must_use]
    pub fn of(&self, setting: Setting) -> Option<&Range<usize>> {
        let own = match setting {
            Setting::Type => &self.volume_type,
            Setting::Size => &self.size,
            Setting::Iops => &self.iops,
            Setting::Throughput => &self.throughput,
        };
        own.as_ref().or(self.volume_type.as_ref())
    }
}

/// A setting that EBS would not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadSetting {
    /// Which one.
    pub setting: Setting,
    /// Why.
    pub refusal: Refusal,
}

/// What EBS takes of a type of volume.
struct Limits {
    /// In GiB.
    sizes: RangeInclusive<u64>,
    /// The range that can be asked for, and how many there can be for each GiB; none: they can't be asked for.
    iops: Option<(RangeInclusive<u32>, u64)>,
    boots: bool,
}

const GP3_IOPS: u32 = 3000;
const GP3_THROUGHPUT: RangeInclusive<u32> = 125..=2000;
/// A gp3 volume has 0.25 MiB/s for each IOPS at most.
const IOPS_FOR_MIB: u32 = 4;

fn limits(volume_type: VolumeType) -> Limits {
    let (sizes, iops, boots) = match volume_type {
        VolumeType::Gp3 => (1..=65_536, Some((GP3_IOPS..=80_000, 500)), true),
        VolumeType::Gp2 => (1..=16_384, None, true),
        VolumeType::Io2 => (4..=65_536, Some((100..=256_000, 1000)), true),
        VolumeType::Io1 => (4..=16_384, Some((100..=64_000, 50)), true),
        VolumeType::St1 | VolumeType::Sc1 => (125..=16_384, None, false),
        VolumeType::Standard => (1..=1024, None, true),
    };
    Limits { sizes, iops, boots }
}

impl Ebs {
    /// Whether EBS takes a volume like this, which has `size` GiB if that is known.
    ///
    /// # Errors
    /// The setting that it would not take.
    pub fn check(&self, size: Option<u64>) -> Result<(), BadSetting> {
        let limits = limits(self.volume_type);
        if let Some(size) = size
            && !limits.sizes.contains(&size)
        {
            let message = format!("a volume of type {} can't have {size} GiB", self.volume_type);
            return refuse(Setting::Size, message, format!("EBS takes {} GiB", range(&limits.sizes)));
        }
        self.check_iops(&limits, size)?;
        self.check_throughput()
    }

    /// The same for a root volume.
    ///
    /// # Errors
    /// The setting that AWS would not take.
    pub fn check_root(&self, size: Option<u64>) -> Result<(), BadSetting> {
        if !limits(self.volume_type).boots {
            let message = format!("instances don't boot from a volume of type {}", self.volume_type);
            return refuse(Setting::Type, message, "use gp3, gp2, io2, io1 or standard".to_owned());
        }
        self.check(size)
    }

    fn check_iops(&self, limits: &Limits, size: Option<u64>) -> Result<(), BadSetting> {
        let volume_type = self.volume_type;
        let (range_of_type, per_gib) = match (&limits.iops, self.iops) {
            (None, None) => return Ok(()),
            (None, Some(_)) => {
                let message = format!("the IOPS of a volume of type {volume_type} can't be chosen");
                return refuse(Setting::Iops, message, "leave `iops` out, or use gp3, io2 or io1".to_owned());
            }
            (Some(some), _) => some,
        };
        let Some(iops) = self.iops else {
            if volume_type == VolumeType::Gp3 {
                return Ok(());
            }
            let message = format!("a volume of type {volume_type} needs `iops`");
            return refuse(Setting::Type, message, format!("EBS takes {}", range(range_of_type)));
        };
        if !range_of_type.contains(&iops) {
            let message = format!("a volume of type {volume_type} can't have {iops} IOPS");
            return refuse(Setting::Iops, message, format!("EBS takes {}", range(range_of_type)));
        }
        // The fewest that can be asked for are given to any size.
        let most = size.map(|size| (size * per_gib).max(u64::from(*range_of_type.start())));
        match (size, most) {
            (Some(size), Some(most)) if u64::from(iops) > most => {
                let message = format!("a volume of type {volume_type} with {size} GiB can't have {iops} IOPS");
                let least = u64::from(iops).div_ceil(*per_gib);
                let help = format!("EBS takes up to {per_gib} for each GiB: use {most} or fewer, or {least} GiB");
                refuse(Setting::Iops, message, help)
            }
            _ => Ok(()),
        }
    }

    fn check_throughput(&self) -> Result<(), BadSetting> {
        let Some(throughput) = self.throughput else { return Ok(()) };
        let refuse = |message, help| refuse(Setting::Throughput, message, help);
        if self.volume_type != VolumeType::Gp3 {
            let message = format!("the throughput of a volume of type {} can't be chosen", self.volume_type);
            return refuse(message, "leave `throughput` out, or use gp3".to_owned());
        }
        if !GP3_THROUGHPUT.contains(&throughput) {
            let message = format!("a volume of type gp3 can't have a throughput of {throughput} MiB/s");
            return refuse(message, format!("EBS takes {}", range(&GP3_THROUGHPUT)));
        }
        let (iops, needed) = (self.iops.unwrap_or(GP3_IOPS), throughput * IOPS_FOR_MIB);
        if iops < needed {
            let message = format!("a throughput of {throughput} MiB/s takes more than {iops} IOPS");
            return refuse(message, format!("EBS gives 0.25 MiB/s for each IOPS: set iops = {needed} or more"));
        }
        Ok(())
    }
}

fn refuse(setting: Setting, message: String, help: String) -> Result<(), BadSetting> {
    Err(BadSetting { setting, refusal: Refusal { message, help } })
}

fn range<T: std::fmt::Display>(range: &RangeInclusive<T>) -> String {
    format!("{} to {}", range.start(), range.end())
}

/// Whether AWS takes this as the name of the root device.
///
/// # Errors
/// When it doesn't.
pub fn root_device(text: &str) -> Result<(), Refusal> {
    let rest = text.strip_prefix("/dev/xvd").or_else(|| text.strip_prefix("/dev/sd")).unwrap_or_default();
    let fits = rest.starts_with(|c: char| c.is_ascii_lowercase())
        && rest.len() <= 3
        && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if fits {
        return Ok(());
    }
    Err(Refusal {
        message: format!("`{text}` can't be a root device"),
        help: "AWS takes names like `/dev/xvda` and `/dev/sda1`, whatever the guest calls it".to_owned(),
    })
}

/// Whether AWS takes this as the name of a device besides the root device.
///
/// # Errors
/// When it doesn't.
pub fn device(text: &str) -> Result<(), Refusal> {
    let fits = match (text.strip_prefix("/dev/sd"), text.strip_prefix("/dev/xvd")) {
        (Some(rest), _) => matches!(rest.as_bytes(), [b'b'..=b'z']),
        (_, Some(rest)) => matches!(rest.as_bytes(), [b'b'..=b'z'] | [b'a'..=b'd', b'a'..=b'z']),
        (None, None) => false,
    };
    if fits {
        return Ok(());
    }
    Err(Refusal {
        message: format!("`{text}` can't be the device of a volume"),
        help: "AWS takes `/dev/sdb` to `/dev/sdz` and names like `/dev/xvdb` and `/dev/xvdba`; it recommends `/dev/sdf` to \
               `/dev/sdp`"
            .to_owned(),
    })
}

/// Whether a volume can have this device, next to the root device and the volumes `before` it. `/dev/sdf` and
/// `/dev/xvdf` are one device.
///
/// # Errors
/// When another has it.
pub fn device_is_free(text: &str, root: &str, before: &[Volume]) -> Result<(), Refusal> {
    let other = if disk_of(root) == disk_of(text) {
        Some((root, "the root device"))
    } else {
        before.iter().find(|volume| disk_of(&volume.device) == disk_of(text)).map(|volume| (&*volume.device, "taken"))
    };
    let Some((other, what)) = other else { return Ok(()) };
    let message = if other == text {
        format!("`{text}` is {what} already")
    } else {
        format!("`{text}` is the same device as `{other}`, which is {what} already")
    };
    Err(Refusal { message, help: "give each volume a device of its own".to_owned() })
}

/// The part of a device's name that tells one disk from another: `f` of `/dev/sdf` and of `/dev/xvdf`, `a` of `/dev/sda1`.
fn disk_of(device: &str) -> &str {
    let rest = device.strip_prefix("/dev/xvd").or_else(|| device.strip_prefix("/dev/sd")).unwrap_or(device);
    rest.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// Whether this can be the name of one of an instance's own disks, next to the volumes `before` it.
///
/// # Errors
/// When it can't.
pub fn instance_store(text: &str, before: &[Volume]) -> Result<(), Refusal> {
    let number = text.strip_prefix("ephemeral").filter(|number| !number.starts_with('0') || *number == "0");
    if number.and_then(|number| number.parse::<u8>().ok()).is_none_or(|number| number > 23) {
        return Err(Refusal {
            message: format!("`{text}` can't be the name of an instance store volume"),
            help: "they are called `ephemeral0` to `ephemeral23`".to_owned(),
        });
    }
    let is_it = |volume: &Volume| matches!(&volume.kind, VolumeKind::InstanceStore { name } if name == text);
    if before.iter().any(is_it) {
        let message = format!("`{text}` is there twice");
        return Err(Refusal { message, help: "an instance store volume has one device".to_owned() });
    }
    Ok(())
}

/// Whether this can be the id of a snapshot.
///
/// # Errors
/// When it can't.
pub fn snapshot_id(text: &str) -> Result<(), Refusal> {
    let digits = text.strip_prefix("snap-").unwrap_or_default();
    if matches!(digits.len(), 8 | 17) && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(Refusal {
        message: format!("`{text}` is not the id of a snapshot"),
        help: "ids are written like `snap-0123456789abcdef0`".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(volume: &Ebs, size: u64) -> String {
        let BadSetting { setting, refusal } = volume.check_root(Some(size)).unwrap_err();
        format!("{setting:?}: {}; {}", refusal.message, refusal.help)
    }

    fn ebs(volume_type: VolumeType, iops: Option<u32>, throughput: Option<u32>) -> Ebs {
        Ebs { volume_type, iops, throughput, ..Ebs::default() }
    }

    #[test]
    fn what_ebs_takes_passes() {
        let plain = |volume_type| ebs(volume_type, None, None);
        for (volume, size) in [
            (plain(VolumeType::Gp3), 1),
            (plain(VolumeType::Gp3), 65_536),
            (plain(VolumeType::Gp2), 16_384),
            (plain(VolumeType::Standard), 1024),
            (ebs(VolumeType::Gp3, Some(3000), Some(750)), 1),
            (ebs(VolumeType::Gp3, Some(80_000), Some(2000)), 160),
            (ebs(VolumeType::Io1, Some(200), None), 4),
            (ebs(VolumeType::Io2, Some(256_000), None), 256),
        ] {
            assert_eq!(volume.check_root(Some(size)), Ok(()), "{volume:?}");
            assert_eq!(volume.check(None), Ok(()), "{volume:?}");
        }
        plain(VolumeType::St1).check(Some(125)).unwrap();
    }

    #[test]
    fn what_ebs_does_not_take_is_refused_with_the_rule() {
        let gp3 = |iops, throughput| ebs(VolumeType::Gp3, iops, throughput);
        for (volume, size, expected) in [
            (gp3(None, None), 65_537, "Size: a volume of type gp3 can't have 65537 GiB; EBS takes 1 to 65536 GiB"),
            (
                ebs(VolumeType::Io2, Some(100), None),
                3,
                "Size: a volume of type io2 can't have 3 GiB; EBS takes 4 to 65536 GiB",
            ),
            (gp3(Some(2999), None), 4, "Iops: a volume of type gp3 can't have 2999 IOPS; EBS takes 3000 to 80000"),
            (
                gp3(Some(4001), None),
                8,
                "Iops: a volume of type gp3 with 8 GiB can't have 4001 IOPS; EBS takes up to 500 for each GiB: use 4000 or \
                 fewer, or 9 GiB",
            ),
            (
                ebs(VolumeType::Io1, Some(201), None),
                4,
                "Iops: a volume of type io1 with 4 GiB can't have 201 IOPS; EBS takes up to 50 for each GiB: use 200 or fewer, \
                 or 5 GiB",
            ),
            (ebs(VolumeType::Io1, None, None), 4, "Type: a volume of type io1 needs `iops`; EBS takes 100 to 64000"),
            (
                ebs(VolumeType::Gp2, Some(3000), None),
                4,
                "Iops: the IOPS of a volume of type gp2 can't be chosen; leave `iops` out, or use gp3, io2 or io1",
            ),
            (
                ebs(VolumeType::Io2, Some(3000), Some(125)),
                4,
                "Throughput: the throughput of a volume of type io2 can't be chosen; leave `throughput` out, or use gp3",
            ),
            (
                gp3(None, Some(124)),
                4,
                "Throughput: a volume of type gp3 can't have a throughput of 124 MiB/s; EBS takes 125 to 2000",
            ),
            (
                gp3(None, Some(751)),
                4,
                "Throughput: a throughput of 751 MiB/s takes more than 3000 IOPS; EBS gives 0.25 MiB/s for each IOPS: set iops \
                 = 3004 or more",
            ),
            (
                ebs(VolumeType::Sc1, None, None),
                125,
                "Type: instances don't boot from a volume of type sc1; use gp3, gp2, io2, io1 or standard",
            ),
        ] {
            assert_eq!(said(&volume, size), expected);
        }
    }

    #[test]
    fn devices_have_names_that_aws_takes_and_that_differ() {
        for name in ["/dev/sdb", "/dev/sdz", "/dev/xvdb", "/dev/xvdaa", "/dev/xvdcz"] {
            device(name).unwrap();
        }
        for name in ["sdf", "/dev/sda", "/dev/sdf1", "/dev/sdff", "/dev/xvda", "/dev/xvdea", "/dev/nvme1n1", ""] {
            assert_eq!(device(name).unwrap_err().message, format!("`{name}` can't be the device of a volume"));
        }
        let store = |device: &str| {
            let kind = VolumeKind::InstanceStore { name: "ephemeral0".to_owned() };
            Volume { device: device.to_owned(), kind }
        };
        let taken = |name: &str, root: &str| device_is_free(name, root, &[store("/dev/sdf")]).map_err(|no| no.message);
        assert_eq!(taken("/dev/sdg", "/dev/xvda"), Ok(()));
        assert_eq!(taken("/dev/xvdaa", "/dev/sda1"), Ok(()));
        assert_eq!(taken("/dev/sdf", "/dev/xvda"), Err("`/dev/sdf` is taken already".to_owned()));
        assert_eq!(
            taken("/dev/xvdf", "/dev/xvda"),
            Err("`/dev/xvdf` is the same device as `/dev/sdf`, which is taken already".to_owned())
        );
        assert_eq!(taken("/dev/xvdb", "/dev/xvdb"), Err("`/dev/xvdb` is the root device already".to_owned()));
        instance_store("ephemeral23", &[]).unwrap();
        for name in ["ephemeral24", "ephemeral", "ephemeral01", "ephemeral-1", "0"] {
            instance_store(name, &[]).unwrap_err();
        }
        let twice = instance_store("ephemeral0", &[store("/dev/sdb")]).unwrap_err();
        assert_eq!(twice.message, "`ephemeral0` is there twice");
    }

    #[test]
    fn a_snapshot_has_an_id() {
        snapshot_id("snap-0123456789abcdef0").unwrap();
        snapshot_id("snap-12345678").unwrap();
        for wrong in ["", "snap-", "ami-12345678", "snap-1234567g", "snap-123456789"] {
            snapshot_id(wrong).unwrap_err();
        }
    }

    #[test]
    fn a_manifest_has_what_differs_from_the_defaults() {
        let json = |value: &Ebs| serde_json::to_string(value).unwrap();
        assert_eq!(json(&Ebs::default()), r#"{"volume_type":"gp3"}"#);
        let volume = Volume {
            device: "/dev/sdf".to_owned(),
            kind: VolumeKind::Empty {
                encrypted: Some(true),
                ebs: Ebs { size: Some(8), delete_on_termination: false, ..ebs(VolumeType::Io2, Some(100), None) },
            },
        };
        let text = serde_json::to_string(&volume).unwrap();
        assert_eq!(serde_json::from_str::<Volume>(&text).unwrap(), volume);
        assert_eq!(serde_json::from_str::<Ebs>("{}").unwrap(), Ebs::default());
    }
}
