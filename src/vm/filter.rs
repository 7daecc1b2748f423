//! The guard between the guest and QEMU's user networking.
//!
//! libslirp answers for the host's loopback at its gateway address, at 255.255.255.255, and on *every* port of its
//! name server address if the host's resolver is a local one (`sotranslate_out` in libslirp's socket.c); packets to
//! 127.0.0.0/8 or 0.0.0.0 it connects as they are. QEMU offers no switch for it, and a rule inside the guest would bind nobody
//! who is root there. So every frame the guest sends passes through here, and those to the host's loopback end here.

use std::io::{self, Read, Write};
use std::sync::mpsc::sync_channel;

/// The guest's own address, with its prefix.
pub const GUEST: &str = "10.0.2.15/24";
/// The gateway that libslirp plays.
pub const GATEWAY: [u8; 4] = [10, 0, 2, 2];
/// The name server that libslirp plays: it passes questions on to the host's resolver.
pub const NAME_SERVER: [u8; 4] = [10, 0, 2, 3];

/// Frames longer than this don't exist on this link; a longer one means that the stream is not what it should be.
const LONGEST: usize = 65_600;

/// How many frames wait at most for QEMU to take them back. More are dropped, as on any crowded link.
const QUEUE: usize = 1024;

/// Passes frames on until the stream ends. A frame is its length (32 bits, big endian) and its bytes: the format of
/// QEMU's `filter-redirector` (net/filter-mirror.c).
///
/// QEMU writes frames out and reads them back in one and the same loop, and waits where a socket is full. So reading
/// must never wait for writing here, or both would wait for each other.
///
/// # Errors
/// When a stream breaks in the middle of a frame or isn't one.
pub fn pass(mut from: impl Read, mut to: impl Write + Send) -> io::Result<()> {
    let (sender, frames) = sync_channel::<Vec<u8>>(QUEUE);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for frame in frames {
                if to.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        let sender = sender;
        loop {
            let mut length = [0; 4];
            match from.read_exact(&mut length) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            let bytes = u32::from_be_bytes(length) as usize;
            if bytes > LONGEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut frame = vec![0; 4 + bytes];
            frame[..4].copy_from_slice(&length);
            from.read_exact(&mut frame[4..])?;
            if allowed(&frame[4..]) {
                let _ = sender.try_send(frame);
            }
        }
    })
}

/// Whether an Ethernet frame of the guest may leave it.
#[must_use]
pub fn allowed(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => true,
        Some([0x08, 0x00]) => allowed_packet(&frame[14..]),
        _ => false,
    }
}

fn allowed_packet(packet: &[u8]) -> bool {
    const UDP: u8 = 17;
    const TCP: u8 = 6;
    let [first, _, _, _, _, _, fragment_high, fragment_low, _, protocol, ..] = *packet else { return false };
    let Some(&[a, b, c, d]) = packet.get(16..20) else { return false };
    let header = usize::from(first & 0x0f) * 4;
    let port = packet.get(header + 2..header + 4).map(|port| u16::from_be_bytes([port[0], port[1]]));
    let fragment = u16::from_be_bytes([fragment_high & 0x3f, fragment_low]) != 0;
    match [a, b, c, d] {
        [0 | 127, ..] => false,
        // DHCP: answered by libslirp itself.
        [255, 255, 255, 255] | GATEWAY => protocol == UDP && port == Some(67) && !fragment,
        NAME_SERVER => (protocol == UDP || protocol == TCP) && port == Some(53) && !fragment,
        // The rest of libslirp's own network: nothing is there, and older versions answer for the host's loopback.
        [10, 0, 2, _] => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(destination: [u8; 4], protocol: u8, port: u16) -> Vec<u8> {
        let mut frame = vec![0u8; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15]);
        frame.extend(destination);
        frame.extend([0x30, 0x39]);
        frame.extend(port.to_be_bytes());
        frame.extend([0, 8, 0, 0]);
        frame
    }

    #[test]
    fn the_hosts_loopback_is_out_of_reach() {
        for destination in [[10, 0, 2, 2], [127, 0, 0, 1], [127, 9, 9, 9], [0, 0, 0, 0], [255; 4], [10, 0, 2, 77]] {
            assert!(!allowed(&packet(destination, 6, 8080)), "{destination:?}");
            assert!(!allowed(&packet(destination, 17, 53)), "{destination:?}");
        }
        assert!(!allowed(&packet(NAME_SERVER, 6, 8080)), "any port would reach a local resolver's host");
    }

    #[test]
    fn the_world_names_and_addresses_are_in_reach() {
        assert!(allowed(&packet([93, 184, 216, 34], 6, 443)));
        assert!(allowed(&packet(NAME_SERVER, 17, 53)));
        assert!(allowed(&packet([255; 4], 17, 67)));
        let arp = [&[0u8; 12][..], &[0x08, 0x06, 0, 1]].concat();
        assert!(allowed(&arp));
    }

    #[test]
    fn ipv6_and_shreds_are_dropped() {
        let ipv6 = [&[0u8; 12][..], &[0x86, 0xdd], &[0; 40]].concat();
        assert!(!allowed(&ipv6));
        assert!(!allowed(&packet([93, 184, 216, 34], 6, 443)[..20]));
        let mut fragment = packet(NAME_SERVER, 17, 53);
        fragment[20] = 0x20;
        assert!(!allowed(&fragment), "a fragment's later parts have no port");
    }

    #[test]
    fn allowed_frames_come_out_as_they_went_in() {
        let framed = |frame: &[u8]| [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat();
        let good = framed(&packet([93, 184, 216, 34], 6, 443));
        let bad = framed(&packet([127, 0, 0, 1], 6, 22));
        let mut out = Vec::new();
        pass(&[&good[..], &bad, &good].concat()[..], &mut out).unwrap();
        assert_eq!(out, [&good[..], &good].concat());
        assert!(pass(&[0xff; 8][..], io::sink()).is_err());
    }

    /// A network end that takes nothing must not keep the guest's end from being read.
    #[test]
    fn reading_never_waits_for_writing() {
        let (mut guest, from) = std::os::unix::net::UnixStream::pair().unwrap();
        let (to, mut network) = std::os::unix::net::UnixStream::pair().unwrap();
        let passing = std::thread::spawn(move || pass(from, to));
        let mut packet = packet([93, 184, 216, 34], 6, 443);
        packet.resize(1500, 0);
        let frame = [&u32::try_from(packet.len()).unwrap().to_be_bytes()[..], &packet].concat();
        // Far more than both sockets and the queue hold.
        for _ in 0..10 * QUEUE {
            guest.write_all(&frame).unwrap();
        }
        drop(guest);
        let mut arrived = Vec::new();
        network.read_to_end(&mut arrived).unwrap();
        passing.join().unwrap().unwrap();
        assert!(arrived.len() >= QUEUE * frame.len() && arrived.len().is_multiple_of(frame.len()));
    }
}
