//! GUIDs as a GPT stores them.

use std::fmt;

/// A GUID in the byte order of the UEFI specification (2.10, appendix A): the first three groups little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// From the number that its text form spells without dashes.
    pub(super) const fn of(value: u128) -> Self {
        let b = value.to_be_bytes();
        Self([b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]])
    }
}

/// Lower case with dashes, as Linux writes it in `PARTUUID=`.
impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&dashed(&Self::of(u128::from_be_bytes(self.0)).0))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A UUID whose bytes are stored in the order they are written in, as filesystems do.
pub(super) fn dashed(bytes: &[u8; 16]) -> String {
    let hex = hex(bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]])
        .map(char::from)
        .collect()
}

/// EFI system partition (UEFI 2.10, table 5.8).
pub(super) const ESP: Guid = Guid::of(0xC12A_7328_F81F_11D2_BA4B_00A0_C93E_C93B);
/// BIOS boot partition, which holds GRUB's core image (GRUB manual, "BIOS installation").
pub(super) const BIOS_BOOT: Guid = Guid::of(0x2168_6148_6449_6E6F_744E_6565_6445_4649);
/// Root partition for x86-64 (UAPI group, discoverable partitions specification).
pub(super) const ROOT_X86_64: Guid = Guid::of(0x4F68_BCE3_E8CD_4DB1_96E7_FBCA_F984_B709);
/// Root partition for 64-bit ARM (the same specification).
pub(super) const ROOT_AARCH64: Guid = Guid::of(0xB921_B045_1DF0_41C3_AF44_4C6F_280D_3FAE);
/// Linux filesystem data.
pub(super) const LINUX: Guid = Guid::of(0x0FC6_3DAF_8483_4772_8E79_3D69_D847_7DE4);
/// Linux LVM.
pub(super) const LVM: Guid = Guid::of(0xE6D6_D379_F507_44C2_A23C_238F_2A3D_F928);
/// Extended boot loader partition (discoverable partitions specification).
pub(super) const XBOOTLDR: Guid = Guid::of(0xBC13_C2FF_59E6_4262_A352_B275_FD6F_7172);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes() {
        assert_eq!(ESP.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(ESP.0[..6], [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8]);
        // The BIOS boot partition's GUID spells this in its bytes.
        assert_eq!(&BIOS_BOOT.0, b"Hah!IdontNeedEFI");
    }

    #[test]
    fn a_filesystem_uuid_keeps_its_order() {
        assert_eq!(dashed(&[0x11; 16]), "11111111-1111-1111-1111-111111111111");
        assert_eq!(hex(&[0, 0xaf]), "00af");
    }
}
