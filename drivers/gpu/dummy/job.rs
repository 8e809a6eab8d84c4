// SPDX-License-Identifier: GPL-2.0

//! One submission: the work item that runs its commands, and the task that waits for it.
//!
//! The two take turns. The submitting task enqueues the work item and waits. The work item runs the
//! engine until all is done, an access misses, or its slice of time is over, says which, and
//! returns: a worker never waits for anything. The submitting task services the GPU page fault,
//! inside its ioctl and as the process whose memory it is, and enqueues the work item again. So a
//! fault handler that never answers holds up one task, which can be killed, and no worker.
//!
//! When the ioctl returns the work item has returned too, whatever happened.

use super::{
    command::Command,
    counters::Counter,
    engine::{
        Engine,
        Stop, //
    },
    svm::{
        Patience,
        Svm,
        Window, //
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

/// The pages of work that are done before other work gets the worker's CPU.
const SLICE: u32 = 512;

/// How a submission ended.
pub(crate) struct Outcome {
    /// Whether all commands ran, or why not.
    pub(crate) result: Result,
    /// The number of commands that ran to their end.
    pub(crate) completed: usize,
    /// Where the access failed that `result` tells of, if it does.
    pub(crate) fault_address: Option<usize>,
}

#[pin_data]
struct Job {
    svm: Arc<Svm>,
    /// Locked by the work item for as long as it runs, by the task in between.
    #[pin]
    engine: Mutex<Engine>,
    /// Why the work item returned, until the task takes it.
    #[pin]
    stopped: Mutex<Option<Stop>>,
    #[pin]
    returned: CondVar,
    /// Tells the work item to return before the next page.
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
        let mut left = SLICE;
        let mut engine = this.engine.lock();
        let completed = engine.completed();
        let stop = engine.run(&mut &*this.svm, || {
            let go_on = left > 0 && !this.cancelled.load(Relaxed);
            left = left.saturating_sub(1);
            go_on
        });
        let completed = engine.completed() - completed;
        drop(engine);

        this.svm.account().add(Counter::Commands, completed);
        *this.stopped.lock() = Some(stop);
        this.returned.notify_one();
    }
}

impl Job {
    /// Runs the work item and waits until it says why it returned.
    ///
    /// While the task is frozen the GPU does nothing for it: the work item returns at the end of
    /// its slice, and only the task can enqueue it again.
    ///
    /// # Errors
    ///
    /// [`EINTR`] on a fatal signal. Then the work item may still run.
    fn run_once(self: &Arc<Self>) -> Result<Stop> {
        // It is not enqueued: it has run, but for its last instructions, each time that it was.
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

    /// Runs all commands. On failure says where, if it was an access that failed.
    fn drive(self: &Arc<Self>, window: &mut Window) -> Result<(), (Error, Option<usize>)> {
        let mut patience = Patience::new(Instant::now());

        loop {
            match self.run_once().map_err(|err| (err, None))? {
                Stop::Done => return Ok(()),
                _ if current!().fatal_signal_pending() => return Err((EINTR, None)),
                Stop::Paused => {}
                Stop::Fault(fault) => {
                    let steps = self.engine.lock().steps();

                    patience
                        .fault(steps, Instant::now())
                        .and_then(|()| match self.svm.service(fault, window) {
                            // The core has given up. When that is final, patience says.
                            Err(err) if err == EBUSY => Ok(()),
                            result => result.map(drop),
                        })
                        // A signal says nothing of the address.
                        .map_err(|err| (err, (err != EINTR).then_some(fault.va)))?;
                }
            }
        }
    }
}

/// Runs `commands` in order and waits for the end of the last.
///
/// # Context
///
/// A task that runs in the address space `svm` and holds no locks. The wait can be killed and
/// frozen; once killed, the task waits for no longer than a page of work takes.
///
/// # Errors
///
/// [`ENOMEM`] if nothing ran at all. How it ended otherwise, the [`Outcome`] says.
pub(crate) fn run(svm: Arc<Svm>, commands: KVVec<Command>) -> Result<Outcome> {
    let engine = Engine::new(commands)?;
    let mut window = Window::new()?;
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

    let result = job.drive(&mut window);
    job.cancelled.store(true, Relaxed);
    job.work.flush();

    let completed = job.engine.lock().completed();
    let (result, fault_address) = match result {
        Ok(()) => (Ok(()), None),
        Err((err, fault_address)) => (Err(err), fault_address),
    };
    Ok(Outcome {
        result,
        completed,
        fault_address,
    })
}
