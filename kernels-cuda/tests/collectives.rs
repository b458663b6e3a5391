//! Collectives between ranks: threads with a software GPU each and NCCL's twin, and processes where one is killed.

#![allow(missing_docs)]

mod support;

use std::env;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use advxl_cuda::{
    AdamW, Collectives, ErrorKind, Gelu, Gpu, Kind, Parameter, Pending, Plan, Result, Share, Stream, Sum, UniqueId,
    Values, pairwise_sum,
};
use support::{few, host, in_any_order, numbers, soft};

const LIMIT: Duration = Duration::from_secs(30);

/// What `work` returns at each of `ranks` ranks.
fn on_ranks<T: Send>(ranks: usize, sum: Sum, work: impl Fn(&Gpu, &Collectives) -> T + Sync) -> Vec<T> {
    let id = UniqueId::new(&soft()).unwrap();
    let work = &work;
    thread::scope(|scope| {
        let join = |rank| {
            scope.spawn(move || {
                let gpu = soft();
                let collectives = Collectives::join(&gpu, id, rank, ranks, sum, LIMIT).unwrap();
                let result = work(&gpu, &collectives);
                gpu.check().unwrap();
                result
            })
        };
        let all: Vec<_> = (0..ranks).map(join).collect();
        all.into_iter().map(|rank| rank.join().expect("no rank fails")).collect()
    })
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The program's sum on the CPU.
fn pairwise_on_the_host(mut values: Vec<f32>, count: usize) -> Vec<f32> {
    let width = values.len() / count;
    let mut step = 1;
    while step < count {
        for left in (0..count).step_by(2 * step) {
            let right = left + step;
            if right < count {
                let (front, back) = values.split_at_mut(right * width);
                let sums = &mut front[left * width..][..width];
                sums.iter_mut().zip(&*back).for_each(|(sum, value)| *sum += value);
            }
        }
        step *= 2;
    }
    values.truncate(width);
    values
}

/// Tensors of odd, zero, tiny and large lengths, shared over `shards` shards as the program does.
fn shares(ranks: usize, shards: usize) -> Vec<Share> {
    let lengths = [1001, 0, 1, 7, 64, 3, 9000, 128];
    lengths.map(|len: usize| Share { len, stride: len.div_ceil(shards) * (shards / ranks) }).to_vec()
}

fn tensor(rank: usize, number: usize, len: usize) -> Vec<f32> {
    numbers(len, (1 + rank * 100 + number) as u64, 1.0)
}

fn tensors(gpu: &Gpu, rank: usize, shares: &[Share]) -> Vec<Values> {
    let each = shares.iter().enumerate();
    each.map(|(number, share)| Values::send(gpu, &tensor(rank, number, share.len))).collect()
}

fn hosts(values: Vec<Values>) -> Vec<Vec<f32>> {
    values.iter().map(host).collect()
}

#[test]
fn a_pairwise_sum_has_the_bits_of_the_hosts() {
    for (rows, width) in [(1, 5), (2, 33), (3, 1), (4, 300), (5, 7), (7, 64), (8, 1), (13, 9), (2, 0)] {
        let values = numbers(rows * width, 3, 1.0);
        let found = in_any_order(|gpu| host(&pairwise_sum(&Values::send(gpu, &values), rows)));
        assert_eq!(bits(&found), bits(&pairwise_on_the_host(values, rows)), "{rows} rows of {width}");
    }
}

#[test]
fn an_exact_reduce_scatter_has_the_bits_of_the_pairwise_tree() {
    for (ranks, shards) in few(&[(4, 8), (1, 8), (2, 8), (3, 3)], 1) {
        let (ranks, shards) = (*ranks, *shards);
        let shares = shares(ranks, shards);
        let found = on_ranks(ranks, Sum::Exact, |gpu, collectives| {
            let plan = collectives.plan(&shares).unwrap();
            hosts(collectives.reduce_scatter(&plan, tensors(gpu, collectives.rank(), &shares)).wait())
        });
        for (rank, found) in found.iter().enumerate() {
            for (number, share) in shares.iter().enumerate() {
                let all = (0..ranks).flat_map(|rank| tensor(rank, number, share.len)).collect();
                let right = &pairwise_on_the_host(all, ranks)[share.range(rank)];
                assert_eq!(bits(&found[number]), bits(right), "tensor {number} at rank {rank} of {ranks}");
            }
        }
    }
}

#[test]
fn a_fast_reduce_scatter_sums_all_ranks() {
    let shares = shares(2, 4);
    let found = on_ranks(2, Sum::Fast, |gpu, collectives| {
        let plan = collectives.plan(&shares).unwrap();
        hosts(collectives.reduce_scatter(&plan, tensors(gpu, collectives.rank(), &shares)).wait())
    });
    for (rank, found) in found.iter().enumerate() {
        for (number, share) in shares.iter().enumerate() {
            let (a, b) = (tensor(0, number, share.len), tensor(1, number, share.len));
            let right: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
            assert_eq!(found[number], right[share.range(rank)], "tensor {number} at rank {rank}");
        }
    }
}

#[test]
fn an_all_gather_makes_whole_tensors_of_the_parts() {
    for (ranks, shards) in few(&[(4, 4), (2, 8), (3, 6)], 1) {
        let shares = shares(*ranks, *shards);
        let found = on_ranks(*ranks, Sum::Exact, |gpu, collectives| {
            let plan = collectives.plan(&shares).unwrap();
            let parts = shares.iter().enumerate().map(|(number, share)| {
                Values::send(gpu, &tensor(9, number, share.len)[share.range(collectives.rank())])
            });
            hosts(collectives.all_gather(&plan, parts.collect()).wait())
        });
        for found in found {
            for (number, share) in shares.iter().enumerate() {
                assert_eq!(found[number], tensor(9, number, share.len), "tensor {number} of {ranks} ranks");
            }
        }
    }
}

#[test]
fn an_all_to_all_transposes_ranks_and_parts() {
    let (ranks, shares) = (3, [5, 0, 17].map(|stride| Share { len: 3 * stride, stride }));
    let found = on_ranks(ranks, Sum::Exact, |gpu, collectives| {
        let plan = collectives.plan(&shares).unwrap();
        hosts(collectives.all_to_all(&plan, tensors(gpu, collectives.rank(), &shares)).wait())
    });
    for (rank, found) in found.iter().enumerate() {
        for (number, share) in shares.iter().enumerate() {
            let right: Vec<f32> =
                (0..ranks).flat_map(|from| tensor(from, number, share.len)[share.range(rank)].to_vec()).collect();
            assert_eq!(found[number], right, "tensor {number} at rank {rank}");
        }
    }
}

#[test]
fn a_broadcast_gives_all_ranks_the_values_of_the_first() {
    let lengths = [7, 0, 300];
    for (ranks, delayed) in [(4, None), (2, Some(Stream::Compute)), (2, Some(Stream::Exchange))] {
        let found = on_ranks(ranks, Sum::Exact, |gpu, collectives| {
            gpu.delay(delayed);
            let rank = collectives.rank();
            let mut values: Vec<Values> =
                lengths.iter().map(|len| Values::send(gpu, &tensor(rank, *len, *len))).collect();
            let before = values[2].clone();
            // The host waits for the comparison of lengths, so not with the values that are checked.
            collectives.broadcast(&mut values).unwrap();
            values = lengths.iter().map(|len| Values::send(gpu, &tensor(rank, *len, *len))).collect();
            collectives.broadcast(&mut values).unwrap();
            let found = hosts(values);
            assert_eq!(host(&before), tensor(rank, 300, 300), "clones keep their numbers");
            gpu.delay(None);
            found
        });
        for found in found {
            assert!(found == lengths.map(|len| tensor(0, len, len)), "{delayed:?} is late");
        }
    }
}

#[test]
fn ranks_that_call_the_same_have_the_same_trace() {
    let shares = shares(2, 2);
    let found = on_ranks(2, Sum::Exact, |gpu, collectives| {
        let plan = collectives.plan(&shares).unwrap();
        let before = collectives.trace();
        drop(collectives.reduce_scatter(&plan, tensors(gpu, collectives.rank(), &shares)));
        assert_ne!(collectives.trace(), before);
        collectives.trace()
    });
    assert_eq!(found[0], found[1]);
}

/// A step as training has it: gradients of "blocks" that are computed one after another and marked, then summed, then
/// applied to weights that are gathered, with memory going through the arena all the while.
fn steps(gpu: &Gpu, collectives: &Collectives, ready: bool) -> Vec<Vec<f32>> {
    let (rank, ranks, blocks) = (collectives.rank(), collectives.world_size(), 4);
    let share = |len: usize| Share { len, stride: len.div_ceil(ranks) };
    let shares = [share(700), share(33)];
    let plan = collectives.plan(&shares).unwrap();
    let mut weights: Vec<Vec<Values>> = (0..blocks)
        .map(|block| shares.iter().map(|share| Values::filled(gpu, share.len, block as f32)).collect())
        .collect();
    for step in 0..3 {
        let mut gradients = Vec::new();
        for (block, weights) in weights.iter().enumerate() {
            let mut of_block: Vec<Values> = weights
                .iter()
                .map(|weights| {
                    let noise = Values::send(gpu, &tensor(rank, 10 * step + block, weights.len()));
                    // Goes through memory that is given back at once.
                    advxl_cuda::sum(&advxl_cuda::sum(weights, &noise), &noise)
                })
                .collect();
            if ready {
                Values::mark(&mut of_block);
            }
            gradients.push(of_block);
        }
        let started: Vec<Pending> =
            gradients.into_iter().rev().map(|gradients| collectives.reduce_scatter(&plan, gradients)).collect();
        // Work that takes the memory of buffers freed too early.
        let spoil: Vec<Values> = [700, 33, 700, 33].map(|len| Values::filled(gpu, len, f32::NAN)).to_vec();
        let sums: Vec<Vec<Values>> = started.into_iter().map(Pending::wait).collect();
        drop(spoil);
        let mut coming: Option<Pending> = None;
        let mut whole = Vec::new();
        for (block, sums) in sums.into_iter().rev().enumerate() {
            let own = weights[block].iter().zip(shares).zip(&sums).map(|((weights, share), sum)| {
                let part = Values::send(gpu, &host(weights)[share.range(rank)]);
                advxl_cuda::sum(&part, sum)
            });
            let next = collectives.all_gather(&plan, own.collect());
            whole.extend(coming.replace(next).map(Pending::wait));
        }
        whole.extend(coming.map(Pending::wait));
        weights = whole;
    }
    weights.into_iter().flat_map(hosts).collect()
}

#[test]
fn no_stream_reads_or_writes_too_early_however_late_the_other_is() {
    let run = |delayed: Option<Stream>, ready: bool| {
        on_ranks(2, Sum::Exact, |gpu, collectives| {
            gpu.delay(delayed);
            let found = steps(gpu, collectives, ready);
            gpu.delay(None);
            found
        })
    };
    let right = run(None, true);
    assert!(right.iter().flatten().flatten().all(|value| value.is_finite()));
    assert_eq!(right[0], right[1]);
    for delayed in few(&[Some(Stream::Exchange), Some(Stream::Compute)], 2) {
        for ready in few(&[true, false], 1) {
            assert_eq!(run(*delayed, *ready), right, "{delayed:?} is late, marks: {ready}");
        }
    }
}

/// One rank alone on a GPU whose blocks may use so much shared memory.
fn alone(shared_memory: usize) -> (Gpu, Collectives) {
    let gpu = Gpu::soft_with(Path::new(env!("CARGO_TARGET_TMPDIR")), shared_memory);
    let id = UniqueId::new(&gpu).unwrap();
    let collectives = Collectives::join(&gpu, id, 0, 1, Sum::Exact, LIMIT).unwrap();
    (gpu, collectives)
}

#[test]
fn an_exchange_waits_for_its_gradients_and_not_for_what_comes_after() {
    for is_marked in [true, false] {
        let (gpu, collectives) = alone(1 << 10);
        let plan = collectives.plan(&[Share { len: 8, stride: 8 }]).unwrap();
        gpu.delay(Some(Stream::Compute));
        let mut gradients = vec![Values::filled(&gpu, 8, 1.0)];
        if is_marked {
            Values::mark(&mut gradients);
        }
        // A kernel that fails once it runs, since it needs 8 KiB of shared memory.
        drop(advxl_cuda::gelu_gradient(Gelu::Erf, &gradients[0], &gradients[0], 8, true));
        let pending = collectives.reduce_scatter(&plan, gradients);
        assert_eq!(gpu.check().is_ok(), is_marked, "the exchange waits for it: {}", !is_marked);
        drop(pending.wait());
        assert!(gpu.wait().is_err());
    }
}

#[test]
fn an_exchange_waits_for_every_one_of_its_tensors() {
    let (gpu, collectives) = alone(64 << 10);
    let plan = collectives.plan(&[Share { len: 8, stride: 8 }; 3]).unwrap();
    gpu.delay(Some(Stream::Compute));
    let block = |value: f32| {
        let mut values = [Values::filled(&gpu, 8, value)];
        Values::mark(&mut values);
        values
    };
    let tensors = [block(1.0), block(2.0), block(3.0)].concat();
    let found = hosts(collectives.reduce_scatter(&plan, tensors).wait());
    assert_eq!(found, [1.0, 2.0, 3.0].map(|value| vec![value; 8]));
}

#[test]
fn a_message_is_not_overwritten_before_its_results_are_taken_out() {
    let (gpu, collectives) = alone(64 << 10);
    let plan = collectives.plan(&[Share { len: 8, stride: 8 }]).unwrap();
    gpu.delay(Some(Stream::Compute));
    let mut tensors = [1.0, 2.0, 3.0].map(|value| Values::filled(&gpu, 8, value));
    Values::mark(&mut tensors);
    let found = tensors.map(|tensor| collectives.reduce_scatter(&plan, vec![tensor]).wait());
    assert_eq!(hosts(found.concat()), [1.0, 2.0, 3.0].map(|value| vec![value; 8]));
}

#[test]
fn values_that_were_changed_lose_their_mark() {
    let (gpu, collectives) = alone(64 << 10);
    let plan = collectives.plan(&[Share { len: 8, stride: 8 }]).unwrap();
    gpu.delay(Some(Stream::Compute));
    let mut weights = [Values::filled(&gpu, 8, 1.0)];
    Values::mark(&mut weights);
    let [mut weights] = weights;
    let zeros = || Values::zeros(&gpu, 8, Kind::F32);
    let (gradient, mut first, mut second) = (Values::filled(&gpu, 8, 1.0), zeros(), zeros());
    let adamw =
        AdamW { learning_rate: 0.5, betas: (0.0, 0.0), eps: 0.0, step: 1, gradient_scale: 1.0, average_decay: 0.0 };
    let (first, second) = (&mut first, &mut second);
    let parameter = Parameter {
        weights: &mut weights,
        gradient: &gradient,
        first,
        second,
        average: None,
        weight_decay: 0.0,
        rate: 1.0,
        rounded: false,
    };
    adamw.update(&gpu, &mut [parameter]);
    assert_eq!(hosts(collectives.all_gather(&plan, vec![weights]).wait()), [vec![0.5; 8]]);
}

#[test]
fn ranks_with_different_tensors_are_refused_by_name() {
    let id = UniqueId::new(&soft()).unwrap();
    let join = |rank: usize| {
        thread::spawn(move || {
            let gpu = soft();
            let collectives = Collectives::join(&gpu, id, rank, 3, Sum::Exact, LIMIT)?;
            let len = if rank == 2 { 13 } else { 12 };
            let refused = collectives.plan(&[Share { len, stride: 5 }]).map(drop);
            // The group is still of use.
            collectives.plan(&[Share { len: 12, stride: 4 }])?;
            refused
        })
    };
    let all: Vec<_> = (0..3).map(join).collect();
    for rank in all {
        let error = rank.join().unwrap().unwrap_err();
        assert!(error.message().starts_with("rank 2 of 3 differs from rank 0 in the tensors"), "{error}");
    }
}

#[test]
fn ranks_that_call_something_else_get_an_error() {
    let id = UniqueId::new(&soft()).unwrap();
    let join = |rank: usize| {
        thread::spawn(move || -> Result<()> {
            let gpu = soft();
            let collectives = Collectives::join(&gpu, id, rank, 2, Sum::Fast, LIMIT)?;
            let plan = collectives.plan(&[Share { len: 12, stride: 6 }])?;
            let values = |len| vec![Values::zeros(&gpu, len, Kind::F32)];
            let pending = match rank {
                0 => collectives.reduce_scatter(&plan, values(12)),
                _ => collectives.all_gather(&plan, values(6)),
            };
            drop(pending.wait());
            gpu.wait()
        })
    };
    let all = [0, 1].map(join);
    for error in all.map(|rank| rank.join().unwrap().unwrap_err()) {
        assert!(error.message().contains("rank 0 calls reduce-scatter, rank 1 all-gather"), "{error}");
        assert!(error.message().contains("invalid usage (5)"), "{error}");
    }
}

#[test]
fn ranks_that_sum_in_different_ways_are_refused() {
    let id = UniqueId::new(&soft()).unwrap();
    let join =
        |(rank, sum)| thread::spawn(move || Collectives::join(&soft(), id, rank, 2, sum, LIMIT).map(drop).unwrap_err());
    for error in [(0, Sum::Exact), (1, Sum::Fast)].map(join).map(|rank| rank.join().unwrap()) {
        assert!(error.message().contains("rank 1 of 2 differs from rank 0 in how gradients are summed"), "{error}");
    }
}

#[test]
fn a_missing_rank_is_an_error_after_the_limit() {
    let (gpu, start) = (soft(), Instant::now());
    let id = UniqueId::new(&gpu).unwrap();
    let error = Collectives::join(&gpu, id, 0, 2, Sum::Exact, Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.message().contains("joining: not done after 300ms at rank 0 of 2"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    // The other way round: the first rank never comes.
    let id = UniqueId::new(&gpu).unwrap();
    let error = Collectives::join(&soft(), id, 1, 2, Sum::Exact, Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost, "{error}");
}

#[test]
fn a_rank_that_does_not_answer_is_an_error_after_the_limit() {
    let id = UniqueId::new(&soft()).unwrap();
    let limit = Duration::from_secs(1);
    let (done, silent) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || {
        let gpu = soft();
        let collectives = Collectives::join(&gpu, id, 1, 2, Sum::Exact, limit).unwrap();
        let _ = silent.recv(); // Alive, and never in the exchange.
        drop(collectives);
    });
    let gpu = soft();
    let collectives = Collectives::join(&gpu, id, 0, 2, Sum::Exact, limit).unwrap();
    let error = collectives.plan(&[Share { len: 2, stride: 1 }]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost);
    assert!(error.message().contains("agreement: not done after 1s at rank 0 of 2"), "{error}");
    assert_eq!(gpu.check().unwrap_err().kind(), ErrorKind::Lost);
    drop(done);
    other.join().unwrap();
}

#[test]
fn an_abort_ends_an_exchange_that_another_thread_waits_for() {
    let id = UniqueId::new(&soft()).unwrap();
    let (done, silent) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || {
        let collectives = Collectives::join(&soft(), id, 1, 2, Sum::Exact, LIMIT).unwrap();
        let _ = silent.recv();
        collectives.watch().abort("the test is over");
    });
    let gpu = soft();
    let collectives = Collectives::join(&gpu, id, 0, 2, Sum::Exact, LIMIT).unwrap();
    let watch = collectives.watch();
    watch.check().unwrap();
    let (start, plan) = (Instant::now(), &[Share { len: 2, stride: 1 }]);
    let error = thread::scope(|scope| {
        let waiting = scope.spawn(|| collectives.plan(plan).unwrap_err());
        scope.spawn(|| watch.abort("rank 1 sends no heartbeat"));
        waiting.join().unwrap()
    });
    assert!(start.elapsed() < LIMIT);
    assert_eq!((error.kind(), error.message()), (ErrorKind::Lost, "rank 1 sends no heartbeat"));
    assert_eq!(watch.check().unwrap_err().message(), "rank 1 sends no heartbeat");
    drop(collectives);
    drop(done);
    other.join().unwrap();
}

#[test]
#[should_panic(expected = "tensor 1 is 5 F32 on GPU software, the plan has 6")]
fn tensors_that_are_not_the_plans_panic() {
    let gpu = soft();
    let id = UniqueId::new(&gpu).unwrap();
    let collectives = Collectives::join(&gpu, id, 0, 1, Sum::Exact, LIMIT).unwrap();
    let plan: Plan = collectives.plan(&[Share { len: 4, stride: 4 }, Share { len: 6, stride: 6 }]).unwrap();
    let tensors = [4, 5].map(|len| Values::zeros(&gpu, len, Kind::F32));
    let _ = collectives.reduce_scatter(&plan, tensors.to_vec());
}

const CHILD: &str = "ADVXL_TEST_ID";

/// A rank in a process of its own that has joined, until it is killed.
struct Rank(Child);

impl Rank {
    /// Starts `a_rank_in_its_own_process` in this test's program and waits until it has joined.
    fn start(id: UniqueId) -> impl FnOnce() -> Self {
        let id: String = id.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "a_rank_in_its_own_process", "--nocapture"])
            .env(CHILD, id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut rank = Self(child);
        move || {
            let lines = BufReader::new(rank.0.stdout.take().unwrap()).lines();
            assert!(lines.map(|line| line.unwrap()).any(|line| line.ends_with("joined")), "the child ended early");
            rank
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test of its own: what [`Rank`] starts.
#[test]
fn a_rank_in_its_own_process() {
    let Ok(id) = env::var(CHILD) else { return };
    let bytes: Vec<u8> = (0..128).map(|at| u8::from_str_radix(&id[2 * at..][..2], 16).unwrap()).collect();
    let id = UniqueId::from_bytes(bytes.try_into().unwrap());
    let collectives = Collectives::join(&soft(), id, 1, 2, Sum::Exact, LIMIT).unwrap();
    println!("joined");
    // Until the parent kills it, or is gone itself.
    let _ = std::io::stdin().read_line(&mut String::new());
    collectives.watch().abort("the parent is gone");
}

#[test]
fn a_killed_rank_is_an_error_within_seconds() {
    let gpu = soft();
    let id = UniqueId::new(&gpu).unwrap();
    let joined = Rank::start(id);
    let collectives = Collectives::join(&gpu, id, 0, 2, Sum::Exact, LIMIT).unwrap();
    drop(joined());
    let start = Instant::now();
    let error = collectives.plan(&[Share { len: 2, stride: 1 }]).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(error.kind(), ErrorKind::Lost);
    for part in ["remote process exited or there was a network error (6)", "rank 1 is gone"] {
        assert!(error.message().contains(part), "{error}");
    }
    assert_eq!(gpu.check().unwrap_err().kind(), ErrorKind::Lost);
}

#[test]
fn a_rank_that_is_killed_while_nobody_waits_is_noticed() {
    let gpu = soft();
    let id = UniqueId::new(&gpu).unwrap();
    let joined = Rank::start(id);
    let collectives = Collectives::join(&gpu, id, 0, 2, Sum::Exact, LIMIT).unwrap();
    drop(joined());
    let start = Instant::now();
    while gpu.check().is_ok() {
        assert!(start.elapsed() < Duration::from_secs(10), "the thread that watches finds it");
        thread::yield_now();
    }
    assert_eq!(collectives.watch().check().unwrap_err().kind(), ErrorKind::Lost);
}
