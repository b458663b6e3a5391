//! Range requests to objects in S3, in Google Cloud Storage and on web servers (feature `cloud`).
//!
//! One thread drives all requests. Callers start a request first and wait for it later, so that many requests are in
//! flight. Failed requests are retried with growing pauses until `ADVXL_STORE_PATIENCE` seconds have passed. An
//! object's length and ETag are checked against every response. Nothing is ever written to a store.
//! [`crate::data::shards`] interprets the bytes.

use std::collections::{BTreeMap, HashMap};
use std::error::Error as _;
use std::future::Future;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use object_store::aws::AmazonS3Builder;
use object_store::client::HttpError;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig,
};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::error::{Error, Kind, Result};

/// Maximum number of concurrent requests.
const MOST_AT_ONCE: usize = 64;
/// Timeout of one request, including its response. A 4 MiB block of a scan takes this long at 70 kB/s.
const LONGEST_REQUEST: Duration = Duration::from_secs(60);
/// How long a failed request is retried by default.
const PATIENCE: Duration = Duration::from_secs(180);

/// Limits concurrent requests of the whole process: stores limit clients, not data sets.
static SLOTS: Semaphore = Semaphore::const_new(MOST_AT_ONCE);

/// The response to a request that was started.
#[derive(Debug)]
pub struct Pending<T> {
    answer: Receiver<Result<T>>,
    task: tokio::task::AbortHandle,
}

impl<T> Pending<T> {
    /// Waits for the response.
    pub fn wait(self) -> Result<T> {
        let lost = |_| {
            Err(Error::failed(
                "a request to a store ended without a response",
            ))
        };
        self.answer.recv().unwrap_or_else(lost)
    }
}

/// Cancels the request, since its response is no longer needed.
impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Starts work on the network thread as soon as a slot is free.
fn begin<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<Pending<T>> {
    let (sender, answer) = sync_channel(1);
    let task = network()?.spawn(async move {
        let slot = SLOTS.acquire().await;
        let done = work.await;
        drop(slot);
        // Fails if the receiver was dropped because the response is no longer needed.
        let _ = sender.send(done);
    });
    let task = task.abort_handle();
    Ok(Pending { answer, task })
}

/// Returns the runtime of the thread that drives all requests. It lives as long as the process.
fn network() -> Result<Handle> {
    static NETWORK: OnceLock<Result<Handle>> = OnceLock::new();
    let start = || -> std::io::Result<Handle> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        std::thread::Builder::new()
            .name("network".into())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
        Ok(handle)
    };
    let failed = |error| Error::failed(format!("cannot start the network thread: {error}"));
    NETWORK.get_or_init(|| start().map_err(failed)).clone()
}

/// A store: a bucket, or a web server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Service {
    S3,
    Google,
    Web,
}

/// The parts of a URL: `s3` `bucket` `path/of/object`.
struct Address {
    service: Service,
    /// Everything before the path, such as `s3://bucket`.
    root: String,
    /// Bucket or host.
    name: String,
    path: Path,
}

impl Address {
    fn of(url: &str) -> Result<Self> {
        let wrong = |what: String| Error::input(format!("`{url}`: {what}"));
        let (scheme, rest) = url.split_once("://").unwrap_or_default();
        let service = match scheme {
            "s3" => Service::S3,
            "gs" => Service::Google,
            _ => Service::Web,
        };
        let (name, path) = rest.split_once('/').unwrap_or((rest, ""));
        if name.is_empty() || path.is_empty() {
            return Err(wrong("missing bucket, host or path".into())
                .hint("use `s3://BUCKET/PATH`, `gs://BUCKET/PATH` or `https://HOST/PATH`"));
        }
        // URLs of web servers are percent-encoded (%20), keys of objects are not.
        let parsed = match service {
            Service::Web => Path::from_url_path(path),
            Service::S3 | Service::Google => Path::parse(path),
        };
        Ok(Self {
            service,
            root: format!("{scheme}://{name}"),
            name: name.to_owned(),
            path: parsed.map_err(|error| wrong(error.to_string()))?,
        })
    }

    /// Returns the store, which is created once per bucket or server.
    fn store(&self) -> Result<Arc<dyn ObjectStore>> {
        static STORES: OnceLock<Mutex<HashMap<String, Arc<dyn ObjectStore>>>> = OnceLock::new();
        let stores = STORES.get_or_init(Mutex::default);
        let mut stores = stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&self.root) {
            return Ok(store.clone());
        }
        let options = ClientOptions::new()
            .with_timeout(LONGEST_REQUEST)
            .with_user_agent(http_agent());
        let retry = RetryConfig {
            max_retries: usize::MAX,
            retry_timeout: configured_patience()?,
            ..RetryConfig::default()
        };
        let made: object_store::Result<Arc<dyn ObjectStore>> = match self.service {
            Service::S3 => {
                self.require_credentials(
                    &[
                        "AWS_ACCESS_KEY_ID",
                        "AWS_WEB_IDENTITY_TOKEN_FILE",
                        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                        "AWS_METADATA_ENDPOINT",
                        "AWS_SKIP_SIGNATURE",
                    ],
                    "",
                )?;
                // The variables are applied last, since they may allow plain HTTP.
                let mut builder = AmazonS3Builder::new().with_client_options(options);
                for (key, value) in variables("AWS_") {
                    if let Ok(key) = key.to_ascii_lowercase().parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                let builder = builder.with_bucket_name(&self.name).with_retry(retry);
                builder.build().map(|store| Arc::new(store) as _)
            }
            Service::Google => {
                self.require_credentials(
                    &[
                        "GOOGLE_SERVICE_ACCOUNT",
                        "GOOGLE_SERVICE_ACCOUNT_PATH",
                        "GOOGLE_SERVICE_ACCOUNT_KEY",
                        "GOOGLE_APPLICATION_CREDENTIALS",
                        "GOOGLE_SKIP_SIGNATURE",
                    ],
                    ".config/gcloud/application_default_credentials.json",
                )?;
                // The credentials may point to an emulator that uses plain HTTP.
                let options = options.with_allow_http(true);
                let mut builder = GoogleCloudStorageBuilder::new().with_client_options(options);
                for (key, value) in variables("GOOGLE_") {
                    if let Ok(key) = key.to_ascii_lowercase().parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                let builder = builder.with_bucket_name(&self.name).with_retry(retry);
                builder.build().map(|store| Arc::new(store) as _)
            }
            Service::Web => {
                let options = options.with_allow_http(self.root.starts_with("http:"));
                let builder = HttpBuilder::new().with_url(&self.root);
                let builder = builder.with_client_options(options).with_retry(retry);
                builder.build().map(|store| Arc::new(store) as _)
            }
        };
        let store = made.map_err(|error| {
            let message = format!("cannot use `{}`: {}", self.root, cause(&error));
            Error::input(message).hint(self.credentials_hint())
        })?;
        stores.insert(self.root.clone(), store.clone());
        Ok(store)
    }

    /// Returns an error if no credentials are set and this machine has no metadata service to get them from. Querying a
    /// missing service would take minutes.
    fn require_credentials(&self, variables: &[&str], file_at_home: &str) -> Result<()> {
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let at_home = std::env::home_dir().map(|home| home.join(file_at_home));
        if variables.iter().any(is_set) || at_home.is_some_and(|path| path.is_file()) {
            return Ok(());
        }
        // The metadata service of Amazon's and Google's machines, which provides their credentials.
        let metadata = SocketAddr::from(([169, 254, 169, 254], 80));
        if TcpStream::connect_timeout(&metadata, Duration::from_secs(2)).is_ok() {
            return Ok(());
        }
        let message = format!("no credentials for `{}`", self.root);
        Err(Error::input(message).hint(self.credentials_hint()))
    }

    fn credentials_hint(&self) -> &'static str {
        match self.service {
            Service::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION, AWS_SESSION_TOKEN, \
                 AWS_ENDPOINT if needed), or AWS_SKIP_SIGNATURE=true for a public bucket"
            }
            Service::Google => {
                "set GOOGLE_APPLICATION_CREDENTIALS to a service account key file, or \
                 GOOGLE_SKIP_SIGNATURE=true for a public bucket"
            }
            Service::Web => "check the URL",
        }
    }

    /// Turns an error of the store into one for the user.
    fn explain(&self, url: &str, error: &object_store::Error) -> Error {
        let (cause, text) = (cause(error), error.to_string());
        let is_network = causes(error).any(|inner| inner.is::<HttpError>());
        // Credentials are fetched before the first object. If that fails, it was not the object that was refused.
        let is_metadata = ["/latest/api/token", "/latest/meta-data", "computeMetadata"]
            .iter()
            .any(|part| text.contains(part));
        let message = match is_metadata {
            true => format!(
                "no credentials for `{}`, and none from this machine's metadata service: {cause}",
                self.root
            ),
            false => format!("cannot read `{url}`: {cause}"),
        };
        match (error, status(error)) {
            (object_store::Error::NotFound { .. }, _) | (_, Some(404)) => {
                Error::input(message).hint("check the bucket, path and range; the object may have been deleted")
            }
            (object_store::Error::NotSupported { .. }, _) => Error::input(
                "the server did not return the requested byte range, but everything or nothing",
            )
            .context(format!("`{url}`"))
            .hint("use a server that supports range requests, or copy the shards to this machine"),
            (object_store::Error::PermissionDenied { .. }, _)
            | (object_store::Error::Unauthenticated { .. }, _)
            | (_, Some(401 | 403)) => Error::input(message).hint(match self.service {
                Service::Web => "the server requires credentials, which advxl does not send; check the URL".to_owned(),
                Service::S3 | Service::Google => format!(
                    "the credentials are invalid, expired or lack read access (or the object does not exist, and they \
                     lack list access); {}",
                    self.credentials_hint()
                ),
            }),
            (_, Some(416)) => changed(url, "it is shorter than before"),
            (_, Some(301 | 307 | 308)) => {
                Error::input(message).hint("the bucket is in another region: set AWS_REGION")
            }
            (_, Some(status)) if (status < 500 && status != 408 && status != 429) || status == 501 => {
                Error::input(message).hint(self.credentials_hint())
            }
            _ if cause.contains("scheme is not allowed") => {
                Error::input(message).hint("set AWS_ALLOW_HTTP=true if the store uses plain HTTP")
            }
            _ if cause.contains("configured region") => {
                Error::input(message).hint("the bucket is in another region: set AWS_REGION")
            }
            (_, None) if !is_network => {
                Error::failed(message).hint("the server does not respond like an object store or web server")
            }
            _ if is_metadata => {
                Error::new(Kind::TryAgain, message).hint(self.credentials_hint())
            }
            _ => Error::new(Kind::TryAgain, message).hint(format!(
                "the store or the network kept failing while the request was retried for {} s (ADVXL_STORE_PATIENCE); \
                 the data is not to blame: run the same command again once the store responds",
                patience().as_secs()
            )),
        }
    }
}

fn http_agent() -> object_store::HeaderValue {
    object_store::HeaderValue::from_static(concat!("advxl/", env!("CARGO_PKG_VERSION")))
}

fn variables(start: &str) -> impl Iterator<Item = (String, String)> {
    let all = std::env::vars_os().filter_map(|(key, value)| {
        let key = key.into_string().ok()?;
        Some((key, value.into_string().ok()?))
    });
    all.filter(move |(key, _)| key.starts_with(start))
}

/// Returns how long a failed request is retried. An invalid setting is reported when a store is created.
fn patience() -> Duration {
    configured_patience().unwrap_or(PATIENCE)
}

fn configured_patience() -> Result<Duration> {
    let Some(value) = std::env::var_os("ADVXL_STORE_PATIENCE") else {
        return Ok(PATIENCE);
    };
    let value = value.to_string_lossy();
    let seconds = value.trim().parse().map(Duration::from_secs);
    seconds.map_err(|_| {
        Error::input(format!(
            "invalid ADVXL_STORE_PATIENCE = `{value}`: expected a whole number"
        ))
        .hint("set it to the seconds for which failed requests are retried, such as 600")
    })
}

/// Returns what went wrong, without the details of the request: the last part of the message and the innermost cause.
fn cause(error: &object_store::Error) -> String {
    let text = error.to_string();
    let (_, last) = text.rsplit_once(" - ").unwrap_or(("", &text));
    let mut last = last.trim().to_owned();
    // Stores respond in XML. Only its code and message matter.
    if let Some((before, body)) = last.split_once(": <") {
        let part = |name: &str| {
            let (_, after) = body.split_once(&format!("<{name}>"))?;
            Some(after.split_once(&format!("</{name}>"))?.0.trim().to_owned())
        };
        let parts: Vec<String> = [part("Code"), part("Message")]
            .into_iter()
            .flatten()
            .collect();
        last = match parts.is_empty() {
            true => before.to_owned(),
            false => format!("{before}: {}", parts.join(", ")),
        };
    }
    last = last
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        // A server's text must not control the terminal.
        .filter(|letter| !letter.is_control())
        .take(300)
        .collect();
    let last = last.trim_end_matches([':', ' ']).replace(
        "Server returned non-2xx status code: ",
        "the server returned ",
    );
    let innermost = causes(error).last().map(ToString::to_string);
    match innermost {
        Some(inner) if inner.len() < 200 && !last.contains(&inner) && !text.contains(&inner) => {
            format!("{last}: {inner}")
        }
        _ => last,
    }
}

/// Iterates over the sources of an error, the innermost last.
fn causes(error: &object_store::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |inner| (*inner).source())
}

/// Returns the HTTP status, which the crate's errors contain only as text.
fn status(error: &object_store::Error) -> Option<u16> {
    let text = error.to_string();
    let (_, after) = text.split_once("status code: ")?;
    after.get(..3)?.parse().ok()
}

fn changed(url: &str, how: &str) -> Error {
    Error::input(format!("`{url}` has changed since it was opened: {how}"))
        .hint("shards must not change during a run; start again once they are final")
}

/// Repeats a request until it succeeds or [`patience`] ends. The crate retries requests, but not every interrupted
/// response.
async fn asked<T, F>(address: &Address, url: &str, request: impl Fn() -> F) -> Result<Option<T>>
where
    F: Future<Output = object_store::Result<T>>,
{
    let begun = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        match request().await {
            Ok(answer) => return Ok(Some(answer)),
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(object_store::Error::Generic { source, .. })
                if source.is::<HttpError>() && begun.elapsed() < patience() =>
            {
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(Duration::from_secs(10));
            }
            Err(error) => return Err(address.explain(url, &error)),
        }
    }
}

/// Fetches a range, or everything, with the object's metadata.
async fn got(
    store: &Arc<dyn ObjectStore>,
    path: &Path,
    range: Option<Range<u64>>,
) -> object_store::Result<(Vec<u8>, ObjectMeta)> {
    let options = GetOptions {
        range: range.map(GetRange::Bounded),
        ..GetOptions::default()
    };
    let answer = store.get_opts(path, options).await?;
    let meta = answer.meta.clone();
    Ok((answer.bytes().await?.into(), meta))
}

/// A remote object of known length and version.
#[derive(Debug)]
pub struct Remote {
    url: String,
    meta: ObjectMeta,
}

impl Remote {
    /// Looks up objects concurrently. Returns them in the order of their URLs, with `None` for missing ones.
    pub fn find(urls: &[String]) -> Result<Vec<Option<Arc<Self>>>> {
        let found = urls.iter().map(|url| {
            let (address, url) = (Address::of(url)?, url.clone());
            let store = address.store()?;
            begin(async move {
                let head = || async { store.head(&address.path).await };
                let meta = asked(&address, &url, head).await?;
                Ok(meta.map(|meta| Arc::new(Self { url, meta })))
            })
        });
        let found: Vec<_> = found.collect::<Result<_>>()?;
        found.into_iter().map(Pending::wait).collect()
    }

    /// Returns its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the length in bytes.
    pub fn length(&self) -> u64 {
        self.meta.size
    }

    /// Returns the length and a version number: a hash of the ETag, or else the modification time in nanoseconds since
    /// 1970.
    pub fn stamp(&self) -> (u64, u64) {
        let version = match &self.meta.e_tag {
            Some(tag) => {
                let hash = blake3::hash(tag.as_bytes());
                hash.as_bytes()[..8]
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
            }
            None => self.seconds() * 1_000_000_000,
        };
        (self.length(), version)
    }

    /// Returns whether an index with this stamp belongs to this object. Accepts the object's stamp, or the same length
    /// and modification time to the second, for local files that a web server serves.
    pub fn accepts(&self, stamp: (u64, u64)) -> bool {
        let same_time = self.seconds() > 0 && stamp.1 / 1_000_000_000 == self.seconds();
        stamp == self.stamp() || (stamp.0 == self.length() && same_time)
    }

    fn seconds(&self) -> u64 {
        self.meta.last_modified.timestamp().try_into().unwrap_or(0)
    }

    /// Starts reading a range, which must lie within the object.
    ///
    /// Errors, with the response: errors of the store and the network; the object has changed.
    pub fn ask(self: &Arc<Self>, range: Range<u64>) -> Result<Pending<Vec<u8>>> {
        let (remote, address) = (self.clone(), Address::of(&self.url)?);
        let store = address.store()?;
        begin(async move {
            let url = &remote.url;
            if range.is_empty() {
                return Ok(Vec::new());
            }
            let read = || got(&store, &address.path, Some(range.clone()));
            let Some((bytes, meta)) = asked(&address, url, read).await? else {
                return Err(changed(url, "it no longer exists"));
            };
            let before = &remote.meta;
            if meta.size != before.size {
                return Err(changed(
                    url,
                    &format!("it had {} bytes and now has {}", before.size, meta.size),
                ));
            }
            if let (Some(old), Some(new)) = (&before.e_tag, &meta.e_tag)
                && old != new
            {
                return Err(changed(
                    url,
                    &format!("its ETag was {old} and is now {new}"),
                ));
            }
            if bytes.len() as u64 != range.end - range.start {
                let message = format!("`{url}` returned {} bytes for {range:?}", bytes.len());
                return Err(Error::new(Kind::TryAgain, message).hint("run the same command again"));
            }
            Ok(bytes)
        })
    }

    /// Starts reading the index next to the object, if it exists: its first bytes, or all of it.
    pub fn ask_index(&self, first: Option<u64>) -> Result<Pending<Option<Vec<u8>>>> {
        let url = format!("{}.index", self.url);
        let address = Address::of(&url)?;
        let store = address.store()?;
        begin(async move {
            let read = || got(&store, &address.path, first.map(|count| 0..count));
            match asked(&address, &url, read).await {
                Ok(answer) => Ok(answer.map(|(bytes, _)| bytes)),
                // With access to certain objects only, or without list access, a missing index is reported as
                // forbidden.
                Err(error) if error.kind() == Kind::Input => Ok(None),
                Err(error) => Err(error),
            }
        })
    }
}

/// Returns the URLs that match one with `*` and `?`, sorted.
///
/// Errors: a web server, which cannot list its files; errors of the store and the network.
pub fn list(url: &str) -> Result<Vec<String>> {
    let address = Address::of(url)?;
    if address.service == Service::Web {
        let message = format!("`{url}`: globs and `?` queries are not supported for web servers");
        return Err(
            Error::input(message).hint("use a range such as `https://host/{00000..00099}.tar`")
        );
    }
    let path = &url[address.root.len() + 1..];
    let parts: Vec<&str> = path.split('/').collect();
    let fixed = parts
        .iter()
        .take_while(|part| !part.contains(['*', '?']))
        .count();
    // Sorted by whole key, without duplicates.
    let mut folders = vec![parts[..fixed].join("/")];
    for (place, part) in parts.iter().enumerate().skip(fixed) {
        let is_last = place + 1 == parts.len();
        let mut fitting = BTreeMap::new();
        for folder in folders {
            for key in children(url, &folder, is_last)? {
                let name = key.rsplit('/').next().unwrap_or_default();
                if !name.starts_with('.')
                    && crate::storage::glob::fits(part.as_bytes(), name.as_bytes())
                {
                    fitting.insert(key, ());
                }
            }
        }
        folders = fitting.into_keys().collect();
    }
    let found = folders
        .into_iter()
        .map(|key| format!("{}/{key}", address.root));
    Ok(found.collect())
}

/// Returns the keys of the objects, or else of the folders, directly below a folder.
fn children(url: &str, folder: &str, objects: bool) -> Result<Vec<String>> {
    let address = Address::of(url)?;
    let store = address.store()?;
    let wrong = |error: object_store::path::Error| Error::input(format!("`{url}`: {error}"));
    let prefix = Path::parse(folder).map_err(wrong)?;
    let url = url.to_owned();
    let listed = begin(async move {
        let list = || store.list_with_delimiter(Some(&prefix));
        let listed = asked(&address, &url, list).await?;
        Ok(listed.map_or(Vec::new(), |listed| match objects {
            true => {
                let objects = listed.objects.into_iter();
                objects.map(|object| object.location.to_string()).collect()
            }
            false => {
                let folders = listed.common_prefixes.into_iter();
                folders.map(|folder| folder.to_string()).collect()
            }
        }))
    });
    listed?.wait()
}
