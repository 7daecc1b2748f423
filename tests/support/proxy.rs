//! A line between kiln and the endpoint that does what only a line can do: end in the middle of a request or of an
//! answer, stall, crawl, or carry something that was never sent.
//!
//! The endpoint closes each connection after its answer, so that a connection is one request and one answer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A thread that nobody ends ends itself.
const LIMIT: Duration = Duration::from_secs(120);
/// Bodies up to this size are read before the request is judged: calls of EC2 have their action there.
const SMALL: usize = 64 << 10;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Way {
    /// To the endpoint.
    Request,
    /// To kiln. The request has arrived.
    Answer,
}

/// What becomes of them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Deed {
    /// The connection ends.
    Cut,
    /// Nothing moves for so long, then all goes on.
    Stall(Duration),
    /// They come in pieces, a quarter of what was sent, with a pause before each.
    Crawl(Duration),
    /// These come in their place, and the connection ends.
    Replace(&'static [u8]),
}

/// Something that happens to requests.
#[derive(Debug, Clone)]
pub(crate) struct Harm {
    /// A piece of the request's head, or of its body if that is small.
    pub(crate) request: String,
    pub(crate) way: Way,
    /// How many bytes pass before.
    pub(crate) after: usize,
    pub(crate) deed: Deed,
    /// How many requests it meets.
    pub(crate) times: usize,
}

/// Ends with the test.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: String,
    harms: Mutex<Vec<Harm>>,
    /// Requests that were met.
    met: Mutex<Vec<String>>,
    over: Mutex<bool>,
    is_over: Condvar,
}

impl Proxy {
    /// In front of this URL.
    pub(crate) fn before(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let shared = Arc::new(Shared {
            endpoint: url.trim_start_matches("http://").trim_end_matches('/').to_owned(),
            harms: Mutex::default(),
            met: Mutex::default(),
            over: Mutex::default(),
            is_over: Condvar::new(),
        });
        let proxy = Self { port: listener.local_addr().unwrap().port(), shared: Arc::clone(&shared) };
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.wait(Duration::ZERO) {
                    break;
                }
                let shared = Arc::clone(&shared);
                // A line that breaks is nobody's failure here.
                std::thread::spawn(move || shared.carry(client));
            }
        });
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn harm(&self, harm: Harm) {
        lock(&self.shared.harms).push(harm);
    }

    /// The pieces by which requests were met so far.
    pub(crate) fn met(&self) -> Vec<String> {
        lock(&self.shared.met).clone()
    }

    /// From now on all passes.
    pub(crate) fn reset(&self) {
        lock(&self.shared.harms).clear();
        lock(&self.shared.met).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *lock(&self.shared.over) = true;
        self.shared.is_over.notify_all();
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Waits that long, or until the proxy ends, and tells whether it has.
    fn wait(&self, time: Duration) -> bool {
        let over = lock(&self.over);
        let waited = self.is_over.wait_timeout_while(over, time.min(LIMIT), |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn carry(self: Arc<Self>, mut client: TcpStream) -> io::Result<()> {
        let opening = opening(&mut client)?;
        let harm = self.take(&String::from_utf8_lossy(&opening));
        let server = TcpStream::connect(&self.endpoint)?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
        }
        let deed = |way| harm.as_ref().filter(|harm| harm.way == way).map(|harm| (harm.after, harm.deed));
        let back = {
            let (shared, deed) = (Arc::clone(&self), deed(Way::Answer));
            let (server, client) = (server.try_clone()?, client.try_clone()?);
            std::thread::spawn(move || {
                let carried = shared.pump(&[], &server, &client, &client, deed);
                // Whoever still sends gets to know that the answer is over.
                let _ = client.shutdown(Shutdown::Both);
                let _ = server.shutdown(Shutdown::Both);
                carried
            })
        };
        let carried = self.pump(&opening, &client, &server, &client, deed(Way::Request));
        let _ = server.shutdown(if carried.is_ok() { Shutdown::Write } else { Shutdown::Both });
        let _ = back.join();
        carried
    }

    /// The harm that this request meets.
    fn take(&self, opening: &str) -> Option<Harm> {
        let mut harms = lock(&self.harms);
        let harm = harms.iter_mut().find(|harm| harm.times > 0 && opening.contains(&harm.request))?;
        harm.times -= 1;
        lock(&self.met).push(harm.request.clone());
        Some(harm.clone())
    }

    /// Carries `first`, then what comes `from`. An error is the line's end.
    fn pump(
        &self,
        first: &[u8],
        mut from: &TcpStream,
        to: &TcpStream,
        client: &TcpStream,
        mut deed: Option<(usize, Deed)>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        let mut piece = first.to_vec();
        let mut passed = 0;
        loop {
            if let Some((after, what)) = deed
                && passed + piece.len() > after
            {
                let (before, rest) = piece.split_at(after - passed);
                (&*to).write_all(before)?;
                self.act(what, rest, to, client)?;
                // A crawling line crawls on.
                deed = deed.filter(|(_, what)| matches!(what, Deed::Crawl(_))).map(|(_, what)| (0, what));
                passed = 0;
            } else {
                (&*to).write_all(&piece)?;
                passed += piece.len();
            }
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            piece = buffer[..count].to_vec();
        }
    }

    fn act(&self, deed: Deed, rest: &[u8], mut to: &TcpStream, mut client: &TcpStream) -> io::Result<()> {
        let over = || Err(io::ErrorKind::ConnectionAborted.into());
        match deed {
            Deed::Cut => over(),
            Deed::Replace(bytes) => {
                client.write_all(bytes)?;
                client.shutdown(Shutdown::Write)?;
                over()
            }
            Deed::Stall(time) if self.wait(time) => over(),
            Deed::Stall(_) => to.write_all(rest),
            Deed::Crawl(pause) => rest.chunks(rest.len().div_ceil(4).max(1)).try_for_each(|piece| {
                if self.wait(pause) {
                    return over();
                }
                to.write_all(piece)
            }),
        }
    }
}

/// The request's head, and its body if it is small.
fn opening(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    client.set_read_timeout(Some(LIMIT))?;
    let deadline = Instant::now() + LIMIT;
    let (mut opening, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&opening);
        if let Some(head) = text.find("\r\n\r\n") {
            let length = |line: &str| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok();
            let body: usize = text[..head].lines().find_map(length).unwrap_or(0);
            if body > SMALL || opening.len() >= head + 4 + body {
                return Ok(opening);
            }
        }
        let count = client.read(&mut buffer)?;
        if count == 0 || Instant::now() > deadline {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        opening.extend_from_slice(&buffer[..count]);
    }
}
