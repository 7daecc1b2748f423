//! The root volume and `[[publish.volume]]`.

use super::super::reader::{Fields, Found};
use super::super::tree::Origin;
use super::super::volume::{self, BadSetting, Ebs, EbsSpans, Setting, Volume, VolumeKind};
use super::{checked, told};
use crate::units::{GIB, Size};

/// What the settings of a volume are called.
struct Keys {
    volume_type: &'static str,
    size: &'static str,
}

const ROOT: Keys = Keys { volume_type: "volume_type", size: "volume_size" };
const OTHER: Keys = Keys { volume_type: "type", size: "size" };

/// Where a volume's settings are.
#[derive(Default)]
struct Origins {
    volume_type: Option<Origin>,
    size: Option<Origin>,
    iops: Option<Origin>,
    throughput: Option<Origin>,
}

/// The root volume; `disk` is the disk's size, if the recipe says it.
pub(super) fn root(fields: &Fields<'_>, disk: Option<Size>) -> (Ebs, EbsSpans) {
    let (ebs, origins) = ebs(fields, &ROOT);
    let size = ebs.size.or(disk.map(|size| size.bytes() / GIB));
    if let Err(bad) = ebs.check_root(size) {
        refuse(fields, &origins, bad);
    }
    let span = |origin: Option<Origin>| origin.map(|origin| origin.span);
    let spans = EbsSpans {
        volume_type: span(origins.volume_type),
        size: span(origins.size),
        iops: span(origins.iops),
        throughput: span(origins.throughput),
    };
    (ebs, spans)
}

/// The other volumes; `root` is the root device.
pub(super) fn others(publish: &Fields<'_>, root: &str) -> Vec<Volume> {
    const KNOWN: [&str; 10] = [
        "device",
        "type",
        "size",
        "iops",
        "throughput",
        "delete_on_termination",
        "encrypted",
        "kms_key",
        "snapshot",
        "virtual",
    ];
    let mut volumes = Vec::new();
    for (table, origin) in publish.tables("volume") {
        let fields = publish.reader.fields(table, origin, "[[publish.volume]]", &KNOWN);
        if let Some(entry) = fields.entry("kms_key") {
            let help = "AWS takes no key there: a new volume is encrypted with the account's default key for EBS, one of a \
                        snapshot has the snapshot's";
            let message = "the KMS key of a volume of an image can't be chosen";
            fields.reader.refuse(&entry.key_origin, message, Some(help.to_owned()));
        }
        let kind = kind(&fields, &volumes);
        if fields.require("device", "device = \"/dev/sdf\"").is_none() {
            continue;
        }
        let device = checked(&fields, "device", |text| {
            volume::device(text).and_then(|()| volume::device_is_free(text, root, &volumes)).map_err(told)
        });
        if let (Some(device), Some(kind)) = (device, kind) {
            volumes.push(Volume { device: device.value, kind });
        }
    }
    volumes
}

fn kind(fields: &Fields<'_>, before: &[Volume]) -> Option<VolumeKind> {
    if fields.entry("virtual").is_some() {
        for entry in ["type", "size", "iops", "throughput", "delete_on_termination", "encrypted", "snapshot"]
            .iter()
            .filter_map(|key| fields.entry(key))
        {
            let message = format!("a volume with `virtual` can't have `{}`", entry.key);
            let help = "it is one of the instance's own disks, not one of EBS".to_owned();
            fields.reader.refuse(&entry.key_origin, message, Some(help));
        }
        let name = checked(fields, "virtual", |text| volume::instance_store(text, before).map_err(told))?;
        return Some(VolumeKind::InstanceStore { name: name.value });
    }
    let (ebs, origins) = ebs(fields, &OTHER);
    let encrypted = fields.boolean("encrypted");
    let snapshot = checked(fields, "snapshot", |text| volume::snapshot_id(text).map_err(told));
    if let Err(bad) = ebs.check(ebs.size) {
        refuse(fields, &origins, bad);
    }
    if fields.entry("snapshot").is_none() {
        let help = || Some("add for example `size = \"8GiB\"`, or `snapshot`, or `virtual`".to_owned());
        if fields.entry("size").is_none() {
            fields.reader.lacks(fields.origin, "[[publish.volume]] has no `size`", help());
        }
        return Some(VolumeKind::Empty { encrypted: encrypted.map(|found| found.value), ebs });
    }
    if let Some(found) = encrypted {
        let help = "leave `encrypted` out: AWS refuses it next to a snapshot, whose own encryption the volume has";
        let message = "the encryption of a volume of a snapshot can't be chosen";
        fields.reader.refuse(&found.origin, message, Some(help.to_owned()));
    }
    Some(VolumeKind::Snapshot { snapshot: snapshot?.value, ebs })
}

fn ebs(fields: &Fields<'_>, keys: &Keys) -> (Ebs, Origins) {
    let (mut ebs, mut origins) = (Ebs::default(), Origins::default());
    if let Some(found) = fields.word(keys.volume_type) {
        (ebs.volume_type, origins.volume_type) = (found.value, Some(found.origin));
    }
    (ebs.size, origins.size) = split(gibs(fields, keys.size));
    (ebs.iops, origins.iops) = split(count(fields, "iops"));
    (ebs.throughput, origins.throughput) = split(count(fields, "throughput"));
    if let Some(found) = fields.boolean("delete_on_termination") {
        ebs.delete_on_termination = found.value;
    }
    (ebs, origins)
}

fn split<T>(found: Option<Found<T>>) -> (Option<T>, Option<Origin>) {
    found.map(|found| (found.value, found.origin)).unzip()
}

/// A size in whole GiB.
fn gibs(fields: &Fields<'_>, key: &str) -> Option<Found<u64>> {
    let found = fields.size(key)?;
    let size = found.value;
    if size.bytes() > 0 && size.is_whole_gib() {
        return Some(Found { value: size.bytes() / GIB, origin: found.origin });
    }
    let help = format!("write `{key} = \"{}GiB\"`", (size.ceil_gib().bytes() / GIB).max(1));
    fields.reader.refuse(&found.origin, "a volume has whole GiB", Some(help));
    None
}

fn count(fields: &Fields<'_>, key: &str) -> Option<Found<u32>> {
    let found = fields.integer(key)?;
    let Ok(value) = u32::try_from(found.value) else {
        fields.reader.refuse(&found.origin, format!("`{key}` can't be {}", found.value), None);
        return None;
    };
    Some(Found { value, origin: found.origin })
}

fn refuse(fields: &Fields<'_>, origins: &Origins, bad: BadSetting) {
    let origin = match bad.setting {
        Setting::Type => &origins.volume_type,
        Setting::Size => &origins.size,
        Setting::Iops => &origins.iops,
        Setting::Throughput => &origins.throughput,
    };
    let origin = origin.as_ref().or(origins.volume_type.as_ref()).unwrap_or(fields.origin);
    fields.reader.refuse(origin, bad.refusal.message, Some(bad.refusal.help));
}
