// SPDX-License-Identifier: GPL-2.0

//! One submission: the work item that runs its commands, and the task that waits for it.
//!
//! The work item and the submitting task take turns. The task enqueues the work item and waits. The
//! work item runs the engine until all commands are done, an access misses, or its time slice is
//! over. Then it stores the reason and returns. On a miss, the submitting task services the GPU
//! page fault inside its ioctl, and enqueues the work item again. So no worker ever waits for a
//! page fault. A fault handler that never answers, of userfaultfd for example, blocks only the
//! submitting task, which can be killed.
//!
//! When the ioctl returns, the work item has always returned too.

use super::{
    command::Command,
    counters::Counter,
    engine::{
        Engine,
        Stop, //
    },
    retry_limit::RetryLimit,
    svm::{
        FaultBuffers,
        Svm, //
    }, //
};
use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        CondVar,
        Mutex, //
    },
    time::Instant,
    workqueue::{
        self,
        impl_has_work,
        new_work,
        Work,
        WorkItem, //
    }, //
};

/// The number of steps that the work item runs before it returns, to let other work use the CPU. A
/// step handles up to one page.
const SLICE: u32 = 512;

/// The outcome of a submission.
pub(crate) struct Outcome {
    /// Success if all commands completed, or else the error that ended the submission.
    pub(crate) result: Result,
    /// The number of commands that completed.
    pub(crate) completed: usize,
    /// The address of the access that failed with the error in `result`, or `None` if the error is
    /// not about an access.
    pub(crate) fault_address: Option<usize>,
}

impl Outcome {
    pub(crate) fn new(result: Result<(), Failure>, completed: usize) -> Self {
        Self {
            result: result.map_err(|(err, _)| err),
            completed,
            fault_address: result.err().and_then(|(_, va)| va),
        }
    }
}

#[pin_data]
struct Job {
    svm: Arc<Svm>,
    /// The work item holds the lock while it runs; the task takes it in between.
    #[pin]
    engine: Mutex<Engine>,
    /// The reason why the work item returned. The task takes it out.
    #[pin]
    stopped: Mutex<Option<Stop>>,
    #[pin]
    returned: CondVar,
    /// Makes the work item return before its next step.
    cancelled: Atomic<bool>,
    #[pin]
    work: Work<Job>,
}

impl_has_work! {
    impl HasWork<Self> for Job { self.work }
}

impl WorkItem for Job {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let stop = run_slice(&mut this.engine.lock(), &this.svm, &this.cancelled);

        *this.stopped.lock() = Some(stop);
        this.returned.notify_one();
    }
}

/// Runs `engine` on the memory of `svm` until all commands are done, an access misses, the time
/// slice is over, or `cancelled` is set.
pub(crate) fn run_slice(engine: &mut Engine, svm: &Svm, cancelled: &Atomic<bool>) -> Stop {
    let Some(_busy) = svm.power().try_busy() else {
        return Stop::Paused;
    };
    let mut left = SLICE;
    let completed = engine.completed();
    let stop = engine.run(&mut &*svm, || {
        let go_on = left > 0 && !cancelled.load(Relaxed);
        left = left.saturating_sub(1);
        go_on
    });

    svm.stats()
        .add(Counter::Commands, engine.completed() - completed);
    stop
}

/// An error that ends a submission, and the address that it is about, if it is about one.
pub(crate) type Failure = (Error, Option<usize>);

/// Calls `run_slice` until all commands are done, and services the GPU page faults in between.
/// `run_slice` returns why the engine stopped, and how many steps it has done in all.
pub(crate) fn drive(
    svm: &Svm,
    bufs: &mut FaultBuffers,
    mut run_slice: impl FnMut() -> Result<(Stop, u64)>,
) -> Result<(), Failure> {
    let mut retry_limit = RetryLimit::new(Instant::now());

    loop {
        let (stop, steps) = run_slice().map_err(|err| (err, None))?;
        match stop {
            Stop::Done => return Ok(()),
            // The slice is over, or the GPU is off. The work item may be one of a workqueue of the
            // kernel, so it does not wait.
            Stop::Paused => svm.power().wait().map_err(|err| (err, None))?,
            Stop::Fault(fault) => retry_limit
                .service(steps, || svm.service(fault, bufs).map(drop))
                // A signal, or the end of the process, has nothing to do with the address.
                .map_err(|err| (err, (err != EINTR && err != ESRCH).then_some(fault.va)))?,
        }
    }
}

impl Job {
    /// Runs the work item once and waits until it has stored the reason why it returns.
    ///
    /// While the task is frozen, the GPU does nothing for it: the work item returns at the end of
    /// its time slice, and only the task enqueues it again.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal. The work item may still be running then.
    fn run_once(self: &Arc<Self>) -> Result<Stop> {
        // This cannot fail. Only this function enqueues the work item, and it is called again only
        // after the work item has set `stopped`, so the work item is not pending.
        workqueue::system_dfl()
            .enqueue(self.clone())
            .map_err(|_| EIO)?;

        let mut stopped = self.stopped.lock();
        loop {
            if let Some(stop) = stopped.take() {
                return Ok(stop);
            }
            if self.returned.wait_killable_freezable(&mut stopped) {
                return Err(EINTR);
            }
        }
    }

    /// Runs all commands.
    fn drive(self: &Arc<Self>, bufs: &mut FaultBuffers) -> Result<(), Failure> {
        drive(&self.svm, bufs, || match self.run_once()? {
            stop if stop != Stop::Done && current!().fatal_signal_pending() => Err(EINTR),
            stop => Ok((stop, self.engine.lock().steps())),
        })
    }
}

/// Runs `commands` in order and waits for the end of the last one.
///
/// # Context
///
/// A task that runs in the address space `svm` and holds no locks. The wait is killable and
/// freezable. A killed task waits until the work item has finished its current step.
///
/// # Errors
///
/// [`ENOMEM`] if no command was started. All other errors are in the [`Outcome`].
pub(crate) fn run(svm: Arc<Svm>, commands: KVVec<Command>) -> Result<Outcome> {
    let engine = Engine::new(commands)?;
    let mut bufs = FaultBuffers::new()?;
    let job = Arc::pin_init(
        pin_init!(Job {
            svm,
            engine <- new_mutex!(engine, "dummy_gpu::engine"),
            stopped <- new_mutex!(None, "dummy_gpu::stopped"),
            returned <- new_condvar!("dummy_gpu::returned"),
            cancelled: Atomic::new(false),
            work <- new_work!("dummy_gpu::Job"),
        }),
        GFP_KERNEL_ACCOUNT,
    )?;

    let result = job.drive(&mut bufs);
    job.cancelled.store(true, Relaxed);
    job.work.flush();

    let completed = job.engine.lock().completed();
    Ok(Outcome::new(result, completed))
}
