//! What `/etc/fstab` says about `/boot` (fstab(5)).

use super::Table;
use super::table::Partition;

/// The first field of the entry that mounts on `mount_point`.
pub(super) fn source_of(fstab: &str, mount_point: &str) -> Option<String> {
    let entries = fstab.lines().map(str::trim_start).filter(|line| !line.starts_with('#'));
    let mut fields = entries.filter_map(|line| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?, fields.next()?))
    });
    fields.find(|(_, on)| trim_slash(&unescape(on)) == mount_point).map(|(what, _)| unescape(what))
}

fn trim_slash(path: &str) -> &str {
    if path.len() > 1 { path.trim_end_matches('/') } else { path }
}

/// Blanks in a field are written as three octal digits: `\040`.
fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        if let Some(byte) = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            text.push(char::from(byte));
            text.push_str(&part[3..]);
        } else {
            text.push('\\');
            text.push_str(part);
        }
    }
    text
}

/// The partition that a device field means, if it is on this disk. `/dev/sda2` is taken by its number alone: the
/// disk's name depends on the machine, and a cloud image has one disk.
pub(super) fn resolve<'a>(table: &'a Table, what: &str) -> Option<&'a Partition> {
    let same = |have: Option<&String>, want: &str| have.is_some_and(|have| have.eq_ignore_ascii_case(want));
    let by = |tag: &str, value: &str| {
        let value = value.trim_matches('"');
        table.partitions.iter().find(|partition| match tag {
            "UUID" => same(partition.filesystem.uuid.as_ref(), value),
            "LABEL" => partition.filesystem.label.as_deref() == Some(value),
            "PARTUUID" => same(partition.uuid.as_ref(), value),
            "PARTLABEL" => partition.name.as_deref() == Some(value),
            _ => false,
        })
    };
    if let Some((tag, value)) = what.split_once('=') {
        return by(tag, value);
    }
    let device = what.strip_prefix("/dev/")?;
    if let Some((kind, value)) = device.strip_prefix("disk/by-").and_then(|rest| rest.split_once('/')) {
        return by(&kind.to_uppercase(), value);
    }
    table.partition(device_number(device)?)
}

/// The partition's number in the name of a disk's device: `sda2`, `vda2`, `xvda2`, `nvme0n1p2`, `mmcblk0p2`.
fn device_number(device: &str) -> Option<u32> {
    let disk = device.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = &device[disk.len()..];
    let letters = |prefix| {
        disk.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase()))
    };
    let numbered = |prefix| disk.starts_with(prefix) && disk.ends_with('p');
    let known = letters("sd") || letters("vd") || letters("xvd") || letters("hd");
    (known || numbered("nvme") || numbered("mmcblk")).then(|| number.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_of_a_mount_point() {
        let fstab = "# /boot was on /dev/sda1\nUUID=1 / ext4 defaults 0 1\n\tLABEL=my\\040boot\t/boot/ ext4\n";
        assert_eq!(source_of(fstab, "/boot").as_deref(), Some("LABEL=my boot"));
        assert_eq!(source_of(fstab, "/").as_deref(), Some("UUID=1"));
        assert_eq!(source_of(fstab, "/home"), None);
        assert_eq!(source_of("odd\n\n\\9 /boot x", "/boot").as_deref(), Some("\\9"));
    }

    #[test]
    fn device_names() {
        for (device, number) in
            [("sda2", 2), ("vda15", 15), ("xvda1", 1), ("nvme0n1p3", 3), ("mmcblk0p1", 1), ("sdab9", 9)]
        {
            assert_eq!(device_number(device), Some(number), "{device}");
        }
        for device in ["sda", "mapper/vg0-root", "nvme0n1", "md0", "vg0/boot1"] {
            assert_eq!(device_number(device), None, "{device}");
        }
    }
}
