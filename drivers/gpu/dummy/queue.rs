// SPDX-License-Identifier: GPL-2.0

//! The submissions of a file that no task waits for in its SUBMIT.
//!
//! A work item runs them, one after the other. It does what a GPU and its driver do on their own:
//! it runs the engine and services the GPU page faults, for a process that may do something else
//! meanwhile, or exit. A task can ask for the outcome of a submission later, or poll the file.
//!
//! While a fault is serviced, the work item may wait for as long as a userfaultfd likes, and cannot
//! be killed. So nothing waits for the work item: when its file is closed, it ends by itself as
//! soon as it can. And it holds up no work item of another file: see [`Workers`].

use super::{
    command::Command,
    engine::{
        Engine,
        Stop, //
    },
    job::{
        drive,
        run_slice,
        Outcome, //
    },
    svm::{
        FaultBuffers,
        Svm, //
    }, //
};
use kernel::{
    fs::File,
    new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        poll::{
            PollCondVarBox,
            PollTable,
            POLLIN,
            POLLOUT, //
        },
        Arc,
        CondVarTimeoutResult,
        Mutex, //
    },
    task::cond_resched,
    time::{
        msecs_to_jiffies,
        Delta,
        Instant,
        Monotonic, //
    },
    workqueue::{
        impl_has_work,
        new_work,
        OwnedQueue,
        Work,
        WorkItem, //
    }, //
};

/// The maximum number of submissions of a file whose outcome no task has asked for.
const DEPTH: usize = 64;

/// The workqueue of an instance.
///
/// Each file has one work item, and there are at most as many files with one as work items may be
/// active at a time. So no work item waits for another one to return.
pub(crate) struct Workers {
    workqueue: OwnedQueue,
    files: Arc<Atomic<u32>>,
}

impl Workers {
    const MAX_FILES: u32 = 512;

    /// Creates the workqueue.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            workqueue: OwnedQueue::new_cpu_intensive(c"dummy_gpu", Self::MAX_FILES)?,
            files: Arc::new(Atomic::new(0), GFP_KERNEL)?,
        })
    }

    /// Counts a file that has a work item.
    ///
    /// # Errors
    ///
    /// [`ENFILE`] if there are too many.
    fn count_file(&self) -> Result<CountedFile> {
        let counted = CountedFile(self.files.clone());

        if self.files.fetch_add(1, Relaxed) >= Self::MAX_FILES {
            return Err(ENFILE);
        }
        Ok(counted)
    }
}

/// A file that was counted.
struct CountedFile(Arc<Atomic<u32>>);

impl Drop for CountedFile {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

struct Submission {
    svm: Arc<Svm>,
    engine: Engine,
    bufs: FaultBuffers,
}

struct State {
    /// The sequence number of the newest submission.
    newest: u64,
    /// The submissions that were not started yet, with their sequence numbers, the oldest first.
    waiting: KVec<(u64, KBox<Submission>)>,
    /// The sequence number of the one that the work item runs.
    running: Option<u64>,
    /// The outcomes that no task has asked for yet, with the sequence numbers.
    ended: KVec<(u64, Outcome)>,
    /// Set by the first submission.
    counted: Option<CountedFile>,
}

impl State {
    /// The number of submissions that no task has got the outcome of.
    fn outstanding(&self) -> usize {
        self.waiting.len() + usize::from(self.running.is_some()) + self.ended.len()
    }

    fn is_outstanding(&self, sequence: u64) -> bool {
        self.running == Some(sequence) || self.waiting.iter().any(|s| s.0 == sequence)
    }
}

/// The submissions of one file. The file and the work item share them.
#[pin_data]
struct Queue {
    #[pin]
    state: Mutex<State>,
    /// Notified when a submission has ended, and when there is room for another one.
    changed: PollCondVarBox,
    closed: Atomic<bool>,
    #[pin]
    work: Work<Queue>,
}

impl_has_work! {
    impl HasWork<Self> for Queue { self.work }
}

impl WorkItem for Queue {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while let Some(submission) = this.next() {
            let outcome = this.run_submission(submission);
            this.end(outcome);
        }
    }
}

impl Queue {
    /// Starts the oldest submission.
    fn next(&self) -> Option<KBox<Submission>> {
        let mut state = self.state.lock();

        let (sequence, submission) = state.waiting.remove(0).ok()?;
        state.running = Some(sequence);
        Some(submission)
    }

    fn run_submission(&self, submission: KBox<Submission>) -> Outcome {
        let Submission {
            svm,
            mut engine,
            mut bufs,
        } = KBox::into_inner(submission);
        let result = drive(&svm, &mut bufs, || {
            let stop = run_slice(&mut engine, &svm, &self.closed);
            if stop != Stop::Done && self.closed.load(Relaxed) {
                return Err(ECANCELED);
            }
            cond_resched();
            Ok((stop, engine.steps()))
        });

        Outcome::new(result, engine.completed())
    }

    fn end(&self, outcome: Outcome) {
        let mut state = self.state.lock();

        if let Some(sequence) = state.running.take() {
            // This cannot fail: `submit()` has made room.
            let _ = state.ended.push_within_capacity((sequence, outcome));
        }
        self.changed.notify_all();
    }
}

/// The end of a wait without an outcome.
pub(crate) struct NoOutcome {
    pub(crate) error: Error,
    /// How much of the timeout was left.
    pub(crate) left: Delta,
}

/// The queue of an open file, which ends with the file. That does not wait for the work item.
///
/// Only tasks own it, so a work item never drops the last reference to its own workqueue.
pub(crate) struct FileQueue {
    queue: Arc<Queue>,
    workers: Arc<Workers>,
}

impl FileQueue {
    /// Creates the queue of a file.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`].
    pub(crate) fn new(workers: Arc<Workers>) -> Result<Arc<Self>> {
        let state = State {
            newest: 0,
            waiting: KVec::new(),
            running: None,
            ended: KVec::new(),
            counted: None,
        };
        let changed = PollCondVarBox::new(c"dummy_gpu::changed", static_lock_class!())?;

        let queue = Arc::pin_init(
            pin_init!(Queue {
                state <- new_mutex!(state, "dummy_gpu::queue"),
                changed,
                closed: Atomic::new(false),
                work <- new_work!("dummy_gpu::Queue"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        Ok(Arc::new(Self { queue, workers }, GFP_KERNEL_ACCOUNT)?)
    }

    /// Lets the work item run `commands` after what was submitted before. Returns the sequence
    /// number of the submission.
    ///
    /// # Errors
    ///
    /// - [`EAGAIN`] if there are too many submissions that no task has asked for.
    /// - [`ENFILE`] if too many files have submitted commands in this way.
    /// - [`ENOMEM`].
    pub(crate) fn submit(&self, svm: Arc<Svm>, commands: KVVec<Command>) -> Result<u64> {
        let submission = KBox::new(
            Submission {
                svm,
                engine: Engine::new(commands)?,
                bufs: FaultBuffers::new()?,
            },
            GFP_KERNEL_ACCOUNT,
        )?;
        let mut state = self.queue.state.lock();

        if state.outstanding() >= DEPTH {
            return Err(EAGAIN);
        }
        if state.counted.is_none() {
            state.counted = Some(self.workers.count_file()?);
        }
        // The end of a submission needs no memory then.
        let room = DEPTH - state.ended.len();
        state.ended.reserve(room, GFP_KERNEL_ACCOUNT)?;
        let sequence = state.newest + 1;
        state
            .waiting
            .push((sequence, submission), GFP_KERNEL_ACCOUNT)?;
        state.newest = sequence;
        drop(state);

        // If it is enqueued already, it has not looked for submissions yet.
        let _ = self.workers.workqueue.enqueue(self.queue.clone());
        Ok(sequence)
    }

    /// Waits for the end of a submission, up to `timeout`, and returns its outcome, once.
    ///
    /// # Errors
    ///
    /// - [`EINVAL`] if there is no such submission, or a task has its outcome already.
    /// - [`ETIME`] if the submission did not end in time.
    /// - [`ERESTARTSYS`] on a signal.
    pub(crate) fn wait(&self, sequence: u64, timeout: Delta) -> Result<Outcome, NoOutcome> {
        let start = Instant::<Monotonic>::now();
        let left = || timeout - start.elapsed();
        let no_outcome = |error| NoOutcome {
            error,
            left: left(),
        };
        let mut state = self.queue.state.lock();

        loop {
            let ended = state.ended.iter().position(|(ended, _)| *ended == sequence);
            if let Some((_, outcome)) = ended.and_then(|index| state.ended.remove(index).ok()) {
                self.queue.changed.notify_all();
                return Ok(outcome);
            }
            if !state.is_outstanding(sequence) {
                return Err(no_outcome(EINVAL));
            }
            let left = left();
            if left.is_zero() || left.is_negative() {
                return Err(no_outcome(ETIME));
            }
            let jiffies = msecs_to_jiffies(left.as_millis_ceil().try_into().unwrap_or(u32::MAX));
            if let CondVarTimeoutResult::Signal { .. } = self
                .queue
                .changed
                .wait_interruptible_timeout(&mut state, jiffies)
            {
                return Err(no_outcome(ERESTARTSYS));
            }
        }
    }

    /// What the file is ready for: a submission has ended, and another one can be submitted.
    pub(crate) fn poll(&self, file: &File, table: PollTable<'_>) -> u32 {
        table.register_wait(file, &self.queue.changed);

        let state = self.queue.state.lock();
        let mut events = 0;
        if !state.ended.is_empty() {
            events |= POLLIN;
        }
        if state.outstanding() < DEPTH {
            events |= POLLOUT;
        }
        events
    }
}

impl Drop for FileQueue {
    fn drop(&mut self) {
        self.queue.closed.store(true, Relaxed);
        // Drop them without the lock.
        let waiting = core::mem::take(&mut self.queue.state.lock().waiting);
        drop(waiting);
    }
}
