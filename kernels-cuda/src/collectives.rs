//! Collectives between GPUs, one process each, that overlap with the backward pass.
//!
//! The host runs ahead of the GPU: when it has queued the backward pass, the GPU is still computing it. An exchange of
//! gradients that is queued then still overlaps, because it is on a stream of its own and waits only for what it needs:
//!
//! - **Ready marks.** [`Values::mark`] records an event behind the kernels that compute a block's gradients. An exchange waits
//!   for the marks of its own tensors; for tensors without one it waits for all work so far, which is always right.
//! - **The end of an exchange** is an event too. [`Pending::wait`] lets the compute stream wait for it and then takes the
//!   results out; the host does not wait.
//!
//! Memory is the delicate part. The arena gives a block out again in the order of the compute stream: the host may hold
//! it while kernels of its last owner are still to run. Therefore:
//!
//! - **Messages are never in the arena.** They are in memory of their own ([`Fresh`]), which is kept for the next
//!   exchange. One that only the exchange stream touched may be used again by that stream at once. One that the compute stream
//!   reads (results that are taken apart) comes back with an event behind that reading, for which its next user waits.
//! - **Results are in the arena**, allocated in [`Pending::wait`] and written by the compute stream, like those of any operation.
//!   This costs a copy of the result, 1 / world size of the gradients, and in return nothing of an exchange leaves this
//!   module.
//! - **Inputs are held by [`Pending`]** and dropped once the compute stream waits for the end of the exchange. Whoever gets their
//!   memory from the arena then has work behind that wait.
//!
//! Tensors are laid out in one message by one kernel for all of them, and taken out by another. The former is on the
//! exchange stream, so laying out one message does not overlap with sending another; that is a few percent of the time
//! at the speed of NVLink.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::bindings::{Handle, NCCL_FLOAT32, NCCL_IN_PROGRESS, NCCL_SUM, Nccl, Status};
use crate::communicator::{Communicator, UniqueId, Watch};
use crate::compiler::fingerprint;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::gpu::{Fresh, Gpu};
use crate::machine::{Kind, Stream};
use crate::messages::{MOST_ROWS, Table, sum_rows};
use crate::values::Values;

/// How gradients are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// As a pairwise tree over the ranks: the same bits on every number of GPUs and on the CPU. Every rank receives
    /// what is to be summed, which are as many bytes as NCCL's ring sends.
    Exact,
    /// By NCCL, whose order depends on its version, the topology and the number of ranks.
    Fast,
}

/// A group of GPUs, one a process, seen from one of them.
///
/// All ranks call the same in the same order. Like other work, exchanges return nothing: the first failure is the GPU's
/// ([`Gpu::check`]). Dropping it leaves the group, with the other ranks.
pub struct Collectives {
    group: Arc<Group>,
    watcher: Option<JoinHandle<()>>,
}

/// What exchanges that are under way share.
struct Group {
    gpu: Gpu,
    communicator: Arc<Communicator>,
    sum: Sum,
    /// Memory for messages that is not in use, and the event after which it can be used.
    messages: Mutex<Vec<(Fresh, Option<Event>)>>,
    /// Those that the ranks have agreed on.
    plans: Mutex<HashMap<Vec<Share>, Plan>>,
    /// Of all exchanges so far.
    trace: Mutex<u64>,
}

/// How a tensor is shared between the ranks: rank r has the numbers `r * stride..(r + 1) * stride`, as far as there are
/// some.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    /// Of the whole tensor.
    pub len: usize,
    /// Numbers of each rank; the last ones may have fewer or none.
    pub stride: usize,
}

impl Share {
    /// The numbers of one rank.
    pub fn range(self, rank: usize) -> Range<usize> {
        let at = |rank: usize| (rank * self.stride).min(self.len);
        at(rank)..at(rank + 1)
    }
}

/// Tensors that are exchanged together, which all ranks agreed on.
#[derive(Clone, Debug)]
pub struct Plan(Arc<Layout>);

#[derive(Debug)]
struct Layout {
    shares: Vec<Share>,
    /// Numbers of one rank's message.
    width: usize,
    ranks: usize,
    rank: usize,
}

/// Numbers to which a message of one rank is filled up: 128 bytes, so that every rank's is aligned for NCCL.
const ALIGNMENT: usize = 32;

impl Layout {
    /// Each share with where it begins in the message of a rank.
    fn places(&self) -> impl Iterator<Item = (Share, usize)> {
        self.shares.iter().scan(0, |end, share| {
            let begin = *end;
            *end += share.stride;
            Some((*share, begin))
        })
    }

    /// The numbers of this rank, as a tensor of their own.
    fn own(&self, share: Share) -> Share {
        Share { len: share.range(self.rank).len(), stride: share.stride }
    }
}

impl std::fmt::Debug for Collectives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {} on {:?}", self.rank(), self.world_size(), self.group.gpu)
    }
}

impl Collectives {
    /// Joins the other ranks: all call this with the same id, and with different GPUs.
    ///
    /// `limit` is for how long the others are waited for: to join, and in every exchange. A rank may be
    /// minutes behind where one alone evaluates or writes a checkpoint; PyTorch's limit is ten minutes.
    ///
    /// # Errors
    ///
    /// If NCCL is missing (the error says where it was looked for and how to install it), a rank does not come, or the
    /// ranks disagree about `sum`.
    ///
    /// # Panics
    ///
    /// If `rank` is not below `world_size`, or there are 4096 ranks or more.
    pub fn join(gpu: &Gpu, id: UniqueId, rank: usize, world_size: usize, sum: Sum, limit: Duration) -> Result<Self> {
        assert!(rank < world_size && world_size <= MOST_ROWS, "rank {rank} of {world_size}");
        let communicator = Arc::new(Communicator::join(gpu, id, rank, world_size, limit)?);
        let group = Group {
            gpu: gpu.clone(),
            communicator,
            sum,
            messages: Mutex::default(),
            plans: Mutex::default(),
            trace: Mutex::default(),
        };
        // Before all else that can fail, since dropping it leaves the group.
        let mut collectives = Self { group: Arc::new(group), watcher: None };
        collectives.watcher = Some(collectives.group.communicator.watched()?);
        gpu.begin_exchanges();
        collectives.agree("how gradients are summed (exact or fast)", &[sum as u32])?;
        Ok(collectives)
    }

    /// The number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.group.communicator.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.group.communicator.world_size
    }

    /// For a thread that knows which ranks are alive.
    pub fn watch(&self) -> Watch {
        Watch(self.group.communicator.clone())
    }

    /// A number that depends on every exchange so far. Ranks whose numbers differ did not call the same, and what they
    /// exchanged since they last agreed is void: NCCL does not notice.
    pub fn trace(&self) -> u64 {
        *self.group.trace.lock().expect("not poisoned")
    }

    /// A plan for exchanges of these tensors. The first time, all ranks compare theirs, for which the host waits.
    ///
    /// # Errors
    ///
    /// If the ranks ask for different tensors, naming those that do, or one is lost.
    ///
    /// # Panics
    ///
    /// If the parts of all ranks do not make a whole tensor.
    pub fn plan(&self, shares: &[Share]) -> Result<Plan> {
        if let Some(plan) = self.group.plans.lock().expect("not poisoned").get(shares) {
            return Ok(plan.clone());
        }
        let ranks = self.world_size();
        for Share { len, stride } in shares {
            assert!(stride * ranks >= *len, "{ranks} parts of {stride} are not a tensor of {len}");
        }
        let numbers: Vec<u8> =
            shares.iter().flat_map(|share| [share.len, share.stride]).flat_map(usize::to_le_bytes).collect();
        let (hash, total) = (fingerprint(&numbers), shares.iter().map(|share| share.len).sum::<usize>());
        let words = [shares.len() as u64, total as u64, hash];
        let words = words.map(|word| [word as u32, (word >> 32) as u32]);
        self.agree(
            "the tensors to exchange (their number, how many numbers they have, and their parts)",
            words.as_flattened(),
        )?;
        let width = shares.iter().map(|share| share.stride).sum::<usize>().next_multiple_of(ALIGNMENT);
        let plan = Plan(Arc::new(Layout { shares: shares.to_vec(), width, ranks, rank: self.rank() }));
        self.group.plans.lock().expect("not poisoned").insert(shares.to_vec(), plan.clone());
        Ok(plan)
    }

    /// Starts a reduce-scatter: the result of every tensor is this rank's part of its sum over all ranks.
    ///
    /// To overlap with the backward pass, start with the gradients that are computed first (those of the last layers),
    /// and start all before waiting for any: exchanges are done in their order, and what is taken out of one is taken
    /// by the compute stream, behind the backward pass.
    ///
    /// # Panics
    ///
    /// If the tensors are not those of the plan.
    pub fn reduce_scatter(&self, plan: &Plan, tensors: Vec<Values>) -> Pending {
        let layout = &*plan.0;
        check("tensor", &tensors, layout.shares.iter().map(|share| share.len));
        let (ranks, width) = (layout.ranks, layout.width);
        let sum = self.group.sum;
        let parts = layout.places().map(|(share, begin)| (layout.own(share), begin)).collect();
        self.group.start("reduce-scatter", plan, tensors, parts, |group, tensors| {
            let message = group.lay_out(layout, tensors, ranks)?;
            match sum {
                Sum::Exact => {
                    let received = group.message(ranks * width)?;
                    group.all_to_all("reduce-scatter (all-to-all)", &message, &received, width)?;
                    let sum = group.message(width)?;
                    // SAFETY: the messages are as large, and used by the exchange stream alone.
                    unsafe { sum_rows(&group.gpu, Stream::Exchange, sum.at(), received.at(), [ranks, width]) };
                    group.keep([message, received]);
                    Some(sum)
                }
                Sum::Fast => {
                    let sum = group.message(width)?;
                    let (from, to) = (message.at(), sum.at());
                    group.call("reduce-scatter", move |nccl, handle, stream| {
                        let (from, to) = (from as *const c_void, to as *mut c_void);
                        // SAFETY: the messages are as large and live until the exchange is done.
                        unsafe { (nccl.ncclReduceScatter)(from, to, width, NCCL_FLOAT32, NCCL_SUM, handle, stream) }
                    })?;
                    group.keep([message]);
                    Some(sum)
                }
            }
        })
    }

    /// Starts an all-gather of this rank's part of every tensor; the results are the whole tensors.
    ///
    /// # Panics
    ///
    /// If the parts are not those of the plan.
    pub fn all_gather(&self, plan: &Plan, parts: Vec<Values>) -> Pending {
        let layout = &*plan.0;
        check("part", &parts, layout.shares.iter().map(|share| layout.own(*share).len));
        let width = layout.width;
        self.group.start("all-gather", plan, parts, layout.places().collect(), |group, parts| {
            let message = group.lay_out(layout, parts, 1)?;
            let all = group.message(layout.ranks * width)?;
            let (from, to) = (message.at(), all.at());
            group.call("all-gather", move |nccl, handle, stream| {
                let (from, to) = (from as *const c_void, to as *mut c_void);
                // SAFETY: the messages are as large and live until the exchange is done.
                unsafe { (nccl.ncclAllGather)(from, to, width, NCCL_FLOAT32, handle, stream) }
            })?;
            group.keep([message]);
            Some(all)
        })
    }

    /// Starts an all-to-all: each rank's part of every tensor goes to that rank; the results are the parts that came
    /// from all, in their order.
    ///
    /// # Panics
    ///
    /// If the tensors are not those of the plan, or the last rank's part of one is shorter than the others'.
    pub fn all_to_all(&self, plan: &Plan, tensors: Vec<Values>) -> Pending {
        let layout = &*plan.0;
        check("tensor", &tensors, layout.shares.iter().map(|share| share.len));
        let equal = layout.shares.iter().all(|share| share.len == share.stride * layout.ranks);
        assert!(equal, "an all-to-all of unequal parts");
        self.group.start("all-to-all", plan, tensors, layout.places().collect(), |group, tensors| {
            let message = group.lay_out(layout, tensors, layout.ranks)?;
            let all = group.message(layout.ranks * layout.width)?;
            group.all_to_all("all-to-all", &message, &all, layout.width)?;
            group.keep([message]);
            Some(all)
        })
    }

    /// Replaces all values by those of rank 0, in the order of the compute stream.
    ///
    /// # Errors
    ///
    /// If the ranks pass different lengths or one is lost, and the first failure since the GPU was opened.
    ///
    /// # Panics
    ///
    /// If some values are not f32.
    pub fn broadcast(&self, values: &mut [Values]) -> Result<()> {
        check("value", values, values.iter().map(Values::len));
        let shares: Vec<Share> =
            values.iter().map(|values| Share { len: values.len(), stride: values.len() }).collect();
        let plan = self.plan(&shares)?;
        let group = &self.group;
        group.count("broadcast", &plan);
        let is_root = self.rank() == 0;
        let places: Vec<(u64, usize)> = values
            .iter_mut()
            .map(|values| (if is_root { values.at() } else { values.own().at() }, values.len()))
            .filter(|(_, len)| *len > 0)
            .collect();
        // Behind all that uses this memory, which is the arena's.
        group.after(&[]);
        group.call("broadcast", move |nccl, handle, stream| {
            in_a_group(nccl, |each| {
                for (at, len) in places {
                    // SAFETY: as many live numbers, which no other stream uses before the end of the exchange.
                    each(unsafe {
                        let (from, to) = (at as *const c_void, at as *mut c_void);
                        (nccl.ncclBroadcast)(from, to, len, NCCL_FLOAT32, 0, handle, stream)
                    });
                }
            })
        });
        if let Some(end) = group.end("broadcast") {
            end.hold_back(Stream::Compute);
        }
        self.group.gpu.check()
    }

    /// An error at all ranks unless all pass the same words. The host waits.
    fn agree(&self, what: &str, words: &[u32]) -> Result<()> {
        const ROOM: usize = 8;
        let group = &self.group;
        let mut own = [0u32; ROOM];
        own[..words.len()].copy_from_slice(words);
        let bytes: Vec<u8> = own.iter().flat_map(|word| word.to_le_bytes()).collect();
        let ranks = self.world_size();
        let exchanged = (|| {
            let (message, all) = (group.message(ROOM)?, group.message(ranks * ROOM)?);
            // SAFETY: the message is as large, and used by the exchange stream alone.
            unsafe { group.gpu.send_on(Stream::Exchange, &bytes, message.at()) };
            let (from, to) = (message.at(), all.at());
            group.call("agreement", move |nccl, handle, stream| {
                let (from, to) = (from as *const c_void, to as *mut c_void);
                // SAFETY: the messages are as large and live until the exchange is done.
                unsafe { (nccl.ncclAllGather)(from, to, ROOM, NCCL_FLOAT32, handle, stream) }
            })?;
            group.keep([message]);
            Some((all, group.end("agreement")?))
        })();
        let Some((all, end)) = exchanged else { return group.gpu.check() };
        end.hold_back(Stream::Compute);
        group.communicator.wait_for("agreement", &end)?;
        let mut bytes = vec![0; ranks * ROOM * 4];
        // SAFETY: the message is as large, and the compute stream waits for it.
        unsafe { group.gpu.fetch(all.at(), &mut bytes) }?;
        group.keep([all]);
        let own: Vec<&[u8]> = bytes.chunks(ROOM * 4).collect();
        let others: Vec<String> = (1..ranks).filter(|rank| own[*rank] != own[0]).map(|rank| rank.to_string()).collect();
        if others.is_empty() {
            return Ok(());
        }
        let message = format!("rank {} of {ranks} differs from rank 0 in {what}", others.join(", "));
        Err(Error::failed(message).hint("give all processes the same files and arguments"))
    }
}

impl Drop for Collectives {
    fn drop(&mut self) {
        self.group.communicator.close(self.watcher.take());
    }
}

fn check(what: &str, values: &[Values], lengths: impl ExactSizeIterator<Item = usize>) {
    assert!(values.len() == lengths.len(), "{} {what}s, the plan has {}", values.len(), lengths.len());
    for (number, (values, len)) in values.iter().zip(lengths).enumerate() {
        let fits = (values.len(), values.kind()) == (len, Kind::F32);
        assert!(fits, "{what} {number} is {values:?}, the plan has {len}");
    }
}

/// Calls of NCCL that belong together; the first error.
fn in_a_group(nccl: &Nccl, calls: impl FnOnce(&mut dyn FnMut(Status))) -> Status {
    let mut first = 0;
    let mut each = |status: Status| {
        if first == 0 && status != NCCL_IN_PROGRESS {
            first = status;
        }
    };
    // SAFETY: every start has its end, on the same thread.
    each(unsafe { (nccl.ncclGroupStart)() });
    calls(&mut each);
    // SAFETY: as above.
    let end = unsafe { (nccl.ncclGroupEnd)() };
    if first == 0 { end } else { first }
}

impl Group {
    /// Starts an exchange. `work` queues it and returns the message that holds the result, from which `parts` are to be
    /// taken.
    fn start(
        self: &Arc<Self>,
        what: &'static str,
        plan: &Plan,
        inputs: Vec<Values>,
        parts: Vec<(Share, usize)>,
        work: impl FnOnce(&Self, &[Values]) -> Option<Fresh>,
    ) -> Pending {
        self.count(what, plan);
        let width = plan.0.width;
        let exchanged = if width == 0 || self.gpu.check().is_err() {
            None
        } else {
            self.after(&inputs);
            work(self, &inputs).zip(self.end(what))
        };
        Pending { group: self.clone(), inputs, exchanged, parts, width }
    }

    fn count(&self, what: &str, plan: &Plan) {
        let numbers = plan.0.shares.iter().flat_map(|share| [share.len, share.stride]).flat_map(usize::to_le_bytes);
        let mut trace = self.trace.lock().expect("not poisoned");
        let bytes: Vec<u8> = trace.to_le_bytes().into_iter().chain(what.bytes()).chain(numbers).collect();
        *trace = fingerprint(&bytes);
    }

    /// Later work of the exchange stream waits until values are computed; with none, for all work so far.
    fn after(&self, values: &[Values]) {
        let mut marks: Vec<&Arc<Event>> = values.iter().filter_map(Values::ready).collect();
        let all_marked = !values.is_empty() && marks.len() == values.len();
        marks.dedup_by(|a, b| Arc::ptr_eq(a, b));
        if all_marked {
            marks.iter().for_each(|mark| mark.hold_back(Stream::Exchange));
        } else if let Some(now) = Event::record(&self.gpu, Stream::Compute) {
            now.hold_back(Stream::Exchange);
        }
    }

    /// The end of an exchange, which is watched from now on.
    fn end(&self, what: &'static str) -> Option<Arc<Event>> {
        let end = Arc::new(Event::record(&self.gpu, Stream::Exchange)?);
        self.communicator.started(what, end.clone());
        Some(end)
    }

    /// Memory for this many numbers that the exchange stream can use.
    fn message(&self, numbers: usize) -> Option<Fresh> {
        self.memory(numbers * 4)
    }

    fn memory(&self, bytes: usize) -> Option<Fresh> {
        let fits = {
            let mut messages = self.messages.lock().expect("not poisoned");
            let all = messages.iter().enumerate().filter(|(_, (memory, _))| memory.size() >= bytes);
            all.min_by_key(|(_, (memory, _))| memory.size()).map(|(at, _)| at).map(|at| messages.swap_remove(at))
        };
        if let Some((memory, free)) = fits {
            if let Some(free) = free {
                free.hold_back(Stream::Exchange);
            }
            return Some(memory);
        }
        self.gpu.take_fresh(bytes).map_err(|error| self.gpu.note(Err(error))).ok()
    }

    /// Keeps memory that only the exchange stream uses for what comes later on that stream.
    fn keep<const N: usize>(&self, memory: [Fresh; N]) {
        self.messages.lock().expect("not poisoned").extend(memory.map(|memory| (memory, None)));
    }

    /// The message of some tensors' parts for each rank, or of this rank's parts alone.
    fn lay_out(&self, layout: &Layout, tensors: &[Values], ranks: usize) -> Option<Fresh> {
        let mut table = Table::new();
        let mut end = 0;
        for ((share, begin), values) in layout.places().zip(tensors) {
            table.add(values.at(), [values.len(), share.stride, begin, share.stride * ranks]);
            end = begin + share.stride;
        }
        // What fills the message up: a tensor without numbers.
        let rest = layout.width - end;
        table.add(0, [0, rest, end, rest * ranks]);
        let (list, message) = (self.memory(table.bytes.len())?, self.message(layout.width * ranks)?);
        // SAFETY: the list is as large; the tensors are held by the exchange, and their places are within the message.
        unsafe {
            self.gpu.send_on(Stream::Exchange, &table.bytes, list.at());
            table.lay_out(&self.gpu, list.at(), message.at(), [ranks, layout.width]);
        }
        self.keep([list]);
        Some(message)
    }

    /// Rows `[ranks, width]`: each rank gets its own row from all.
    fn all_to_all(&self, what: &'static str, from: &Fresh, to: &Fresh, width: usize) -> Option<()> {
        let (from, to, ranks) = (from.at(), to.at(), self.communicator.world_size);
        self.call(what, move |nccl, handle, stream| {
            in_a_group(nccl, |each| {
                for peer in 0..ranks {
                    let offset = (peer * width * 4) as u64;
                    let (from, to) = ((from + offset) as *const c_void, (to + offset) as *mut c_void);
                    // SAFETY: the messages have a row for each rank and live until the exchange is done.
                    unsafe {
                        each((nccl.ncclSend)(from, width, NCCL_FLOAT32, peer as i32, handle, stream));
                        each((nccl.ncclRecv)(to, width, NCCL_FLOAT32, peer as i32, handle, stream));
                    }
                }
            })
        })
    }

    /// Calls NCCL in the order of the exchange stream; none if something failed.
    fn call(
        &self,
        what: &'static str,
        call: impl FnOnce(&Nccl, Handle, Handle) -> Status + Send + 'static,
    ) -> Option<()> {
        self.gpu.check().ok()?;
        let communicator = self.communicator.clone();
        let work = Box::new(move |stream| communicator.call(what, |nccl, handle| call(nccl, handle, stream)));
        self.gpu.machine().exchange(work).map_err(|error| self.gpu.note(Err(error))).ok()
    }
}

/// Tensors on their way.
#[must_use = "the results are what `wait` returns"]
pub struct Pending {
    group: Arc<Group>,
    /// Read by the exchange, and so not to be given back to the arena before the compute stream waits for its end.
    inputs: Vec<Values>,
    /// The message with the results and the end of the exchange; none if there is nothing or something failed.
    exchanged: Option<(Fresh, Arc<Event>)>,
    /// The shapes of the results and where they begin in the message.
    parts: Vec<(Share, usize)>,
    width: usize,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} tensors on their way", self.parts.len())
    }
}

impl Pending {
    /// The results. Later work of the GPU waits for them, the host does not.
    pub fn wait(mut self) -> Vec<Values> {
        let gpu = &self.group.gpu;
        let exchanged = self.exchanged.take();
        if let Some((_, end)) = &exchanged {
            end.hold_back(Stream::Compute);
        }
        self.inputs.clear();
        let mut table = Table::new();
        let results: Vec<Values> = self.parts.iter().map(|(share, _)| Values::new(gpu, share.len, Kind::F32)).collect();
        for ((share, begin), values) in self.parts.iter().zip(&results) {
            table.add(values.at(), [share.len, share.stride, *begin, share.len]);
        }
        if let Some((message, _)) = exchanged {
            // SAFETY: the results are as long as the table says, and the message has all their places.
            unsafe { table.take_apart(gpu, message.at(), self.width) };
            let read = Event::record(gpu, Stream::Compute);
            self.group.messages.lock().expect("not poisoned").push((message, read));
        }
        results
    }
}

impl Drop for Pending {
    /// Results that nobody wants: the inputs are still read.
    fn drop(&mut self) {
        if let Some((message, end)) = self.exchanged.take() {
            end.hold_back(Stream::Compute);
            self.group.keep([message]);
        }
    }
}
